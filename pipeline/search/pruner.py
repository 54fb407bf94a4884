"""Which trial isn't worth going on with."""

import math
from collections.abc import Sequence
from itertools import islice

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial

WINDOW = 12  # trials that are compared, the one that is judged included
KEEP_FRACTION = 1 / 4  # of them that goes on
MIN_UNPRUNED_TRIALS = (
    3  # trials, the control the first, that a study never prunes: even a short one has something to compare
)


class RecentTrialsPruner(BasePruner):
    """Asynchronous successive halving (ASHA, arXiv 1810.05934), against recent trials only.

    After a sixth, a third and two thirds of the epochs a trial goes on whose score is among the best quarter, rounded up,
    of the last RECENT that came so far. ASHA compares with all that ever came: in a search that learns the later trials
    are better than most of those, and few are pruned. Replayed on whole learning curves, studies/README.md; not sooner
    than a sixth, as curves cross while the rate is high.
    """

    def __init__(self, epochs: int):
        """`epochs` of the study's longest trial, in which steps are counted."""
        self.rungs = sorted({math.ceil(epochs * share) for share in (1 / 6, 1 / 3, 2 / 3)})

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial, larger is better, has just come to a rung and is not to go on."""
        rung = self.rung(trial.last_step or 0)
        score = self._score_at(trial, rung)
        if score is None or trial.last_step != min(step for step in trial.intermediate_values if step >= rung):
            return False
        trials = reversed(study.get_trials(deepcopy=False))
        others = (self._score_at(other, rung) for other in trials if other.number != trial.number and _counts(other))
        return not goes_on(score, list(islice((other for other in others if other is not None), WINDOW - 1)))

    def rung(self, step: int) -> int:
        """The last one that is reached by this step; 0 before the first."""
        return max((rung for rung in self.rungs if rung <= step), default=0)

    def _score_at(self, trial: FrozenTrial, rung: int) -> float | None:
        """Its first one at the rung, before the next; None where it didn't come so far, or its steps are too long."""
        steps = [step for step in trial.intermediate_values if self.rung(step) == rung > 0]
        return trial.intermediate_values[min(steps)] if steps else None


def goes_on(score: float, others: Sequence[float]) -> bool:
    """Whether a score is among the best SHARE, rounded up, of the others' and itself."""
    return sum(other > score for other in others) < math.ceil(KEEP_FRACTION * (len(others) + 1))


def _counts(trial: FrozenTrial) -> bool:
    """What was asked again is another trial's now."""
    return not trial.user_attrs.get("asked_again")
