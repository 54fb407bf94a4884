"""What the noise allows to say about a study: its best trial beside the control, and each choice beside the control's."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation.significance import f1_macro_error, mcnemar
from pipeline.report.trials import Predictions, control, finished, param_names, ranked, searched, show
from pipeline.search.importances import importance_function

Z95 = 1.96
MOST_LEVELS = 4  # distinct numbers of a parameter that stay levels of their own; more are cut into thirds
FEWEST = 8  # finished trials from which effects are estimated
FEWEST_OF_LEVEL = 3
PENALTIES = np.logspace(-0.5, 2, 11)  # residual variance over that of the effects: effects of 0.1 to 1.8 residuals
SHUFFLES = 40


@dataclass(frozen=True)
class Lead:
    """How far one model is before another on the same images; differences in units of the score, in [-1, 1]."""

    difference: float
    low: float  # of the 95 % interval over images
    high: float
    only_first: int  # images that only the first has right
    only_second: int
    images: int
    luck: float  # what the best of `trials` equally good models would be ahead by chance
    trials: int

    @property
    def p(self) -> float:
        """That both are right equally often; exact McNemar test."""
        return mcnemar(self.only_first, self.only_second)

    @property
    def verdict(self) -> str:
        """What may be said, in a clause."""
        if self.low <= 0 <= self.high:
            return "within the noise of these images"
        if self.trials > 1 and 0 < self.difference <= self.luck:
            return "no more than the best of so many equally good trials would lead by luck"
        return "more than the noise of these images"


def lead(first: Predictions, second: Predictions, objective: str, trials: int = 1) -> Lead | None:
    """The first model's lead over the second, `trials` being how many the first is the best of.

    Paired: images that both have right or wrong say nothing. The interval is the normal one with the paired standard
    error (of macro-F1 by the delta method); luck is the expected highest of so many normal deviates (Blom 1958) times
    one model's share of that error. Neither holds the spread over seeds. None where the images are not the same.
    """
    if not (np.array_equal(first.ids, second.ids) and np.array_equal(first.labels, second.labels)):
        return None
    labels, one, two, classes = first.labels, first.answers, second.answers, len(first.classes)
    right, other = one == labels, two == labels
    if objective == "val/f1_macro":
        from pipeline.evaluation.scores import confusion_matrix, f1_macro_from

        scores = [f1_macro_from(confusion_matrix(labels, answers, classes)) for answers in (one, two)]
        difference, error = scores[0] - scores[1], f1_macro_error(labels, two, one, classes)
    else:
        moves = right.astype(float) - other
        difference, error = float(moves.mean()), float(moves.std() / np.sqrt(len(labels)))
    from scipy.special import ndtri

    highest = float(ndtri((trials - 0.375) / (trials + 0.25))) if trials > 1 else 0.0
    return Lead(
        difference=difference,
        low=difference - Z95 * error,
        high=difference + Z95 * error,
        only_first=int((right & ~other).sum()),
        only_second=int((other & ~right).sum()),
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


def effects(frame: pd.DataFrame) -> Effects | None:
    """What each choice adds to the score, beside the control's choice; None where there are too few finished trials.

    A Bayesian linear model of all searched parameters on the finished trials of one study: effects are normal around 0,
    how wide is averaged over, by its marginal likelihood (Lindley and Smith 1972; ridge regression is its mode). A
    level is a value, or a third of a number's tried values. The interval is the 95 % one of the posterior. Trials are
    chosen by the search and not randomised one parameter at a time, and what two choices do together is left out: the
    numbers describe these trials, and the prior draws them towards 0. Levels of fewer than three trials aren't told.
    """
    frame = frame.reset_index(drop=True)
    done, base = finished(frame), control(frame)
    names = [name for name in searched(frame) if done[name].nunique() > 1]
    if len(done) < FEWEST or not names or done["score"].nunique() < 2:
        return None
    trials = frame[frame["role"] == "trial"]
    levels = {name: _levels(trials[name]) for name in names}
    columns = [(name, level) for name in names for level in levels[name].dropna().unique()]
    columns = sorted(columns, key=lambda column: (names.index(column[0]), _order(trials, levels, column)))
    matrix = np.array([(levels[name][done.index] == level).to_numpy(float) for name, level in columns]).T
    score = done["score"].to_numpy(float)
    weights, covariance, explained = _posterior(matrix, score)
    rows = []
    for name in names:
        own = [index for index, (of, _) in enumerate(columns) if of == name]
        counts = {index: int(matrix[:, index].sum()) for index in own}
        reference = max(own, key=lambda index: counts[index])
        known = base is not None and pd.notna(base[name])
        if base is not None and known:
            reference = columns.index((name, levels[name].loc[base.name]))  # type: ignore[call-overload]
        for index in own:
            if index == reference or counts[index] < FEWEST_OF_LEVEL:
                continue
            effect = weights[index] - weights[reference]
            pair = np.ix_([index, reference], [index, reference])
            error = Z95 * float(np.sqrt(np.array([1, -1]) @ covariance[pair] @ np.array([1, -1])))
            level = columns[index][1]
            pruned = int(((levels[name] == level) & (trials["state"] == "pruned")).sum())
            beside = columns[reference][1] + ("" if known else " (the most frequent)")
            rows.append((name, level, beside, counts[index], pruned, effect, effect - error, effect + error))
    heads = ["parameter", "level", "reference", "n", "pruned", "effect", "low", "high"]
    return Effects(pd.DataFrame(rows, columns=heads), explained, len(done)) if rows else None


def _levels(values: pd.Series) -> pd.Series:
    """Each value's level, as it is shown; None where the trial has no such parameter."""
    known = values.dropna()
    if known.nunique() > MOST_LEVELS and all(_is_number(value) for value in known):
        numbers = known.astype(float)
        thirds = pd.qcut(numbers, 3, labels=False, duplicates="drop")
        spans = {third: _span(part.min(), part.max()) for third, part in numbers.groupby(thirds)}
        return thirds.map(spans).reindex(values.index)
    return values.map(show, na_action="ignore")


def _span(low: float, high: float) -> str:
    return show(low) if show(low) == show(high) else f"{show(low)} to {show(high)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.bool_))


def _order(trials: pd.DataFrame, levels: dict[str, pd.Series], column: tuple[str, str]) -> Any:
    """Numbers rise, words go by the alphabet."""
    name, level = column
    first = trials[name][levels[name] == level].iloc[0]
    return (0, float(first), "") if _is_number(first) else (1, 0.0, str(first))


def _posterior(matrix: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean (P,) and covariance (P, P) of the effects of a matrix (N, P), averaged over PENALTIES.

    And what share of the scores' variance the mean explains in trials left out of it, one at a time.
    """
    u, s, v = np.linalg.svd(matrix - matrix.mean(axis=0), full_matrices=False)
    target = score - score.mean()
    count, seen = len(score), u.T @ target
    likelihoods, means, covariances, left_out = [], [], [], []
    for penalty in PENALTIES:
        shrunk = s**2 / (s**2 + penalty)
        variance = float(target @ target - seen @ (shrunk * seen)) / (count - 1)
        likelihoods.append(-0.5 * ((count - 1) * np.log(variance) + np.log1p(s**2 / penalty).sum()))
        means.append(v.T @ (s / (s**2 + penalty) * seen))
        covariances.append(variance / penalty * (np.eye(matrix.shape[1]) - (v.T * shrunk) @ v))
        leverage = u**2 @ shrunk + 1 / count
        left_out.append((target - u @ (shrunk * seen)) / (1 - leverage).clip(1e-6))
    share = np.exp(np.array(likelihoods) - max(likelihoods))
    share /= share.sum()
    mean = share @ np.array(means)
    off = np.array(means) - mean
    covariance = np.einsum("k,kij->ij", share, np.array(covariances)) + (off.T * share) @ off
    errors, alone = share @ np.array(left_out), target * count / (count - 1)  # the mean of the others, as a forecast
    return mean, covariance, 1 - float(errors @ errors) / float(alone @ alone)


def importances(frame: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Columns parameter, importance (shares), chance: what 95 % of shuffles of the ranks stay below.

    One study's finished and pruned trials by their rank (PED-ANOVA asks for no more, `search.importances`). With few
    trials chance alone gives large shares, the larger the rarer a parameter is asked.
    """
    done = ranked(frame)
    names = searched(frame)
    rows = [
        {str(name): value for name, value in row.items() if pd.notna(value)} for row in done[names].to_dict("records")
    ]
    scores = [-float(rank) for rank in done["rank"]]
    importances_by = importance_function(rows)
    found = importances_by(scores)
    shuffled, dice = [], random.Random(seed)
    for _ in range(min(SHUFFLES, max(8, 20_000 // max(len(scores), 1))) if found else 0):
        dice.shuffle(scores)
        shuffled.append(importances_by(scores))
    chance = pd.DataFrame(shuffled, columns=list(found)).quantile(0.95)
    return pd.DataFrame(
        [(name, share, chance[name]) for name, share in found.items()], columns=["parameter", "importance", "chance"]
    )


def pareto(cost: np.ndarray, score: np.ndarray) -> np.ndarray:
    """bool (N,): which are not beaten, no other being as good at less cost, or better at no more."""
    front, best = np.zeros(len(cost), bool), -np.inf
    for index in np.lexsort((-score, cost)):
        if score[index] > best:
            front[index], best = True, score[index]
    return front


def finals(frame: pd.DataFrame) -> pd.DataFrame:
    """The repeats with fresh seeds, a row per recipe: name, n, mean, deviation, low, high (95 %, Student's t), seconds.

    Best mean first; empty where there are none. Repeats of one recipe differ in nothing but `training.seed`.
    """
    from scipy.special import stdtrit

    runs = frame[(frame["role"] == "final") & frame["score"].notna()]
    names = [name for name in param_names(frame) if name != "training.seed"]
    rows = []
    for _, group in runs.groupby([runs[name].map(str) for name in names]) if len(runs) else []:
        scores, first = group["score"], group.iloc[0]
        spread = float(scores.std())  # NaN of one
        half = float(stdtrit(len(group) - 1, 0.975)) * spread / np.sqrt(len(group)) if len(group) > 1 else np.nan
        mean = float(scores.mean())
        rows.append((first["run_id"], len(group), mean, spread, mean - half, mean + half, group["seconds"].mean()))
    found = pd.DataFrame(rows, columns=["run_id", "n", "mean", "deviation", "low", "high", "seconds"])
    return found.sort_values("mean", ascending=False, kind="stable", ignore_index=True)
