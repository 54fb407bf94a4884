"""May this model replace the champion? Evidence in, verdict out: nothing is read and nothing is stored here.

Both models are compared image by image on one test split, because what counts is where they disagree. A challenger has to
be *shown* to be better; on what it must not lose (a class, calibration) it has to be *shown* to be worse before it is
refused, and by more than a margin: with 10 classes and as many tests, noise alone would refuse nearly everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import Problem, UserError, did_you_mean, validation_problems
from pipeline.evaluation.scores import BINS

DRAWS = 2000  # of the bootstrap: the 5 % point of an interval is then good to a twentieth of its width
MIN_SEEDS = 3  # trainings of one recipe, below which their spread says too little
_CHUNK = 200  # draws at a time, which bounds the memory


class Rules(BaseModel):
    """Every rule's margin. A point is a hundredth: 0.90 -> 0.91 is one point of accuracy."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    alpha: float = Field(0.05, gt=0, lt=0.5, description="the chance that a model which isn't better is promoted")
    least_gain: float = Field(
        0.0, ge=0, le=100, description="points of accuracy that the gain's interval must be above"
    )
    seed_spread: float = Field(
        10.0,
        ge=0,
        le=100,
        description="standard deviation of accuracy between seeds, as % of the error rate, if fewer than 3 were trained",
    )
    class_margin: float = Field(2.0, ge=0, le=100, description="points of F1 or recall that a class may lose")
    ece_margin: float = Field(1.0, ge=0, le=100, description="points by which the calibration error may grow")
    latency_factor: float = Field(2.0, gt=0, description="times the champion's latency that it may take")
    size_factor: float = Field(4.0, gt=0, description="times the champion's bytes that it may have")

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
                rule = f"should be NAME=VALUE, of {known}{did_you_mean(name, values)}"
                problems.append(Problem(f"`--rules` {assignment}", rule))
        try:
            rules = Rules.model_validate(values)
        except ValidationError as error:
            problems += [Problem(f"`--rules` {p.subject}", p.rule, p.remedy) for p in validation_problems(error)]
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
    seed_accuracies: Sequence[float] = ()  # of trainings that differ from the challenger by their seed at most
    opponent_name: str = "champion"


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
    images: int  # of the test split
    correct: Mapping[str, int]  # by run: images that it has right
    onnx_sha256: str  # of the challenger's model that was evaluated
    predictions_sha256: Mapping[str, str]  # by run, of the stored predictions


def decide(evidence: Evidence, rules: Rules) -> Verdict:
    """Compare the challenger with its opponent; without one it only has to be better than naming the largest class."""
    challenger, opponent, labels = evidence.challenger, evidence.opponent, evidence.labels
    classes, name = evidence.classes, evidence.opponent_name
    new = challenger.probabilities.argmax(1)
    if opponent is None:
        largest = np.full_like(labels, np.bincount(labels).argmax())
        return Verdict(results=(_better(labels, new, largest, rules, "the constant answer"),))
    old = opponent.probabilities.argmax(1)
    drawn = _resampled(np.concatenate([_columns(m, labels, len(classes)) for m in (opponent, challenger)], axis=1))
    half = drawn.shape[1] // 2
    before, after = (_scores(sums, len(classes)) for sums in (drawn[:, :half], drawn[:, half:]))
    change = {score: after[score] - before[score] for score in after}  # (1 + draws, ...) with the split itself first
    return Verdict(
        results=(
            _better(labels, new, old, rules, f"the {name}"),
            _gain(change["accuracy"][:, 0], rules),
            _beyond_seeds(labels, new, old, rules, evidence.seed_accuracies),
            _no_class_worse("F1", change["f1"], classes, rules),
            _no_class_worse("recall", change["recall"], classes, rules),
            _calibrated(change["ece"][:, 0], rules),
            _within("latency", challenger.latency_ms, opponent.latency_ms, rules.latency_factor, "ms, one image", name),
            _within("size", challenger.bytes / 2**20, opponent.bytes / 2**20, rules.size_factor, "MiB", name),
        )
    )


# ------------------------------------------------------------------------------------------------------ to be better


def _better(labels: np.ndarray, new: np.ndarray, old: np.ndarray, rules: Rules, other: str) -> RuleResult:
    """The exact test of McNemar 1947, one-sided."""
    gained, lost = _disagreements(labels, new, old)
    p = mcnemar_one_sided(gained, lost)
    reason = (
        f"exact McNemar test, one-sided: only the challenger is right on {gained:,} images, only {other} on {lost:,}"
    )
    return _result("better", f"p = {p:.4f}", f"at most {rules.alpha:g}", p <= rules.alpha, reason)


def mcnemar_one_sided(gained: int, lost: int) -> float:
    """p-value that the challenger is right at most as often as the champion, the exact binomial form; 1 without any."""
    from scipy.special import bdtrc

    return float(bdtrc(gained - 1, gained + lost, 0.5)) if gained else 1.0


def _gain(draws: np.ndarray, rules: Rules) -> RuleResult:
    """Percentile bootstrap over images, paired (Efron 1979); both ends hold with 1 - alpha each."""
    low, high = 100 * np.quantile(draws[1:], [rules.alpha, 1 - rules.alpha])
    level = f"{100 * (1 - 2 * rules.alpha):g} % interval {low:+.2f} to {high:+.2f}"
    number = f"{100 * draws[0]:+.2f} points of accuracy"
    threshold = f"above {rules.least_gain:g} with its whole interval"
    return _result("gain", number, threshold, bool(low > rules.least_gain), f"paired bootstrap over images, {level}")


def _beyond_seeds(
    labels: np.ndarray, new: np.ndarray, old: np.ndarray, rules: Rules, seed_accuracies: Sequence[float]
) -> RuleResult:
    """The gain against what another seed of either recipe could have made, with the images' own chance.

    McNemar's test knows only the images: two seeds of one small network do differ, so that it called the luckier one
    better in 22 % of the comparisons at a level of 5 % (CIFAR-10, 51 % accuracy, 14 seeds).
    """
    from scipy.special import ndtri, stdtrit

    right, was_right = labels == new, labels == old
    change = right.astype(float) - was_right
    images = change.std() / np.sqrt(len(labels))
    seeds = len(seed_accuracies)
    if seeds >= MIN_SEEDS:  # Student's quantile: a spread that is measured on a few seeds is itself uncertain
        spread, quantile = float(np.std(seed_accuracies, ddof=1)), stdtrit(seeds - 1, 1 - rules.alpha)
        source = f"measured on {seeds}"
    else:
        spread, quantile = rules.seed_spread / 100 * float(1 - was_right.mean()), ndtri(1 - rules.alpha)
        source = f"assumed, {rules.seed_spread:g} % of the error rate: `finals` measures it"
    limit = float(quantile * np.sqrt(images**2 + 2 * spread**2))
    reason = f"chance of the images and of the seeds, whose standard deviation is {100 * spread:.2f} points ({source})"
    gain = float(change.mean())
    number, threshold = f"{100 * gain:+.2f} points of accuracy", f"above {100 * limit:.2f}"
    return _result("beyond seeds", number, threshold, gain > limit, reason)


def _disagreements(labels: np.ndarray, new: np.ndarray, old: np.ndarray) -> tuple[int, int]:
    """Images that only the new one has right, and only the old one."""
    right, was_right = labels == new, labels == old
    return int((right & ~was_right).sum()), int((was_right & ~right).sum())


# --------------------------------------------------------------------------------------------------- not to be worse


def _no_class_worse(score: str, draws: np.ndarray, classes: Sequence[str], rules: Rules) -> RuleResult:
    """Fails for a class that loses more than the margin, and more than chance explains.

    Chance: the bootstrap's standard error times the quantile of alpha shared among all classes and both scores
    (Bonferroni), so that equal models are refused in at most alpha of the cases.
    """
    from scipy.special import ndtri

    lost, error = -100 * draws[0], 100 * draws[1:].std(axis=0)
    chance = float(ndtri(1 - rules.alpha / (2 * len(classes)))) * error
    worse = [i for i in np.argsort(-lost) if lost[i] > max(rules.class_margin, chance[i])]
    shown = worse or [int(lost.argmax())]
    named = ", ".join(f"{classes[i]} {-lost[i]:+.1f} (chance: {chance[i]:.1f})" for i in shown[:5])
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    threshold = f"above -{rules.class_margin:g}, or within chance"
    reason = f"the worst of {len(classes)} classes: {named}{more}"
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


# --------------------------------------------------------------------------------------------------------- bootstrap


def _columns(model: ModelEvidence, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """float32 (N, 3 C + BINS): what each image adds to its class's images, hits, predictions, and to its bin's gap.

    Every score is made of such sums, so that a draw of images is a product with their counts.
    """
    predicted, confidence = model.probabilities.argmax(1), model.probabilities.max(1)
    right = predicted == labels
    rows = np.arange(len(labels))
    columns = np.zeros((len(labels), 3 * num_classes + BINS), dtype=np.float32)
    columns[rows, labels] = 1
    columns[rows, num_classes + labels] = right
    columns[rows, 2 * num_classes + predicted] = 1
    bins = np.digitize(confidence, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
    columns[rows, 3 * num_classes + bins] = right - confidence
    return columns


def _resampled(columns: np.ndarray) -> np.ndarray:
    """float64 (1 + DRAWS, K): the columns' sums over all images, then over images drawn with replacement (seed 0)."""
    size = len(columns)
    random = np.random.default_rng(0)
    sums = [columns.sum(axis=0, dtype=np.float64)[None]]
    for _ in range(DRAWS // _CHUNK):
        drawn = [np.bincount(random.integers(size, size=size), minlength=size) for _ in range(_CHUNK)]
        sums.append((np.stack(drawn).astype(np.float32) @ columns).astype(np.float64))
    return np.concatenate(sums)


def _scores(sums: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Accuracy and ECE (D, 1), F1 and recall (D, C) in [0, 1], from D rows of sums; 0 where a class has no images."""
    true, hits, predicted = (sums[:, i * num_classes : (i + 1) * num_classes] for i in range(3))
    images = true.sum(axis=1, keepdims=True)
    return {
        "accuracy": hits.sum(axis=1, keepdims=True) / images,
        "f1": 2 * hits / np.maximum(true + predicted, 1),
        "recall": hits / np.maximum(true, 1),
        "ece": np.abs(sums[:, 3 * num_classes :]).sum(axis=1, keepdims=True) / images,
    }
