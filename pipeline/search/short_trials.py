"""Most trials are short: a quarter of the epochs, with their whole schedule. The best are trained again in full.

Those are the best quarter of the short ones that have ended so far. It changes as trials end, so about a third are in all.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943) with two lengths, asynchronous as ASHA (arXiv 1810.05934).
There a training is stopped while its rate is high, and a schedule that starts low looks best; a short training has gone
through its schedule, so any two can be compared (measured: studies/search/README.md).
"""

import math
from collections.abc import Collection, Sequence

from optuna.trial import FrozenTrial, TrialState

from pipeline.search.trial_attributes import TrialAttributes, is_feasible

SHARE = 1 / 4  # of a full training's epochs
ETA = 4  # one of so many recipes is trained in full
MIN_EPOCHS = 4  # of a full training; shorter ones are not shortened
MIN_TRIALS = ETA + 2  # of a study: the control, the first short ones, and the best of them in full


def short_epochs(epochs: int) -> int:
    """Of a training that takes so many in full."""
    return math.ceil(epochs * SHARE)


def next_in_full(
    trials: Sequence[FrozenTrial], is_last: bool = False, is_exhausted: bool = False
) -> FrozenTrial | None:
    """The short trial whose recipe is to be trained in full next; None where the next trial is to be a new short one.

    It is among the best 1/ETA of those that have ended, or the best where the space is exhausted; for the last trial of a
    study the best that is left will do.
    """
    attributes = {trial.number: TrialAttributes.of(trial) for trial in trials}
    ended = [
        trial
        for trial in trials
        if trial.state is TrialState.PRUNED and attributes[trial.number].short and is_feasible(trial)
    ]
    ended.sort(key=lambda trial: (-score_of(trial), trial.number))
    in_full = {attributes[trial.number].full_of for trial in trials if not attributes[trial.number].requeued}
    chosen = _choose([trial.number for trial in ended], in_full, len(ended) if is_last else int(is_exhausted))
    return None if chosen is None else next(trial for trial in ended if trial.number == chosen)


def score_of(short: FrozenTrial) -> float:
    """The last score of a short trial that has ended."""
    return short.intermediate_values[max(short.intermediate_values)]


def simulate(scores: Sequence[float]) -> list[bool]:
    """Whether each of as many trials, one after the other, is in full, where the short ones have these scores in turn."""
    is_full: list[bool] = []
    started, in_full = 0, set[int]()
    for number in range(len(scores)):
        ranked = sorted(range(started), key=lambda index: -scores[index])
        chosen = _choose(ranked, in_full, len(ranked) if number == len(scores) - 1 else 0)
        is_full.append(chosen is not None)
        if chosen is None:
            started += 1
        else:
            in_full.add(chosen)
    return is_full


def _choose(ranked: Sequence[int], in_full: Collection[int | None], least: int) -> int | None:
    candidates = ranked[: max(len(ranked) // ETA, least)]
    return next((number for number in candidates if number not in in_full), None)
