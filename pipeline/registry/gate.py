"""May this model replace the champion? Evidence in, verdict out: nothing is read and nothing is stored here.

Both models are compared image by image on one test split, because what counts is where they disagree. A challenger has to
be *shown* to be better; on what it must not lose (a class, calibration) it has to be *shown* to be worse before it is
refused, and by more than a margin: with 10 classes and as many tests, noise alone would refuse nearly everything. Only of
one that costs less may a person say what it may lose (`may_lose`): then it has to be shown to lose no more than that.
Better is what the challenger's study maximised, its objective: accuracy, balanced accuracy or macro-F1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import Problem, UserError, did_you_mean, first_names, validation_problems
from pipeline.evaluation.resampling import image_columns, image_counts, resampled, scores_from, swap_errors, swap_test
from pipeline.evaluation.scores import SCORE_NAMES
from pipeline.evaluation.significance import mcnemar_one_sided, paired_difference

MIN_SEEDS = 3  # trainings of one recipe, below which their spread says too little
ACCURACY = "val/accuracy"


class Rules(BaseModel):
    """Every rule's margin. A point is a hundredth: 0.90 -> 0.91 is one point of accuracy."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    alpha: float = Field(
        0.05, gt=0, lt=0.5, description="the chance that one model which isn't better, or loses may_lose, is promoted"
    )
    least_gain: float = Field(
        0.0, ge=0, le=100, description="points of the objective that the gain's interval must be above"
    )
    may_lose: float = Field(
        0.0,
        ge=0,
        le=100,
        description="points of the objective that a model may lose which costs less: it need not be better then; for a "
        "latency_factor or size_factor below 1",
    )
    seed_spread: float = Field(
        10.0,
        ge=0,
        le=100,
        description="standard deviation of the objective between seeds, as % of the error rate, if fewer than 3 were trained",
    )
    class_margin: float = Field(2.0, ge=0, le=100, description="points of F1 or recall that a class may lose")
    ece_margin: float = Field(1.0, ge=0, le=100, description="points by which the calibration error may grow")
    latency_factor: float = Field(2.0, gt=0, description="times the champion's latency that it may take")
    size_factor: float = Field(4.0, gt=0, description="times the champion's bytes that it may have")

    @model_validator(mode="after")
    def _a_loss_buys_something(self) -> Self:
        if self.may_lose and self.least_gain:
            raise ValueError(f"may_lose = {self.may_lose:g} and least_gain = {self.least_gain:g} exclude each other")
        if self.may_lose and min(self.latency_factor, self.size_factor) >= 1:
            raise ValueError(
                f"may_lose = {self.may_lose:g} is for a model that costs less: latency_factor or size_factor should be "
                f"below 1, as in `--rules 'may_lose={self.may_lose:g} size_factor=0.8'`"
            )
        return self

    def changed(self, assignments: Sequence[str]) -> "Rules":
        """These with `NAME=VALUE` applied (several in a text, between spaces); UserError with all problems."""
        values: dict[str, Any] = self.model_dump()
        problems = []
        for assignment in " ".join(assignments).split():
            name, equals, value = assignment.partition("=")
            if name in values and equals:
                values[name] = value
            else:
                known = ", ".join(values)
                hint = "" if name in values else did_you_mean(name, values)
                rule = f"should be NAME=VALUE, of {known}{hint}"
                problems.append(Problem(f"`--rules` {assignment}", rule))
        try:
            rules = Rules.model_validate(values)
        except ValidationError as error:
            problems += [
                Problem(f"`--rules` {p.subject}".strip(), p.rule, p.remedy) for p in validation_problems(error)
            ]
        if problems:
            raise UserError.many(problems)
        return rules


@dataclass(frozen=True, eq=False)
class ModelEvidence:
    """What is known of one of the two models: its probabilities float (N, C) on the images, and what it costs."""

    probabilities: np.ndarray
    latency_ms: float
    bytes: int


@dataclass(frozen=True, eq=False)
class Evidence:
    """Two models on the same N images of the test split, or one where there is no other."""

    challenger: ModelEvidence
    opponent: ModelEvidence | None
    labels: np.ndarray  # int (N,)
    classes: Sequence[str]
    seed_scores: Sequence[float] = ()  # of trainings that differ from the challenger by their seed at most
    opponent_name: str = "champion"
    objective: str = ACCURACY  # of the challenger's study
    competing: int = 1  # trials of one seed, this one included, of which the challenger is the best

    @property
    def scores(self) -> list[float]:
        """The objective's score of the challenger, and of the opponent where there is one."""
        sides, count = filter(None, (self.challenger, self.opponent)), len(self.classes)
        sums = (
            image_counts(self.labels, side.probabilities.argmax(1), count).sum(axis=0, dtype=np.float64)
            for side in sides
        )
        return [float(scores_from(of[None], count)[self.objective][0, 0]) for of in sums]


class RuleResult(BaseModel):
    """One rule's result: the number, the threshold that it was compared with, and a sentence on where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: str
    number: str
    threshold: str
    passed: bool
    reason: str

    @property
    def problem(self) -> Problem:
        """The result of a rule that says no, as an error shows it."""
        return Problem(self.rule, f"{self.number}, should be {self.threshold}; {self.reason}")


class Verdict(BaseModel):
    """Whether the challenger may be promoted, and each rule's part in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    results: tuple[RuleResult, ...]

    @property
    def passed(self) -> bool:
        """Every rule says yes."""
        return all(result.passed for result in self.results)

    @property
    def problems(self) -> list[Problem]:
        """One for each rule that says no."""
        return [result.problem for result in self.results if not result.passed]


class GateRecord(BaseModel):
    """A verdict with what it rests on, as the ledger, the run and the packaged model keep it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    opponent: str  # champion, control or constant answer
    opponent_run: str | None
    verdict: Verdict
    rules: Rules
    recipe_digest: str
    objective: str = ACCURACY  # by which the two were compared
    scores: Mapping[str, float] = {}  # by run, of the objective; empty in records that are older than the field
    # On this test split, this one included; records that are older than the field have the number of compared models.
    comparison: int = Field(1, validation_alias=AliasChoices("comparison", "models"))
    caution: str = ""  # that the opponent may have seen images of the test split
    images: int  # of the test split
    correct: Mapping[str, int]  # by run: images that it has right
    onnx_sha256: str  # of the challenger's model that was evaluated
    predictions_sha256: Mapping[str, str]  # by run, of the stored predictions

    @property
    def terms(self) -> str:
        """As what it was compared, to follow the opponent's name, where it need not be better; else empty."""
        if not (self.rules.may_lose and self.opponent_run):
            return ""
        points = f"{self.rules.may_lose:g} point{'s' * (self.rules.may_lose != 1)}"
        return f", as a cheaper model that may lose {points} of {SCORE_NAMES[self.objective]}"


def decide(evidence: Evidence, rules: Rules) -> Verdict:
    """Compare the challenger with its opponent; without one it has to be better than naming the largest class, no more."""
    challenger, opponent, labels = evidence.challenger, evidence.opponent, evidence.labels
    classes, name, objective = evidence.classes, evidence.opponent_name, evidence.objective
    new = challenger.probabilities.argmax(1)
    if opponent is None:
        largest = np.full_like(labels, np.bincount(labels).argmax())
        return Verdict(results=(_better(evidence, new, largest, rules, "the constant answer"),))
    old = opponent.probabilities.argmax(1)
    drawn = resampled(
        np.concatenate([image_columns(m.probabilities, labels, len(classes)) for m in (opponent, challenger)], axis=1)
    )
    half = drawn.shape[1] // 2
    before, after = (scores_from(sums, len(classes)) for sums in (drawn[:, :half], drawn[:, half:]))
    change = {score: after[score] - before[score] for score in after}  # (1 + draws, ...) with the split itself first
    errors = swap_errors(labels, new, old, len(classes))
    chance = _chance(evidence, new, old, rules, 1 - float(before[objective][0, 0]))
    if rules.may_lose:
        compared = [_not_worse(evidence, chance, rules)]
    else:
        compared = [
            _better(evidence, new, old, rules, f"the {name}"),
            _gain(change[objective][:, 0], rules, SCORE_NAMES[objective]),
            _beyond_seeds(evidence, chance),
        ]
    return Verdict(
        results=(
            *compared,
            _no_class_worse("F1", change["f1"][0], errors["f1"], classes, rules),
            _no_class_worse("recall", change["recall"][0], errors["recall"], classes, rules),
            _calibrated(change["ece"][:, 0], rules),
            _within("latency", challenger.latency_ms, opponent.latency_ms, rules.latency_factor, "ms, one image", name),
            _within("size", challenger.bytes / 2**20, opponent.bytes / 2**20, rules.size_factor, "MiB", name),
        )
    )


# ------------------------------------------------------------------------------------------------------ to be better


def _better(evidence: Evidence, new: np.ndarray, old: np.ndarray, rules: Rules, other: str) -> RuleResult:
    """One-sided: of accuracy the exact test of McNemar 1947, of other objectives `swap_test`."""
    labels, objective = evidence.labels, evidence.objective
    right, was_right = labels == new, labels == old
    gained, lost = int((right & ~was_right).sum()), int((was_right & ~right).sum())
    if objective == ACCURACY:
        p, how = mcnemar_one_sided(gained, lost), "exact McNemar test"
    else:
        p, how = swap_test(objective, labels, new, old, len(evidence.classes)), "paired permutation test of "
        how += SCORE_NAMES[objective]
    reason = f"{how}, one-sided: only the challenger is right on {gained:,} images, only {other} on {lost:,}"
    return _result("better", f"p = {p:.3g}", f"at most {rules.alpha:g}", p <= rules.alpha, reason)


def _gain(draws: np.ndarray, rules: Rules, score: str) -> RuleResult:
    """Percentile bootstrap over images, paired (Efron 1979); both ends hold with 1 - alpha each."""
    low, high = 100 * np.quantile(draws[1:], [rules.alpha, 1 - rules.alpha])
    level = f"{100 * (1 - 2 * rules.alpha):g} % interval {low:+.2f} to {high:+.2f}"
    number = f"{100 * draws[0]:+.2f} points of {score}"
    threshold = f"above {rules.least_gain:g} with its whole interval"
    return _result("gain", number, threshold, bool(low > rules.least_gain), f"paired bootstrap over images, {level}")


@dataclass(frozen=True)
class _Chance:
    """The gain in the objective, and what could have made it, all in [0, 1]."""

    gain: float
    images: float  # standard error
    seeds: float  # standard deviation of a training
    quantile: float
    reason: str

    def limit(self, least_error: float = 0.0) -> float:
        """What chance exceeds with alpha; the images' standard error is at least `least_error`."""
        return float(self.quantile * np.hypot(max(self.images, least_error), np.sqrt(2) * self.seeds))


def _chance(evidence: Evidence, new: np.ndarray, old: np.ndarray, rules: Rules, error_rate: float) -> _Chance:
    """The gain against what another seed of either recipe could have made, with the images' own chance.

    McNemar's test knows only the images: two seeds of one small network do differ, so that it called the luckier one
    better in 22 % of the comparisons at a level of 5 % (CIFAR-10, 51 % accuracy, 14 seeds). `error_rate` is what the
    opponent's score is below 1. The best of several trials is the luckiest of them, too: alpha is divided among them.
    """
    from scipy.special import ndtri, stdtrit

    gain, images = paired_difference(evidence.objective, evidence.labels, new, old, len(evidence.classes))
    seeds, alpha = len(evidence.seed_scores), rules.alpha / evidence.competing
    if seeds >= MIN_SEEDS:  # Student's quantile: a spread that is measured on a few seeds is itself uncertain
        spread, quantile = float(np.std(evidence.seed_scores, ddof=1)), stdtrit(seeds - 1, 1 - alpha)
        source = f"measured on {seeds}"
    else:
        spread, quantile = rules.seed_spread / 100 * error_rate, ndtri(1 - alpha)
        source = f"assumed, {rules.seed_spread:g} % of the error rate: `finals` over seeds measures it"
    reason = f"chance of the images and of the seeds, whose standard deviation is {100 * spread:.2f} points ({source})"
    if evidence.competing > 1:
        reason += f"; the best of {evidence.competing} trials, so alpha is {alpha:.2g}"
    return _Chance(gain, images, spread, float(quantile), reason)


def _beyond_seeds(evidence: Evidence, chance: _Chance) -> RuleResult:
    limit = chance.limit()
    number = f"{100 * chance.gain:+.2f} points of {SCORE_NAMES[evidence.objective]}"
    return _result("beyond seeds", number, f"above {100 * limit:.2f}", chance.gain > limit, chance.reason)


# --------------------------------------------------------------------------------------------------- not to be worse


def _not_worse(evidence: Evidence, chance: _Chance, rules: Rules) -> RuleResult:
    """Non-inferiority, one-sided (Wellek 2010; Piaggio et al. 2012, JAMA 308): the gain exceeds -may_lose beyond chance.

    Where few images differ, their own spread says too little: on 40 images, a model that loses 2 points would pass in up
    to 45 % of the cases. So the error is at least that of a loss of may_lose, in each class or all of it in the smallest,
    and no gain, and an image is added. Then at most alpha of them pass (see the tests).
    """
    most = rules.may_lose / 100
    _, of_classes = np.unique(evidence.labels, return_counts=True)
    images = np.array([len(evidence.labels)]) if evidence.objective == ACCURACY else of_classes
    lost = min(len(images) * most, 0.5)  # of the smallest class, if all is lost there; at half, chance is largest
    variance = max((most * (1 - most) / images).sum(), lost * (1 - lost) / images.min())
    limit = chance.limit(float(np.sqrt(variance)) / len(images)) + 1 / (len(images) * images.min())
    number = f"{100 * chance.gain:+.2f} points of {SCORE_NAMES[evidence.objective]}"
    threshold = f"above {100 * (limit - most):+.2f}: -{rules.may_lose:g} and {100 * limit:.2f} for chance"
    return _result("not worse", number, threshold, chance.gain > limit - most, chance.reason)


def _no_class_worse(
    score: str, change: np.ndarray, errors: np.ndarray, classes: Sequence[str], rules: Rules
) -> RuleResult:
    """Fails for a class that loses more than the margin, and more than chance explains.

    Chance: what equally good models differ by (`swap_errors`) times the quantile of alpha shared among all classes and
    both scores (Bonferroni), so that equal models are refused in at most alpha of the cases.
    """
    from scipy.special import ndtri

    lost = -100 * change
    chance = float(ndtri(1 - rules.alpha / (2 * len(classes)))) * 100 * errors
    worse = [i for i in np.argsort(-lost) if lost[i] > max(rules.class_margin, chance[i])]
    shown = worse or [int(lost.argmax())]
    named = first_names([f"{classes[i]} {-lost[i]:+.1f} (chance: {chance[i]:.1f})" for i in shown], 5)
    threshold = f"above -{rules.class_margin:g}, or within chance"
    reason = f"the worst of {len(classes)} classes: {named}"
    return _result(f"{score} by class", f"{-lost[shown[0]]:+.1f} points", threshold, not worse, reason)


def _calibrated(draws: np.ndarray, rules: Rules) -> RuleResult:
    """Expected calibration error after temperature scaling; as with the classes, beyond the margin and beyond chance."""
    from scipy.special import ndtri

    grown = 100 * float(draws[0])
    chance = 100 * float(ndtri(1 - rules.alpha) * draws[1:].std())
    reason = f"expected calibration error after temperature scaling (chance: {chance:.2f})"
    threshold = f"at most +{rules.ece_margin:g}, or within chance"
    return _result("calibration", f"{grown:+.2f} points", threshold, grown <= max(rules.ece_margin, chance), reason)


def _within(rule: str, cost: float, opponents: float, factor: float, unit: str, name: str) -> RuleResult:
    reason = f"{cost:.3g} against the {name}'s {opponents:.3g} {unit}"
    ratio = f"{cost / opponents:.2f} times"
    return _result(rule, ratio, f"at most {factor:g} times", cost <= factor * opponents, reason)


def _result(rule: str, number: str, threshold: str, passed: bool, reason: str) -> RuleResult:
    return RuleResult(rule=rule, number=number, threshold=threshold, passed=bool(passed), reason=reason)
