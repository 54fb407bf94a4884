"""Which trials are stopped before their last epoch."""

import math
from collections.abc import Sequence
from itertools import islice

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial

from pipeline.search.trial_attributes import TrialAttributes

WINDOW = 12  # trials that are compared, including the one that is decided on
KEEP_FRACTION = 1 / 4  # of them, rounded up, that continues
# The first trials of a study, the control among them, are never pruned: so even a short study has something to compare.
MIN_UNPRUNED_TRIALS = 3


class RecentTrialsPruner(BasePruner):
    """Asynchronous successive halving (ASHA, arXiv 1810.05934), against recent trials only.

    After a sixth, a third and two thirds of the epochs a trial continues if its score is among the best KEEP_FRACTION of
    the last WINDOW trials that came so far. ASHA compares with all trials that ever came so far: in a search that learns,
    later trials are better than most of those, and few are pruned. Replayed on complete learning curves
    (studies/pruning/README.md). It does not decide before a sixth, as curves cross while the learning rate is high.
    """

    def __init__(self, epochs: int):
        """`epochs` of the study's longest trial, in which steps are counted."""
        self.rungs = sorted({math.ceil(epochs * fraction) for fraction in (1 / 6, 1 / 3, 2 / 3)})

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial, whose score is to be maximised, has just reached a rung and has to stop."""
        rung = self.rung(trial.last_step or 0)
        score = self._score_at(trial, rung)
        if score is None or trial.last_step != min(step for step in trial.intermediate_values if step >= rung):
            return False
        others = (
            self._score_at(other, rung)
            for other in reversed(study.get_trials(deepcopy=False))
            if other.number != trial.number and not TrialAttributes.is_requeued(other)
        )
        return not continues(score, list(islice((other for other in others if other is not None), WINDOW - 1)))

    def rung(self, step: int) -> int:
        """The last rung that is reached by this step; 0 before the first."""
        return max((rung for rung in self.rungs if rung <= step), default=0)

    def _score_at(self, trial: FrozenTrial, rung: int) -> float | None:
        """Its first score at the rung, before the next one; None where it did not come so far or leapt over the rung."""
        steps = [step for step in trial.intermediate_values if self.rung(step) == rung > 0]
        return trial.intermediate_values[min(steps)] if steps else None


def continues(score: float, others: Sequence[float]) -> bool:
    """Whether a score is among the best KEEP_FRACTION, rounded up, of the others and itself."""
    return sum(other > score for other in others) < math.ceil(KEEP_FRACTION * (len(others) + 1))
