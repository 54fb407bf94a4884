"""What a study shows beyond noise: the lead of its best trial over the control, and the effect of each choice."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation.resampling import SWAPS, swap_test
from pipeline.evaluation.significance import Sample, fold_overlap, mcnemar, paired_difference, sample
from pipeline.recipe import LATER, value_label
from pipeline.report.stored import Predictions
from pipeline.report.trials import control, finished, param_names, ranked, searched, trial_rows, with_role
from pipeline.search.importances import importance_function
from pipeline.tracking.tags import State

Z95 = 1.96
ALPHA = 0.05
MAX_LEVELS = 4  # distinct numbers of a parameter that stay levels of their own; more are cut into thirds
MIN_TRIALS = 8  # finished ones, from which effects are estimated
MIN_TRIALS_OF_LEVEL = 3
PENALTIES = np.logspace(-0.5, 2, 11)  # residual variance over that of the effects: effects of 0.1 to 1.8 residuals
SHUFFLES = 40


@dataclass(frozen=True)
class Lead:
    """How far one model is before another on the same images; differences in units of the score, in [-1, 1]."""

    objective: str
    difference: float
    low: float  # of the 95 % interval over images
    high: float
    p: float  # that the two are equally good; see `lead`
    only_first: int  # images that only the first has right
    only_second: int
    images: int
    luck: float  # what the best of `trials` equally good models is ahead by chance, on average
    trials: int

    @property
    def verdict(self) -> str:
        """What may be said, in a clause: of the best of many, p times their number counts (Bonferroni)."""
        if self.p >= ALPHA:
            return "within the noise of these images"
        if self.difference > 0 and self.p * self.trials >= ALPHA:
            return "no more than the best of so many equally good trials may lead by luck"
        return "more than the noise of these images"


def lead(first: Predictions, second: Predictions, objective: str, trials: int = 1) -> Lead | None:
    """The first model's lead over the second, `trials` being how many the first is the best of.

    Paired: images that both have right or wrong say nothing. p is that of McNemar's exact test for accuracy, of the
    permutation test (`swap_test`), two-sided, for other objectives. The interval is the normal one, for accuracy with half
    an image more in each of the four cells (Agresti and Min, Statistics in Medicine 24, 2005). Luck is the expected
    highest of so many normal deviates (Blom 1958) times one model's share of the paired standard error
    (`paired_difference`). None holds the spread over seeds. None where the images are not the same.
    """
    if not (np.array_equal(first.ids, second.ids) and np.array_equal(first.labels, second.labels)):
        return None
    labels, one, two, classes = first.labels, first.answers, second.answers, len(first.classes)
    difference, error = paired_difference(objective, labels, one, two, classes)
    right, other_right = one == labels, two == labels
    only_first, only_second = int((right & ~other_right).sum()), int((other_right & ~right).sum())
    if objective == "val/accuracy":
        p, gained, images = mcnemar(only_first, only_second), only_first - only_second, len(labels) + 2
        middle, half = gained / images, Z95 * np.sqrt(only_first + only_second + 1 - gained**2 / images) / images
    else:  # swaps enough that ALPHA / trials can be told from less
        answers, swaps = ((one, two) if difference > 0 else (two, one)), max(SWAPS, int(4 * trials / ALPHA))
        p = min(1.0, 2 * swap_test(objective, labels, *answers, classes, swaps))
        middle, half = difference, Z95 * error
    from scipy.special import ndtri

    highest = float(ndtri((trials - 0.375) / (trials + 0.25))) if trials > 1 else 0.0
    return Lead(
        objective=objective,
        difference=difference,
        low=middle - half,
        high=middle + half,
        p=p,
        only_first=only_first,
        only_second=only_second,
        images=len(labels),
        luck=highest * error / np.sqrt(2),
        trials=trials,
    )


@dataclass(frozen=True, eq=False)
class Effects:
    """`table`: parameter, level, reference, n (trials with a score), pruned, effect, low, high; in units of the score."""

    table: pd.DataFrame
    explained: float  # share of the scores' variance in trials left out; 0 or less: nothing
    trials: int


def effects(frame: pd.DataFrame, base: pd.Series | None = None) -> Effects | None:
    """What each choice adds to the score, compared with the control's choice, or with the most frequent one where fewer
    than three of these trials have the control's. None where there are too few finished trials.

    A Bayesian linear model of all searched parameters on the finished trials of one study: effects are normal around 0,
    how wide is averaged over, by its marginal likelihood (Lindley and Smith 1972; ridge regression is its mode). A
    level is a value, or a third of a number's tried values. The interval is the 95 % one of the posterior. Trials are
    chosen by the search and not randomised one parameter at a time, and what two choices do together is left out: the
    numbers describe these trials, and the prior draws them towards 0. Levels of fewer than three trials are left out.
    `base` is the control, where it has none of these scores.
    """
    frame = frame.reset_index(drop=True)
    done, trials = finished(frame), trial_rows(frame)
    base = control(frame) if base is None else base
    names = [name for name in searched(frame) if done[name].nunique() > 1]
    if len(done) < MIN_TRIALS or not names or done["score"].nunique() < 2:
        return None
    levels = {name: _levels(trials[name]) for name in names}
    columns = [(name, level) for name in names for level in levels[name].dropna().unique()]
    columns = sorted(columns, key=lambda column: (names.index(column[0]), _order(trials, levels, column)))
    matrix = np.array([(levels[name][done.index] == level).to_numpy(float) for name, level in columns]).T
    posterior, counts = _posterior(matrix, done["score"].to_numpy(float)), matrix.sum(axis=0).astype(int)
    rows = []
    for name in names:
        of_name = [index for index, (parameter, _) in enumerate(columns) if parameter == name]
        reference, suffix = max(of_name, key=lambda index: counts[index]), " (the most frequent)"
        if base is not None and pd.notna(base[name]):
            own = levels[name][trials["run_id"] == base["run_id"]].iloc[0]
            if (name, own) in columns and counts[columns.index((name, own))] >= MIN_TRIALS_OF_LEVEL:
                reference, suffix = columns.index((name, own)), ""
        for index in of_name:
            if index != reference and counts[index] >= MIN_TRIALS_OF_LEVEL:
                level, (effect, error) = columns[index][1], posterior.difference(index, reference)
                pruned = int(((levels[name] == level) & (trials["state"] == State.PRUNED)).sum())
                compared = (name, level, columns[reference][1] + suffix, counts[index], pruned)
                rows.append((*compared, effect, effect - error, effect + error))
    heads = ["parameter", "level", "reference", "n", "pruned", "effect", "low", "high"]
    return Effects(pd.DataFrame(rows, columns=heads), posterior.explained, len(done)) if rows else None


def _levels(values: pd.Series) -> pd.Series:
    """Each value's level, as it is shown; None where the trial has no such parameter."""
    known = values.dropna()
    if known.nunique() > MAX_LEVELS and all(_is_number(value) for value in known):
        numbers = known.astype(float)
        thirds = pd.qcut(numbers, 3, labels=False, duplicates="drop")
        spans = {third: _span(part.min(), part.max()) for third, part in numbers.groupby(thirds)}
        return thirds.map(spans).reindex(values.index)
    return values.map(value_label, na_action="ignore")


def _span(low: float, high: float) -> str:
    return " to ".join(dict.fromkeys([value_label(low), value_label(high)]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.bool_))


def _order(trials: pd.DataFrame, levels: dict[str, pd.Series], column: tuple[str, str]) -> Any:
    """Numbers ascend, other values are in alphabetical order."""
    name, level = column
    first = trials[name][levels[name] == level].iloc[0]
    return (0, float(first), "") if _is_number(first) else (1, 0.0, str(first))


@dataclass(frozen=True, eq=False)
class _Posterior:
    mean: np.ndarray  # (P,), of the effects
    covariance: np.ndarray  # (P, P)
    explained: float  # share of the scores' variance that the mean explains in trials left out, one at a time

    def difference(self, one: int, two: int) -> tuple[float, float]:
        """Of two effects, and half its 95 % interval."""
        pair, signs = np.ix_([one, two], [one, two]), np.array([1, -1])
        return self.mean[one] - self.mean[two], Z95 * float(np.sqrt(signs @ self.covariance[pair] @ signs))


def _posterior(matrix: np.ndarray, score: np.ndarray) -> _Posterior:
    """Of the effects of a matrix (N, P) on (N,) scores, averaged over PENALTIES."""
    u, s, v = np.linalg.svd(matrix - matrix.mean(axis=0), full_matrices=False)
    target = score - score.mean()
    count, projected = len(score), u.T @ target
    likelihoods, means, covariances, left_out = [], [], [], []
    for penalty in PENALTIES:
        shrunk = s**2 / (s**2 + penalty)
        variance = float(target @ target - projected @ (shrunk * projected)) / (count - 1)
        likelihoods.append(-0.5 * ((count - 1) * np.log(variance) + np.log1p(s**2 / penalty).sum()))
        means.append(v.T @ (s / (s**2 + penalty) * projected))
        covariances.append(variance / penalty * (np.eye(matrix.shape[1]) - (v.T * shrunk) @ v))
        leverage = u**2 @ shrunk + 1 / count
        left_out.append((target - u @ (shrunk * projected)) / (1 - leverage).clip(1e-6))
    share = np.exp(np.array(likelihoods) - max(likelihoods))
    share /= share.sum()
    mean = share @ np.array(means)
    deviations = np.array(means) - mean
    covariance = np.einsum("k,kij->ij", share, np.array(covariances)) + (deviations.T * share) @ deviations
    errors, baseline = share @ np.array(left_out), target * count / (count - 1)  # of the mean of the others
    return _Posterior(mean, covariance, 1 - float(errors @ errors) / float(baseline @ baseline))


def importances(frame: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Columns parameter, importance (shares), chance: what 95 % of shuffles of the ranks stay below.

    One study's finished and pruned trials by their rank (PED-ANOVA asks for no more, `search.importances`). With few
    trials chance alone gives large shares, the larger the rarer a parameter is asked.
    """
    rows, names = ranked(frame), searched(frame)
    params = [
        {str(name): value for name, value in row.items() if pd.notna(value)} for row in rows[names].to_dict("records")
    ]
    scores = [-float(rank) for rank in rows["rank"]]
    importances_by = importance_function(params)
    shares = importances_by(scores)
    shuffled, rng = [], random.Random(seed)
    for _ in range(min(SHUFFLES, max(8, 20_000 // max(len(scores), 1))) if shares else 0):
        rng.shuffle(scores)
        shuffled.append(importances_by(scores))
    chance = pd.DataFrame(shuffled, columns=list(shares)).quantile(0.95)
    return pd.DataFrame(
        [(name, share, chance[name]) for name, share in shares.items()], columns=["parameter", "importance", "chance"]
    )


def _or_default(values: pd.Series) -> pd.Series:
    """A field's values; of runs that are older than the field what it adds nothing to, and a text where a kind has none."""
    return values.astype(object).where(values.notna(), LATER.get(str(values.name), ""))


def _overlap(runs: pd.DataFrame) -> float:
    """What trainings on folds share; runs that are older than folds have none."""
    return fold_overlap(int(runs["data.folds"].fillna(0).iloc[0]) if "data.folds" in runs else 0)


def pareto(cost: np.ndarray, score: np.ndarray) -> np.ndarray:
    """bool (N,): which are on the front, no other being as good at less cost, or better at no more."""
    front, best = np.zeros(len(cost), bool), -np.inf
    for index in np.lexsort((-score, cost)):
        if score[index] > best:
            front[index], best = True, score[index]
    return front


@dataclass(frozen=True)
class Repeats:
    """One recipe trained with fresh seeds."""

    run_id: str  # of one of them
    score: Sample
    seconds: float  # of training, mean of the runs


def finals(frame: pd.DataFrame) -> list[Repeats]:
    """The repeats of each recipe, those with most seeds first and of these the best mean.

    They differ by their seed, or by their fold, and maybe by how steps were executed.
    """
    runs = with_role(frame, "final").dropna(subset="score")
    own = ("training.seed", "data.fold", "training.execution")
    fields = [_or_default(runs[name]) for name in param_names(frame) if name not in own]
    groups = [group for _, group in runs.groupby(fields, sort=False)] if len(runs) else []
    repeats = [
        Repeats(
            group["run_id"].iloc[0],
            sample(list(group["score"]), overlap=_overlap(group)),
            float(group["seconds"].mean()),
        )
        for group in groups
    ]
    return sorted(repeats, key=lambda repeat: (-repeat.score.n, -repeat.score.mean))
