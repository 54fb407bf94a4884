"""What a `space(trial)` function asks for, found out before anything runs."""

import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from pipeline.errors import UserError
from pipeline.recipe import Recipe

Space = Callable[[Any], None]


class ScriptedTrial:
    """Answers a space's questions from `answers`, or else with `choose(name, distribution)`; remembers what was asked.

    Raises nothing for a wrong range: `faults` holds one line each, so that all are told at once.
    """

    def __init__(self, answers: Mapping[str, Any], choose: Callable[[str, BaseDistribution], Any]):
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}
        self.faults: list[str] = []
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
            self.faults.append(f"{name}: {str(error).splitlines()[0]}")
            self.params[name] = fallback
            return fallback
        self.distributions[name] = distribution
        self.params[name] = self._answers[name] if name in self._answers else self._choose(name, distribution)
        return self.params[name]


class FixedFields:
    """A trial as a space sees it, some of whose answers are given: their questions never reach the trial.

    Nor do those for which `is_void(name)`, as no trial of the study can have such a field; they get the base recipe's
    value, or the lowest, and their names are in `voided`.
    """

    def __init__(self, trial: Any, given: Mapping[str, Any], is_void: Callable[[str], bool], base: Recipe):
        self._trial, self._given, self._is_void = trial, given, is_void
        self._nobody = ScriptedTrial(base.flat(), lowest)

    @property
    def voided(self) -> list[str]:
        """In the order in which the space asked."""
        return list(self._nobody.params)

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self._trial, attribute)
        if not attribute.startswith("suggest_"):
            return found

        def suggest(name: str, *range_: Any, **more: Any) -> Any:
            if name in self._given:
                return self._given[name]
            asked = getattr(self._nobody, attribute) if self._is_void(name) else found
            return asked(name, *range_, **more)

        return suggest


def explore(space: Space, recipe: Callable[[Mapping[str, Any]], Recipe]) -> dict[str, BaseDistribution]:
    """Every parameter that the space can ask for, with its range; `recipe(params)` of all that is tried is made.

    Each value that may open a branch (all choices, both ends of a range) is forced once, along with the values that
    led to its question; so a parameter is found however deep it lies behind choices. Then random answers look for
    ranges that are valid one by one and not together. Raises UserError with all faults, one line each.
    """
    found: dict[str, BaseDistribution] = {}
    faults: dict[str, None] = {}  # ordered, each line once
    waiting: list[dict[str, Any]] = [{}]
    while waiting:
        answers = waiting.pop(0)
        trial = _ask(space, ScriptedTrial(answers, lowest), recipe, faults)
        for name, distribution in trial.distributions.items():
            if name not in found:
                found[name] = distribution
                waiting += [answers | {name: value} for value in extremes(distribution)]
            elif found[name] != distribution:
                faults[f"{name}: asked with two ranges, {describe(found[name])} and {describe(distribution)}"] = None
    if not faults:
        chance = random.Random(0)
        highest = ScriptedTrial({}, lambda name, d: extremes(d)[-1])
        others = [ScriptedTrial({}, lambda name, d: chance.choice(extremes(d))) for _ in range(64)]
        for trial in (highest, *others):
            _ask(space, trial, recipe, faults)
    if faults:
        raise UserError(list(faults))
    return found


def control(space: Space, base: Recipe, *others: Recipe) -> dict[str, Any]:
    """The answers with which the space gives the base recipe itself; UserError where it can't.

    What is outside the space in `base` is taken from the first of the `others` that has a value inside.
    """
    flats = [recipe.flat() for recipe in (base, *others)]

    def choose(name: str, distribution: BaseDistribution) -> Any:
        values = [flat[name] for flat in flats if name in flat] or extremes(distribution)
        return next((value for value in values if _contains(distribution, value)), values[0])

    trial = ScriptedTrial({}, choose)
    space(trial)
    lines = []
    for name, distribution in trial.distributions.items():
        if name not in flats[0]:
            lines.append(f"{name}: asked for, but the base recipe has no such field")
        elif not _contains(distribution, trial.params[name]):
            lines.append(f"{name} = {flats[0][name]} in the base recipe: outside the space, {describe(distribution)}")
    if lines:
        raise UserError(lines)
    return trial.params


def describe(distribution: BaseDistribution) -> str:
    """A range as a person would write it."""
    if isinstance(distribution, CategoricalDistribution):
        return "one of " + ", ".join(str(choice) for choice in distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    scale = " (log)" if distribution.log else ""
    step = f" in steps of {distribution.step:g}" if distribution.step and distribution.step != 1 else ""
    return f"{distribution.low:g} to {distribution.high:g}{step}{scale}"


def _ask(
    space: Space, trial: ScriptedTrial, recipe: Callable[[Mapping[str, Any]], Recipe], faults: dict[str, None]
) -> ScriptedTrial:
    try:
        space(trial)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"{place.filename}, line {place.lineno}: space: {type(error).__name__}: {error}") from error
    trial.faults += [
        f"{name}: the trials of a study share their data, so it can't be searched; --set {name}=... changes it for all"
        for name in trial.params
        if name.startswith("data.")
    ]
    try:
        recipe(trial.params)
    except UserError as error:
        trial.faults += error.lines
    faults.update(dict.fromkeys(trial.faults))
    return trial


def extremes(distribution: BaseDistribution) -> list[Any]:
    """The values that may open a branch: every choice, or both ends."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return [distribution.low, distribution.high]


def lowest(name: str, distribution: BaseDistribution) -> Any:
    """Of a range its lower end, of choices the first."""
    return extremes(distribution)[0]


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (ValueError, TypeError):
        return False
