"""The trials that a new study is given before its sampler draws any: strong recipes, and winners of earlier studies."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import GridSampler
from optuna.trial import FrozenTrial, TrialState

from pipeline.errors import UserError
from pipeline.recipe import LATER, Recipe, kind_field, kinds_with
from pipeline.search.optuna_internals import contains
from pipeline.search.portfolio import PORTFOLIO, fields_for
from pipeline.search.search import MAX_STARTS, Search, StartFrom
from pipeline.search.space_check import (
    ScriptedTrial,
    field_of,
    from_choice,
    lowest,
    nearest_value,
    random_value,
    to_choice,
)
from pipeline.search.study_attributes import StudyAttributes
from pipeline.search.trial_attributes import TrialAttributes, is_feasible

MAX_WINNERS = 2  # of MAX_STARTS; as many of the portfolio come before them

NUM_NETWORKS = 64  # that are tried where a start's breaks a bound
_OWN_FIELDS = ("training.epochs", "training.seed", "training.execution")  # each study has its own


@dataclass(frozen=True)
class Start:
    """The parameters of one of the first trials, and where they come from."""

    params: Mapping[str, Any]
    source: str


def starts(
    search: Search,
    start_from: StartFrom,
    earlier: Sequence[optuna.Study],
    is_feasible: Callable[[Recipe], bool] = lambda recipe: True,
) -> list[Start]:
    """What a search's first trials after the control are given; none is given twice, nor equals the control.

    `earlier` studies are this project's, whatever they searched. Starts that the study names are part of its question: all
    are given. Of others it is at most MAX_STARTS, theirs included, and half of the trials; none of a grid, which has them
    all. Where a recipe isn't `is_feasible` before it is trained, it gets another network, if the space has one.
    """
    is_own, is_grid = search.study.starts != PORTFOLIO, isinstance(search.study.sampler, GridSampler)
    where = "study" if is_own else "portfolio"
    named = {f"{where}: {name}": changes for name, changes in search.study.starts.items()}
    named = named if start_from in ("all", "portfolio") and (is_own or not is_grid) else {}
    winners = _winners(search, earlier) if start_from in ("all", "winners") and not is_grid else {}
    own, others = (_representable(search, changes, is_feasible) for changes in (named, winners))
    first = len(own) if is_own else MAX_STARTS - MAX_WINNERS
    control, found = search.control(), dict[str, dict[str, Any]]()
    for source, params in [*own[:first], *others, *own[first:]]:
        if params not in (control, *found.values()):
            found[source] = params
    most = min(MAX_STARTS, (search.trials - 1) // 2)
    if is_own:
        most = max(most, min(search.trials - 1, sum(source in named for source in found)))
    return [Start(params, source) for source, params in found.items()][:most]


def _representable(
    search: Search, starts: Mapping[str, Mapping[str, Any]], is_feasible: Callable[[Recipe], bool]
) -> list[tuple[str, dict[str, Any]]]:
    """The sources and parameters of those that the space can have."""
    found = [(source, nearest(search, changes)) for source, changes in starts.items()]
    return [(source, _within_bounds(search, params, is_feasible)) for source, params in found if params is not None]


def _within_bounds(search: Search, params: dict[str, Any], is_feasible: Callable[[Recipe], bool]) -> dict[str, Any]:
    """The parameters, with as few others of the network as make the recipe feasible, among random ones; as they are where
    none of these is feasible."""
    if is_feasible(search.recipe(params)):
        return params
    rng, found = random.Random(0), list[dict[str, Any]]()

    def choose(name: str, asked: BaseDistribution) -> Any:
        keeps = name in params and (not name.startswith("model.") or rng.random() < 0.5)
        return params[name] if keeps and contains(asked, params[name]) else random_value(asked, rng)

    for _ in range(NUM_NETWORKS):
        trial = ScriptedTrial({}, choose)
        search.ask(trial)
        if is_feasible(search.recipe(trial.params)):
            found.append(trial.params)
    return min(found, key=lambda other: sum(other.get(name) != params[name] for name in params), default=params)


def not_as_named(search: Search, given: Sequence[Start]) -> list[str]:
    """A line for each start that the study names and that isn't given, or not with the values that it names."""
    if search.study.starts == PORTFOLIO or search.start_from not in ("all", "portfolio"):
        return []
    params, lines = {start.source: start.params for start in given}, []
    or_breaks = " or breaks a bound" if search.study.constraints else ""
    for name, changes in search.study.starts.items():
        found = params.get(f"study: {name}")
        if found is None:
            lines.append(
                f"start {name} is not given: it equals the control or another start, has an optimizer that isn't searched, "
                "or the trials are too few"
            )
            continue
        has = search.recipe(found).flat()
        lines += [
            f"start {name}: {field} = {wanted} is not in the space{or_breaks}; it gets {has.get(field, 'none')}"
            for field, wanted in fields_for(search.base, changes).items()
            if to_choice(has.get(field)) != to_choice(wanted)
        ]
    return lines


def nearest(search: Search, changes: Mapping[str, Any]) -> dict[str, Any] | None:
    """The parameters whose recipe is nearest to the study's with these fields; None where its optimizer can't be had.

    A value outside a range becomes its nearest end or step, a number that is no choice the choice with the nearest
    logarithm. Fields that the space doesn't ask for are left out; but with another optimizer rates mean something else.
    """
    try:
        base = search.recipe({})
        wanted = base.changed(fields_for(base, changes)).flat()
    except UserError:
        return None

    def choose(name: str, asked: BaseDistribution) -> Any:
        return nearest_value(asked, to_choice(wanted.get(field_of(name), lowest(name, asked))))

    trial = ScriptedTrial({}, choose)
    search.ask(trial)
    return trial.params if search.recipe(trial.params).optimizer.name == wanted["optimizer.name"] else None


def _winners(search: Search, earlier: Sequence[optuna.Study]) -> dict[str, Mapping[str, Any]]:
    """The best feasible trials of other studies as changes, by their source: of the same network first, then the latest.

    A control is none: no search found it.
    """
    found: list[tuple[bool, float, str, Mapping[str, Any]]] = []
    for study in earlier:
        completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        feasible = [trial for trial in completed if is_feasible(trial) and not TrialAttributes.of(trial).control]
        if not feasible or study.study_name == search.stored_key:
            continue
        best = max(feasible, key=lambda trial: trial.value or 0.0)
        fields = _fields(study, best)
        is_same = fields["model.network"] == search.base.model.network
        changes = {
            name: value
            for name, value in fields.items()
            if name.split(".")[0] != "data" and name not in _OWN_FIELDS and (is_same or not name.startswith("model."))
        }
        ended = max(trial.datetime_complete.timestamp() for trial in completed if trial.datetime_complete)
        found.append((is_same, ended, f"{study.study_name}, trial {best.number}", changes))
    found.sort(key=lambda winner: winner[:2], reverse=True)
    return {source: changes for _, _, source, changes in found[:MAX_WINNERS]}


def _fields(study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
    """The recipe fields of a trial: those of its study's base that its kinds have, and what it drew."""
    base = {**LATER, **StudyAttributes.of(study).fingerprint["base"]}  # where values of LATER are left out
    fields = {**base, **{field_of(name): from_choice(value) for name, value in trial.params.items()}}
    return {
        name: value
        for name, value in fields.items()
        if not kinds_with(name) or fields.get(kind_field(name)) in kinds_with(name)
    }
