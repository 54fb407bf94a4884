"""A study: one question, asked by a search around a base recipe."""

import importlib.util
import json
import math
import re
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.samplers import TPESampler

from pipeline.errors import Problem, UserError, did_you_mean
from pipeline.recipe import KIND, LATER, Recipe, has_default, kind_field, kinds_with
from pipeline.search.pruner import RecentTrialsPruner
from pipeline.search.space_check import FixedFields, ScriptedTrial, Space, control, describe, explore, extremes, lowest
from pipeline.search.trial_attributes import TrialAttributes
from pipeline.tracking.study_key import StudyKey

if TYPE_CHECKING:  # importing it imports torch, and a wrong name has to be refused at once
    from pipeline.data.prepare import TrainingData

OBJECTIVES = ("val/accuracy", "val/f1_macro")
FOLDER = Path(__file__).resolve().parents[2] / "studies"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The same question on other data: a few changed fields and another number of trials."""

    changes: Mapping[str, Any]
    trials: int


# Digits are few: a study without a variant of its own for them takes a few minutes on two cores.
DEMONSTRATION = Variant(changes={"training.epochs": 8, "training.batch_size": 64}, trials=10)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a module in studies/ defines.

    `space(trial)` asks an Optuna trial for values; a parameter's name is the recipe field that it sets in `base`.
    `version` goes up when space or base change, so that scores of different questions don't mix in one search.
    """

    question: str
    base: Recipe
    space: Space
    objective: Literal["val/accuracy", "val/f1_macro"]
    trials: int
    patience: int | None = None  # trials without a better score after which the study stops
    version: int = 1
    variants: Mapping[str, Variant] = field(default_factory=lambda: {"digits": DEMONSTRATION})

    def __post_init__(self) -> None:
        """UserError with all problems."""
        rules = {
            "base": (isinstance(self.base, Recipe), "a Recipe, as parse_recipe makes"),
            "space": (callable(self.space), "a function of a trial"),
            "objective": (self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}"),
            "trials": (isinstance(self.trials, int) and self.trials >= 1, "an integer of at least 1"),
            "patience": (
                self.patience is None or (isinstance(self.patience, int) and self.patience >= 1),
                "None or an integer of at least 1",
            ),
            "version": (isinstance(self.version, int) and self.version >= 1, "an integer of at least 1"),
        }
        problems = [
            Problem(f"{name} = {getattr(self, name)!r}", f"must be {rule}")
            for name, (is_valid, rule) in rules.items()
            if not is_valid
        ]
        if problems:
            raise UserError.many(problems)

    def settings(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that all trials share: the changes, and what suits the data set that they name."""
        from pipeline.data.datasets import default_image_size

        dataset = str(changes.get("data.dataset", self.base.data.dataset))
        size = None if dataset == self.base.data.dataset else default_image_size(dataset)
        variant = self.variants.get(dataset)
        return {
            "data.dataset": dataset,
            **({"data.image_size": size} if size else {}),
            **(variant.changes if variant else {}),
            **changes,
        }


@dataclass(frozen=True)
class Search:
    """A study resolved for one data set: what is run.

    `settings` are fields that were set for all trials: the data set's, a variant's, those of `--epochs`, `--seed` and
    `--set`. They are not searched, though the space may ask for them. `recipe` combines the study, the settings and a
    trial's parameters.
    """

    name: str
    study: Study
    settings: Mapping[str, Any]
    version: int
    trials: int
    timeout_s: float | None
    patience: int | None = None
    # Both are set by `storage.resolved`.
    stored_key: str | None = None  # the study's name in Optuna and MLflow
    dataset_path: str | None = None  # the data set as `load` takes it here, where `base` has the name that it had first
    deadline: float | None = None  # time.monotonic(): later no trial goes on where another is complete; see budget

    def key(self, data: "TrainingData") -> str:
        """The name in Optuna and MLflow: study, version, data set."""
        return self.stored_key or str(StudyKey(self.name, self.version, data.name))

    def recipe(self, params: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial with these parameters."""
        return self.study.base.changed(params, self.settings)

    @cached_property
    def base(self) -> Recipe:
        """The recipe of trial 0, the control: the study's with the settings."""
        return self.recipe(self.control())

    def ask(self, trial: Any) -> None:
        """Ask a trial for the space's parameters, except those that are set for all trials."""
        self.study.space(self._with_settings(trial))

    def _with_settings(self, trial: Any) -> FixedFields:
        return FixedFields(trial, self._given, self._is_void, self.study.base)

    @cached_property
    def _given(self) -> dict[str, Any]:
        """The settings, as the recipe has them where it has such a field."""
        flat = self.recipe({}).flat()
        return {name: flat.get(name, value) for name, value in self.settings.items()}

    def _is_void(self, name: str) -> bool:
        """Whether the kind that was set for this field's section has no such field."""
        kinds = kinds_with(name)
        return bool(kinds) and self.settings.get(kind_field(name), kinds[0]) not in kinds

    def pruner(self) -> RecentTrialsPruner:
        """The pruner of the trials, except the first MIN_UNPRUNED_TRIALS."""
        return RecentTrialsPruner(self.max_epochs)

    def is_exhausted(self, study: optuna.Study) -> bool:
        """Whether the last `patience` trials that ended, in any state, gave no score above the best before them."""
        ended = [trial for trial in study.get_trials(deepcopy=False) if counts_toward_budget(trial)]
        if self.patience is None or len(ended) <= self.patience:
            return False
        scores = [trial.value if trial.value is not None else -math.inf for trial in ended]
        return max(scores[-self.patience :]) <= max(scores[: -self.patience]) > -math.inf

    def step(self, epoch: int, recipe: Recipe) -> int:
        """A trial's epoch as the pruner sees it: in epochs of the study's longest trial.

        A short training is ahead of a long one at the same epoch, as its learning rate has fallen further; so the same
        fraction of both is compared.
        """
        return round(epoch * self.max_epochs / recipe.training.epochs)

    @cached_property
    def max_epochs(self) -> int:
        """The number of epochs of the longest trial that the space can give."""
        searched = self.space().get("training.epochs")
        return max(extremes(searched)) if searched else self.base.training.epochs

    def sampler(self, num_trials: int, worker: int = 0) -> TPESampler:
        """TPE with another seed at each resume and for each worker, so that no draw is repeated."""
        seed = self.base.training.seed * 1_000_003 + num_trials + worker * 15_485_863
        return TPESampler(seed=seed % 2**32, n_startup_trials=min(10, self.trials // 2))

    def fingerprint(self, data: "TrainingData") -> dict[str, Any]:
        """All that the scores of one search have in common, as JSON."""
        elsewhere = (
            "data.dataset",  # the data's path; the digest says what the data is
            "data.train_fraction",  # part of the split's digest
            "training.execution",  # depends on the device, and changes no result
        )
        space, flat = self.space(), {**self.settings, **self.base.flat()}
        base = {name: flat[name] for name in flat if name not in elsewhere and (name, flat[name]) not in LATER.items()}
        return {
            "objective": self.study.objective,
            "data": data.digest,
            "split": data.split_digest,
            "base": json.loads(json.dumps(base)),
            "space": {name: distribution_to_json(space[name]) for name in sorted(space)},
        }

    def check(self) -> None:
        """UserError with all problems where a setting or the space is invalid, or the space can't give the base recipe."""
        self.recipe({})
        space = self.space()
        if problems := [
            Problem(
                f"{name} = {self.settings[name]}",
                f"no such field where {kind_field(name)} is {_listed(kinds, 'or')}",
                f"{_listed(kinds_with(name), 'and')} can have it",
            )
            for name, kinds in self._kinds_without(space).items()
            if len(kinds) == len(self._kinds(name, space))
        ]:
            raise UserError.many(problems)
        self.control()

    def space(self) -> dict[str, BaseDistribution]:
        """Every parameter that the space can ask for, with its range."""
        return explore(self.ask, self.recipe)

    def control(self) -> dict[str, Any]:
        """The parameters of trial 0; where a kind was set whose default the space doesn't hold, the study's own value."""
        return control(self.ask, self.recipe({}), self.study.base)

    def executed(self) -> list[Recipe]:
        """The control, with each way of executing a step that a trial may have."""
        name, space = "training.execution", self.space()
        ways = extremes(space[name]) if name in space else [self.base.training.execution]
        return [self.recipe({**self.control(), name: way}) for way in ways]

    def remarks(self) -> list[str]:
        """A line for each setting that does not apply to all trials, and each parameter or value that settings change."""
        space, original, current = self.space(), self.study.base.flat(), self.base.flat()
        trial = self._with_settings(ScriptedTrial(self.control(), lowest))
        self.study.space(trial)
        lines = [
            f"{name} = {self.settings[name]}: not where {kind_field(name)} is {_listed(kinds, 'or')}, "
            "which can't have it; it applies to all other trials"
            for name, kinds in self._kinds_without(space).items()
        ]
        for section in KIND:
            kind = current[kind_field(section)]
            if kind_field(section) not in self.settings or kind == original[kind_field(section)]:
                continue
            if void := [name for name in trial.voided if name.startswith(f"{section}.")]:
                lines.append(f"{_listed(void, 'and')}: not searched, as {kind} can't have that")
            lines += [
                f"{name} = {current[name]}: the study's value, as {kind} has no default"
                + ("; other trials search it" if name in space else "")
                for name in original
                if name.startswith(f"{section}.") and name in current and name not in self.settings
                if not has_default(name, kind)
            ]
        return lines

    def _kinds(self, name: str, space: Mapping[str, BaseDistribution]) -> list[str]:
        """The kinds that a field's section has in any trial; none where the section has no kinds."""
        if not kinds_with(name):
            return []
        field = kind_field(name)
        kinds = [self.recipe({}).flat()[field], *(extremes(space[field]) if field in space else [])]
        return list(dict.fromkeys(kinds))

    def _kinds_without(self, space: Mapping[str, BaseDistribution]) -> dict[str, list[str]]:
        """Setting -> those kinds of any trial that have no such field, where there are any."""
        without = {
            name: [kind for kind in self._kinds(name, space) if kind not in kinds_with(name)] for name in self.settings
        }
        return {name: kinds for name, kinds in without.items() if kinds}


def _listed(names: Sequence[str], conjunction: str) -> str:
    """`a, b or c`."""
    return f" {conjunction} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def available() -> list[str]:
    """The names of the studies in studies/."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if not file.stem.startswith("_"))


def load_study(name: str) -> Study:
    """The study that studies/<name>.py defines; UserError where there is none, or it can't be read."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        rule = "must be lower-case letters, digits, _ and -, and begin with a letter or digit"
        raise UserError(f"study name {name!r}", rule)
    if re.search(r"-v\d+(-|$)", name):
        raise UserError(f"study name {name!r}", "must not contain -v and a number, which follow it in a study's key")
    if name not in available():
        hint = did_you_mean(name, available())
        raise UserError(f"no study {name}{hint}", details=[f"studies: {', '.join(available())}"])
    file = FOLDER / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"studies.{name}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        study = module.STUDY
    except UserError as error:
        problems = [replace(problem, subject=f"{file.name}: {problem.subject}") for problem in error.problems]
        raise UserError.many(problems) from None
    except (Exception, SystemExit) as error:
        rule = f"{type(error).__name__}: {str(error) or 'no reason given'}"
        raise UserError(f"{file}{_line_of(error, file)}", rule) from error
    if not isinstance(study, Study):
        raise UserError(str(file), f"STUDY is a {type(study).__name__}: must be a pipeline.search.study.Study")
    return study


def check_same(name: str, stored: Mapping[str, Any], current: Mapping[str, Any], version: int) -> None:
    """UserError with all differences where the fingerprint of a stored study is not the one of a search."""
    details = [
        f"{part}: {str(stored.get(part))[:16]} then, {str(current.get(part))[:16]} now"
        for part in ("objective", "data", "split")
        if stored.get(part) != current.get(part)
    ]
    for part, show in (("base", str), ("space", _describe_json)):
        former, present = stored.get(part, {}), current[part]
        details += [
            f"{part} {key}: {show(former.get(key))} then, {show(present.get(key))} now"
            for key in sorted(former.keys() | present.keys())
            if former.get(key) != present.get(key)
        ]
    if details:
        raise UserError(
            f"study {name}",
            "has trials that answer another question",
            f"`--version {version + 1}` (or `version` in its module) starts a new study; the former values resume this one",
            details,
        )


def _describe_json(distribution: str | None) -> str:
    return describe(json_to_distribution(distribution)) if distribution else "not searched"


def _line_of(error: BaseException, file: Path) -> str:
    """`, line N` of a study's module, where an error was raised through it."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f", line {error.lineno}"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(file)]
    return f", line {lines[-1]}" if lines else ""


def counts_toward_budget(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial counts toward the budget: all that ended do, except requeued ones."""
    return trial.state.is_finished() and not TrialAttributes.is_requeued(trial)


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is, as a person is told."""

    name: str
    finished: int  # trials that count against the budget
    pruned: int
    failed: int  # or interrupted
    trials: int  # that there will be in all, as it looks now
    best: tuple[int, float] | None  # number and score


def study_progress(study: optuna.Study, finished: int, in_all: int) -> StudyProgress:
    """Of a study of which so many trials have ended, of so many."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    pruned = states.count(optuna.trial.TrialState.PRUNED)
    completed = _completed(study)
    best = min(completed, key=lambda trial: (-(trial.value or 0.0), trial.number), default=None)
    return StudyProgress(
        name=study.study_name,
        finished=finished,
        pruned=pruned,
        failed=finished - len(completed) - pruned,
        trials=in_all,
        best=(best.number, best.value or 0.0) if best else None,
    )


def records(study: optuna.Study, search: Search, exclude: Collection[str] = ()) -> list[dict[str, Any]]:
    """The completed trials as rows of `report.trials.table`, of what a table of the best needs; `run_id` is the run's key.

    From Optuna, which has them all when a study ends; MLflow may be unreachable, or get the last of them later. The run
    keys to `exclude` are left out.
    """
    return [
        {
            **{name: _as_text(value) for name, value in search.recipe(trial.params).flat().items()},
            **attributes.metrics,
            "study": study.study_name,
            "trial": trial.number,
            "run_id": attributes.run_key,
            "role": "trial",
            "state": "finished",
            "control": attributes.control,
            "objective": search.study.objective,
            "score": trial.value,
            "seconds": attributes.seconds,
            "epochs": attributes.epochs,
        }
        for trial, attributes in ((trial, TrialAttributes.of(trial)) for trial in _completed(study))
        if attributes.run_key not in exclude
    ]


def _as_text(value: Any) -> Any:
    """A list as MLflow keeps it; what else a recipe holds as it is."""
    return str(list(value)) if isinstance(value, tuple) else value


def _completed(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
