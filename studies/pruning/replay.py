"""Ways of pruning replayed on complete learning curves: what each would have cost, and what it would have found.

    python studies/pruning/replay.py studies/pruning/baseline.csv

Every epoch takes the same time and a free worker starts the next recipe; as in a study, the first MIN_UNPRUNED_TRIALS
recipes are never pruned. Our pruner and Optuna's are replayed by the same rules on plain lists, a few hundred times
faster; tests/studies/test_pruning.py holds the two to the same decisions.
"""

import argparse
from bisect import insort
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from curves import load_curves, scores_of
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
)

from pipeline.search.pruner import MIN_UNPRUNED_TRIALS, WINDOW, RecentTrialsPruner, continues

# Name -> the pruner for so many trials of so many epochs; the fraction is when it first decides.
STRATEGIES: Mapping[str, Callable[[int, int], BasePruner]] = {
    "no pruning": lambda trials, epochs: NopPruner(),
    "median from 1/3": lambda trials, epochs: MedianPruner(10, epochs // 3, n_min_trials=5),
    "median from 1/6": lambda trials, epochs: MedianPruner(5, epochs // 6),
    "best third from 1/6": lambda trials, epochs: PercentilePruner(33, 5, epochs // 6),
    "best quarter from 1/3": lambda trials, epochs: PercentilePruner(25, 5, epochs // 3),
    "best quarter from 1/6": lambda trials, epochs: PercentilePruner(25, 5, epochs // 6),
    "halving by 2 from 1/6": lambda trials, epochs: SuccessiveHalvingPruner(max(1, epochs // 6), 2),
    "halving by 3 from 1/6": lambda trials, epochs: SuccessiveHalvingPruner(max(1, epochs // 6), 3),
    "halving by 4 from 1/6": lambda trials, epochs: SuccessiveHalvingPruner(max(1, epochs // 6), 4),
    "halving by 3 from 1/9": lambda trials, epochs: SuccessiveHalvingPruner(max(1, epochs // 9), 3),
    "best quarter of the last 12 from 1/6": lambda trials, epochs: RecentTrialsPruner(epochs),
    "Hyperband by 3 from 1/9": lambda trials, epochs: HyperbandPruner(max(1, epochs // 9), epochs, 3),
}
WORKERS = (1, 2, 4)
WEIGHTS = ("plain", "averaged")
ORDERS_PER_RESAMPLE = 10


class Rule(Protocol):
    """A pruner that follows a study's trials, numbered in the order in which they start."""

    def prune(self, trial: int, epoch: int, score: float) -> bool:
        """Whether a trial with this score after an epoch, from 1 and not its last, is pruned."""

    def complete(self, trial: int) -> None:
        """A trial reached its last epoch. Nothing more is reported of one that diverged or was pruned."""


class Never:
    """NopPruner."""

    first_decision = 1

    def prune(self, trial: int, epoch: int, score: float) -> bool:
        """See Rule."""
        return False

    def complete(self, trial: int) -> None:
        """See Rule."""


class Percentile:
    """PercentilePruner, and so MedianPruner: a trial's best so far against the completed trials' scores at the epoch."""

    def __init__(self, pruner: PercentilePruner):
        self.first_decision = max(1, pruner._n_warmup_steps)
        self._share = (100 - pruner._percentile) / 100
        self._fewest = max(1, pruner._n_startup_trials, pruner._n_min_trials)
        self._seen: dict[int, list[float]] = defaultdict(list)
        self._completed: dict[int, list[float]] = defaultdict(list)  # by epoch, ascending

    def prune(self, trial: int, epoch: int, score: float) -> bool:
        """See Rule."""
        seen, others = self._seen[trial], self._completed[epoch]
        seen.append(score)
        if epoch < self.first_decision or len(others) < self._fewest:
            return False
        return max(seen) < quantile(others, self._share)

    def complete(self, trial: int) -> None:
        """See Rule."""
        for epoch, score in enumerate(self._seen.pop(trial, []), 1):
            insort(self._completed[epoch], score)


class Halving:
    """SuccessiveHalvingPruner (ASHA, arXiv 1810.05934): at each rung only the best 1/eta of those that reached it continue."""

    def __init__(self, pruner: SuccessiveHalvingPruner):
        assert pruner._min_resource is not None and not pruner._bootstrap_count
        self._eta = pruner._reduction_factor
        self.first_decision = pruner._min_resource * self._eta**pruner._min_early_stopping_rate
        self._rung: dict[int, int] = defaultdict(int)
        self._scores: dict[int, list[float]] = defaultdict(list)  # by rung, ascending

    def prune(self, trial: int, epoch: int, score: float) -> bool:
        """See Rule."""
        while epoch >= self.first_decision * self._eta ** self._rung[trial]:
            scores = self._scores[self._rung[trial]]
            insort(scores, score)
            self._rung[trial] += 1
            if score < scores[-max(1, len(scores) // self._eta)]:
                return True
        return False

    def complete(self, trial: int) -> None:
        """See Rule."""


class Recent:
    """RecentTrialsPruner: at each rung only the best of the last few that reached it continue."""

    def __init__(self, pruner: RecentTrialsPruner):
        self.first_decision = pruner.rungs[0]
        self._scores: dict[int, list[tuple[int, float]]] = {rung: [] for rung in pruner.rungs}  # by trial

    def prune(self, trial: int, epoch: int, score: float) -> bool:
        """See Rule."""
        if epoch not in self._scores:
            return False
        others = [other for _, other in self._scores[epoch][1 - WINDOW :]]
        insort(self._scores[epoch], (trial, score))
        return not continues(score, others)

    def complete(self, trial: int) -> None:
        """See Rule."""


class Hyperband:
    """HyperbandPruner (arXiv 1603.06560): successive halving in brackets whose first decisions are at different epochs."""

    def __init__(self, pruner: HyperbandPruner, name: str):
        pruner._try_initialization(None)  # type: ignore[arg-type]
        brackets = [Halving(bracket) for bracket in pruner._pruners]
        self.first_decision = min(bracket.first_decision for bracket in brackets)
        self._draw = lambda trial: brackets[pruner._get_bracket_id(_Named(name), _Numbered(trial))]  # type: ignore[arg-type]
        self._bracket: dict[int, Halving] = {}

    def prune(self, trial: int, epoch: int, score: float) -> bool:
        """See Rule."""
        if epoch == 1:
            self._bracket[trial] = self._draw(trial)
        return self._bracket[trial].prune(trial, epoch, score)

    def complete(self, trial: int) -> None:
        """See Rule."""


class _Named(NamedTuple):
    study_name: str


class _Numbered(NamedTuple):
    number: int


AnyRule = Never | Percentile | Halving | Recent | Hyperband


def rule(pruner: BasePruner, name: str) -> AnyRule:
    """What a pruner does in a study called `name`, by which Hyperband draws its brackets."""
    if isinstance(pruner, PercentilePruner):
        return Percentile(pruner)
    if isinstance(pruner, SuccessiveHalvingPruner):
        return Halving(pruner)
    if isinstance(pruner, RecentTrialsPruner):
        return Recent(pruner)
    if isinstance(pruner, HyperbandPruner):
        return Hyperband(pruner, name)
    assert isinstance(pruner, NopPruner)
    return Never()


def simulate(curves: Sequence[Sequence[float]], rule: Rule, workers: int, unpruned: int = 0) -> tuple[int, list[int]]:
    """A study of these recipes in this order, one curve of scores each; NaN where it diverged.

    The first `unpruned` recipes are compared, and always continue. Returns the epochs that were trained, including the
    one in which a recipe diverged, and the recipes that were completed.
    """
    waiting = iter(range(workers, len(curves)))
    running = deque((trial, 1) for trial in range(min(workers, len(curves))))  # and the epoch that comes next
    used, completed = 0, []
    while running:
        trial, epoch = running.popleft()
        used += 1
        score = curves[trial][epoch - 1]
        if score == score:  # not NaN
            if epoch == len(curves[trial]):
                rule.complete(trial)
                completed.append(trial)
            else:
                if not rule.prune(trial, epoch, score) or trial < unpruned:
                    running.append((trial, epoch + 1))
                    continue
        if (new := next(waiting, None)) is not None:
            running.append((new, 1))
    return used, completed


@dataclass(frozen=True)
class Estimate:
    """A number, and the 95 % interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Replayed:
    """What a strategy did with the scores of one kind of weights, on average over many random orders of the recipes."""

    weights: str  # whose scores decide: plain or averaged
    strategy: str
    workers: int
    first_decision: int  # epoch
    rank_correlation: Estimate  # Spearman's, of the scores at the first decision and at the end
    epochs_used: Estimate  # share of those without pruning
    regret: Estimate  # final score of the best recipe less that of the best completed one


def replay_all(
    scores: Mapping[str, np.ndarray],
    orders: int,
    seed: int = 0,
    resamples: int = 200,
    trials: int | None = None,
    rise: float = 0.0,
) -> list[Replayed]:
    """Every strategy on the scores of each kind of weights, (num_recipes, num_epochs), NaN where a recipe had diverged.

    Values are means over `orders` random orders, the same for all, of all recipes or of `trials` drawn ones. With `rise`
    the later ones tend to be better, as in a search that learns: by so many widths of the spread of a uniform distribution
    from the first to the last. The intervals are percentile bootstraps over recipes:
    as many recipes are drawn with replacement, `resamples` times, and each time the mean is over ORDERS_PER_RESAMPLE orders.
    Regret is in the last score of the same weights; a study that completes nothing counts as scoring 0.
    """
    return [
        line
        for weights, curves in scores.items()
        for name, make in STRATEGIES.items()
        for line in _replay(curves, weights, name, make, orders, seed, resamples, trials, rise)
    ]


def _replay(
    curves: np.ndarray,
    weights: str,
    name: str,
    make: Callable[[int, int], BasePruner],
    orders: int,
    seed: int,
    resamples: int,
    trials: int | None,
    rise: float,
) -> list[Replayed]:
    random = np.random.RandomState(seed)
    num_recipes, num_epochs = curves.shape
    num_trials = trials or num_recipes
    first = rule(make(num_trials, num_epochs), "").first_decision
    ranks = np.nan_to_num(curves[:, -1]).argsort().argsort() / num_recipes

    def order(recipes: np.ndarray) -> np.ndarray:
        chosen = random.permutation(recipes)[:num_trials]
        return chosen[np.argsort(random.rand(num_trials) + rise * ranks[chosen])]

    given = [order(np.arange(num_recipes)) for _ in range(orders)]
    choices = [np.asarray(random.randint(num_recipes, size=num_recipes)) for _ in range(resamples)]
    drawn = [[order(those) for _ in range(ORDERS_PER_RESAMPLE)] for those in choices]
    correlation = _estimate(
        _rank_correlation(curves, first), [_rank_correlation(curves[chosen], first) for chosen in choices]
    )
    results = []
    for workers in WORKERS:
        mean = _mean_outcome(curves, given, make, workers)
        means = np.array([_mean_outcome(curves, those, make, workers) for those in drawn])
        used, regret = (_estimate(mean[i], list(means[:, i])) for i in (0, 1))
        results.append(Replayed(weights, name, workers, first, correlation, used, regret))
    return results


def _mean_outcome(
    curves: np.ndarray, orders: Sequence[np.ndarray], make: Callable[[int, int], BasePruner], workers: int
) -> tuple[float, float]:
    """(share of the epochs, regret), the mean over these orders."""
    rows, finals = curves.tolist(), np.nan_to_num(curves[:, -1])
    shares, regrets = [], []
    for number, order in enumerate(orders):
        ordered = [rows[i] for i in order]
        used, completed = simulate(
            ordered, rule(make(len(order), curves.shape[1]), f"order {number}"), workers, MIN_UNPRUNED_TRIALS
        )
        shares.append(used / np.minimum(1 + (~np.isnan(curves[order])).sum(1), curves.shape[1]).sum())
        regrets.append(finals[order].max() - finals[order[completed]].max(initial=0.0))
    return float(np.mean(shares)), float(np.mean(regrets))


def _rank_correlation(curves: np.ndarray, epoch: int) -> float:
    """Spearman's, between the scores after an epoch and at the end, of the recipes that had come so far.

    One that diverges later ranks last at the end.
    """
    from scipy.stats import rankdata

    come = curves[~np.isnan(curves[:, epoch - 1])]
    early, late = rankdata(come[:, epoch - 1]), rankdata(np.nan_to_num(come[:, -1], nan=-1.0))
    if not len(come) or np.ptp(early) == 0 or np.ptp(late) == 0:
        return 0.0
    return float(np.corrcoef(early, late)[0, 1])


def _estimate(value: float, resampled: Sequence[float]) -> Estimate:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def quantile(ascending: Sequence[float], share: float) -> float:
    """np.percentile's of a sorted list, to the last bit."""
    place = share * (len(ascending) - 1)
    below = int(place)
    if below + 1 == len(ascending):
        return ascending[-1]
    low, high, part = ascending[below], ascending[below + 1], place - below
    return high - (high - low) * (1 - part) if part >= 0.5 else low + (high - low) * part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a table of learning curves, as curves.py writes")
    parser.add_argument("--orders", type=int, default=500, help="random orders of the recipes")
    parser.add_argument("--seed", type=int, default=0, help="of the orders")
    parser.add_argument("--trials", type=int, help="of a study: so many recipes, drawn anew for each order")
    parser.add_argument("--rise", type=float, default=0.0, help="later trials tend to be better, by so many widths")
    options = parser.parse_args()
    curves = load_curves(Path(options.file))
    if options.trials and options.trials > len(curves):
        parser.error(f"--trials {options.trials}: {options.file} has {len(curves)} recipes")
    scores = {weights: scores_of(curves, weights) for weights in WEIGHTS}
    print("weights | strategy | workers | first at epoch | rank correlation | epochs used, % | regret, points")  # noqa: T201
    for line in replay_all(scores, options.orders, options.seed, trials=options.trials, rise=options.rise):
        cells = (line.weights, line.strategy, line.workers, line.first_decision)
        estimates = (_text(line.rank_correlation, 1), _text(line.epochs_used, 100), _text(line.regret, 100))
        print(" | ".join(map(str, (*cells, *estimates))))  # noqa: T201


def _text(estimate: Estimate, scale: float) -> str:
    value, low, high = (f"{scale * number:.2f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


if __name__ == "__main__":
    main()
