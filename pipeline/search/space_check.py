"""The search space of a `space(trial)` function, explored and checked before anything runs."""

import json
import math
import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from pipeline.errors import NO_SUCH_FIELD, Problem, UserError
from pipeline.recipe import KIND, Recipe
from pipeline.search.optuna_internals import contains
from pipeline.sections.data import FORM_FIELDS, SAMPLER_FIELDS

Space = Callable[[Any], None]
NUM_COMBINATIONS = 64  # at random, of ends only, and as many of all values
PACKAGE = Path(__file__).resolve().parents[1]


def field_of(parameter: str) -> str:
    """The recipe field that a parameter sets: its name, up to an `@`.

    `optimizer.lr@sgd` and `optimizer.lr@adamw` both set `optimizer.lr`, with ranges and a history of their own: what is
    learnt of one says nothing of the other.
    """
    return parameter.partition("@")[0]


class ScriptedTrial:
    """Gives the values of `answers`, or else of `choose(name, distribution)`, and records all parameters.

    An invalid range raises nothing: `problems` collects them, so that all are reported at once.
    """

    def __init__(self, answers: Mapping[str, Any], choose: Callable[[str, BaseDistribution], Any]):
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}
        self.problems: list[Problem] = []
        self._answers = answers
        self._choose = choose

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """As optuna.Trial.suggest_float."""
        return self._ask(name, low, lambda: FloatDistribution(low, high, log, step))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """As optuna.Trial.suggest_int."""
        return self._ask(name, low, lambda: IntDistribution(low, high, log, step))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """As optuna.Trial.suggest_categorical."""
        return self._ask(name, choices[0] if choices else None, lambda: CategoricalDistribution(choices))

    def _ask(self, name: str, fallback: Any, make: Callable[[], BaseDistribution]) -> Any:
        try:
            distribution = make()
        except ValueError as error:
            self.problems.append(Problem(name, str(error).splitlines()[0]))
            self.params[name] = fallback
            return fallback
        self.distributions[name] = distribution
        self.params[name] = self._answers[name] if name in self._answers else self._choose(name, distribution)
        return self.params[name]


class FixedFields:
    """A trial as a space sees it, with some fields given: the trial is never asked for those.

    Nor for fields for which `is_void(name)`, as no trial of the study can have such a field; they get the base recipe's
    value, or the lowest, and their names are in `voided`.
    """

    def __init__(self, trial: Any, given: Mapping[str, Any], is_void: Callable[[str], bool], base: Recipe):
        self._trial, self._given, self._is_void = trial, given, is_void
        flat = base.flat()
        self._void_trial = ScriptedTrial({}, lambda name, range_: flat.get(field_of(name), lowest(name, range_)))

    @property
    def voided(self) -> list[str]:
        """In the order in which the space asked."""
        return list(dict.fromkeys(map(field_of, self._void_trial.params)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """As optuna.Trial's; a choice may also be a list, as `model.widths` has."""
        return from_choice(self.__getattr__("suggest_categorical")(name, [to_choice(choice) for choice in choices]))

    def __getattr__(self, attribute: str) -> Any:
        if not attribute.startswith("suggest_"):
            return getattr(self._trial, attribute)

        def suggest(name: str, *arguments: Any, **options: Any) -> Any:
            if field_of(name) in self._given:
                return self._given[field_of(name)]
            trial = self._void_trial if self._is_void(field_of(name)) else self._trial
            return getattr(trial, attribute)(name, *arguments, **options)

        return suggest


def to_choice(value: Any) -> Any:
    """A list as its JSON text, what else a recipe holds as it is: Optuna stores plain values only."""
    return json.dumps(value) if isinstance(value, (list, tuple)) else value


def from_choice(value: Any) -> Any:
    """What `to_choice` was given."""
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value


def explore(space: Space, recipe: Callable[[Mapping[str, Any]], Recipe]) -> dict[str, BaseDistribution]:
    """Every parameter that the space can ask for, with its range; for all tried values `recipe(params)` is called.

    Each value that may open a branch (all choices, both ends of a range) is tried once, together with the values that led
    to its parameter; so a parameter is found however deep it lies behind choices. Then all upper ends, and random values,
    ends only and others too, look for ranges that are valid one by one and not in combination, and for branches that open
    within a range: a narrow one may be missed. Raises UserError with all problems.
    """
    distributions: dict[str, BaseDistribution] = {}
    problems: dict[Problem, None] = {}  # ordered, each once

    def try_out(*queue: ScriptedTrial) -> None:
        """These, and each value that may open a branch of all parameters that they are the first to ask for."""
        trials = list(queue)
        while trials:
            trial = _ask(space, trials.pop(0), recipe, problems)
            for name, distribution in trial.distributions.items():
                if name not in distributions:
                    distributions[name] = distribution
                    trials += [ScriptedTrial(trial.params | {name: value}, lowest) for value in extremes(distribution)]
                elif distributions[name] != distribution:
                    ranges = f"{describe(distributions[name])} and {describe(distribution)}"
                    problems[Problem(name, f"asked with two ranges, {ranges}")] = None

    try_out(ScriptedTrial({}, lowest))
    if not problems:
        rng = random.Random(0)
        ends = [ScriptedTrial({}, lambda name, d: rng.choice(extremes(d))) for _ in range(NUM_COMBINATIONS)]
        try_out(ScriptedTrial({}, lambda name, d: extremes(d)[-1]), *ends)
        for _ in range(NUM_COMBINATIONS):
            if not problems:  # each would have another value in its message
                try_out(ScriptedTrial({}, lambda name, d: random_value(d, rng)))
    if problems:
        raise UserError.many(list(problems))
    return distributions


def control(space: Space, base: Recipe, original: Recipe | None = None) -> dict[str, Any]:
    """The parameters with which the space gives the base recipe itself; UserError where it can't.

    `base` was made from the `original` by settings. Where they changed a section's kind, a value outside the space is
    replaced by the original's, or by the one nearest to it.
    """
    flats = [{name: to_choice(value) for name, value in recipe.flat().items()} for recipe in (base, original) if recipe]
    adapted = [section for section, kind in KIND.items() if len({flat[f"{section}.{kind}"] for flat in flats}) > 1]

    def choose(name: str, distribution: BaseDistribution) -> Any:
        values = [flat[field_of(name)] for flat in flats if field_of(name) in flat] or extremes(distribution)
        inside = [value for value in values if contains(distribution, value)]
        if not inside and name.partition(".")[0] in adapted:
            return nearest_value(distribution, values[-1])
        return [*inside, values[0]][0]

    trial = ScriptedTrial({}, choose)
    space(trial)
    problems = []
    for name, distribution in trial.distributions.items():
        if field_of(name) not in flats[0]:
            problems.append(Problem(name, "asked for, but the base recipe has no such field"))
        elif not contains(distribution, trial.params[name]):
            subject = f"{name} = {flats[0][field_of(name)]} in the base recipe"
            problems.append(Problem(subject, f"outside the space, {describe(distribution)}"))
    if problems:
        raise UserError.many(problems)
    return trial.params


def describe(distribution: BaseDistribution) -> str:
    """A range as text: `0.1 to 1 (log)`, `one of a, b`."""
    if isinstance(distribution, CategoricalDistribution):
        return "one of " + ", ".join(str(choice) for choice in distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    scale = " (log)" if distribution.log else ""
    step = f" in steps of {distribution.step:g}" if distribution.step and distribution.step != 1 else ""
    return f"{distribution.low:g} to {distribution.high:g}{step}{scale}"


def _ask(
    space: Space, trial: ScriptedTrial, recipe: Callable[[Mapping[str, Any]], Recipe], problems: dict[Problem, None]
) -> ScriptedTrial:
    try:
        space(trial)
    except Exception as error:
        rule = f"space: {type(error).__name__}: {error}"
        raise UserError(_place(error), rule) from error
    set_by = [field_of(name) for name in trial.params]
    trial.problems += [
        Problem(name, "asked twice in a trial, under two names")
        for name in dict.fromkeys(set_by)
        if set_by.count(name) > 1
    ]
    trial.problems += [
        Problem(
            name,
            "the trials of a study share their data, so it can't be searched",
            f"`--set {name}=...` changes it for all",
        )
        for name in trial.params
        if name.startswith("data.") and field_of(name) not in FORM_FIELDS + SAMPLER_FIELDS
    ]
    try:
        recipe(trial.params)
    except UserError as error:
        trial.problems += [_located(problem, space, trial.params) for problem in error.problems]
    problems.update(dict.fromkeys(trial.problems))
    return trial


def _located(problem: Problem, space: Space, params: Mapping[str, Any]) -> Problem:
    """Of a field that there isn't: with the line of the study that asked for it, found by asking again."""

    def choose(name: str, distribution: BaseDistribution) -> Any:
        if field_of(name) == problem.subject:
            raise LookupError
        return params[name]

    if not problem.rule.startswith(NO_SUCH_FIELD):
        return problem
    try:
        space(ScriptedTrial({}, choose))
    except LookupError as error:
        return replace(problem, rule=f"{problem.rule}, asked for in {_place(error)}")
    return problem


def _place(error: Exception) -> str:
    """The line of the study that led to an error, though that was raised deeper, as by a parameter's range."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.filename for frame in frames if not Path(frame.filename).is_relative_to(PACKAGE)]
    frame = [frame for frame in frames if frame.filename == (own or [frames[-1].filename])[0]][-1]
    return f"{frame.filename}, line {frame.lineno}"


def extremes(distribution: BaseDistribution) -> list[Any]:
    """The values that may open a branch: every choice, or both ends."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return [distribution.low, distribution.high]


def random_value(distribution: BaseDistribution, rng: random.Random) -> Any:
    """Any choice, or number of the range, evenly; of its logarithm where that is searched."""
    if isinstance(distribution, CategoricalDistribution):
        return rng.choice(distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    low, high = distribution.low, distribution.high
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if distribution.log else rng.uniform(low, high)
    return distribution.to_external_repr(nearest_value(distribution, value))


def lowest(name: str, distribution: BaseDistribution) -> Any:
    """Of a range its lower end, of choices the first."""
    return extremes(distribution)[0]


def nearest_value(asked: BaseDistribution, value: Any) -> Any:
    """The value of a range that is nearest to this one: an end, a step, of numbers the choice of the nearest magnitude.

    The first choice where nothing can be near.
    """
    if contains(asked, value):
        return value
    if isinstance(asked, CategoricalDistribution):
        numbers = [choice for choice in asked.choices if _is_number(choice)]
        if not (numbers and _is_number(value)):
            return asked.choices[0]
        return min(numbers, key=lambda choice: abs(math.log((abs(choice) + 1e-9) / (abs(value) + 1e-9))))
    assert isinstance(asked, (FloatDistribution, IntDistribution))
    inside = min(max(value, asked.low), asked.high) if _is_number(value) else asked.low
    if not asked.step:
        return inside
    # Without the last digits, which a sum of steps gets wrong: 0.3, not 0.30000000000000004.
    on_step = asked.low + round((inside - asked.low) / asked.step) * asked.step
    return min(round(on_step, 12), asked.high)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
