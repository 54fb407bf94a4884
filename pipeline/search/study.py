"""A study: one question, asked by a search around a base recipe."""

import copy
import importlib.util
import json
import math
import re
import sys
import traceback
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, GridSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from pipeline.errors import Problem, UserError, did_you_mean, first_line
from pipeline.evaluation.constraints import MEASURES, nearest, violations
from pipeline.evaluation.scores import OBJECTIVES, Objective
from pipeline.recipe import KIND, LATER, Recipe, has_default, kind_field, kinds_with
from pipeline.search.optuna_internals import allow_stop, reseed
from pipeline.search.portfolio import PORTFOLIO
from pipeline.search.short_trials import MIN_EPOCHS, MIN_TRIALS, short_epochs
from pipeline.search.space_check import (
    FixedFields,
    ScriptedTrial,
    Space,
    control,
    describe,
    explore,
    extremes,
    field_of,
    from_choice,
    lowest,
)
from pipeline.search.study_attributes import StudyAttributes
from pipeline.search.trial_attributes import TrialAttributes, is_feasible
from pipeline.tracking.study_key import StudyKey

if TYPE_CHECKING:  # importing it imports torch, and a wrong name has to be refused at once
    from pipeline.data.prepare import TrainingData

PHOTO_SIZE = 64  # pixels; of a folder of larger images, for networks made for 32
# Largest elongation, long by short side -> what suits such images: a crop of 2:1 would lose half of them.
GEOMETRIES = {1.1: "squash", 1.6: "crop", math.inf: "pad"}
MAX_STARTS = 4  # trials of a new study that are given, besides the control
StartFrom = Literal["all", "portfolio", "winners", "none"]
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

    `space(trial)` asks an Optuna trial for values; a parameter's name is the recipe field that it sets in `base`, or the
    field and a label: `optimizer.lr@adamw` gives AdamW a range of rates of its own.
    `version` goes up when space or base change, so that scores of different questions don't mix in one search.
    `constraints` are upper bounds on what a run measures: a recipe that breaks one can't win, nor is it trained where that
    is known before. `sampler` and `pruner` are Optuna's, or of its base classes, in place of the measured defaults.
    """

    question: str
    base: Recipe
    space: Space
    objective: Objective
    trials: int
    patience: int | None = None  # trials without a better score after which the study stops
    version: int = 1
    # The first trials after the control: a name and the fields that differ from `base`. What the space can't give becomes
    # the nearest that it can.
    starts: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: PORTFOLIO)
    variants: Mapping[str, Variant] = field(default_factory=lambda: {"digits": DEMONSTRATION})
    constraints: Mapping[str, float] = field(default_factory=dict)  # one of MEASURES -> its upper bound
    sampler: BaseSampler | None = None  # None: TPE
    pruner: BasePruner | None = None  # None: no trial is pruned; most are short ones, see short_trials

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
            "sampler": (_is_optional(self.sampler, BaseSampler), "a sampler of Optuna, as TPESampler(), or None"),
            "pruner": (_is_optional(self.pruner, BasePruner), "a pruner of Optuna, as MedianPruner(), or None"),
        }
        problems = [
            Problem(f"{name} = {getattr(self, name)!r}", f"must be {rule}")
            for name, (is_valid, rule) in rules.items()
            if not is_valid
        ]
        problems += _constraint_problems(self.constraints)
        problems += self._problems_of_starts() if isinstance(self.base, Recipe) else []
        if problems:
            raise UserError.many(problems)

    def suited_to(self, folder: Path) -> tuple["Study", str]:
        """The study with a base that suits the images of a folder, by a look at their sizes; and a line that says it.

        Networks for photos keep their study's size; those for small images get PHOTO_SIZE where the images have it.
        """
        from pipeline.data.folder import look

        sizes = look(folder)
        if sizes is None:
            return self, ""
        shape = next(geometry for most, geometry in GEOMETRIES.items() if sizes.elongation <= most)
        size = self.base.data.image_size
        if self.base.model.network != "timm" and min(sizes.width, sizes.height) >= PHOTO_SIZE:
            size = max(size, PHOTO_SIZE)
        line = (
            f"images of {sizes.width} x {sizes.height} pixels, long by short side {sizes.elongation:.2f} (medians of "
            f"{sizes.num_images} looked at): the control has data.image_size={size} data.geometry={shape}; `--set` "
            "chooses others for all trials"
        )
        return replace(self, base=self.base.changed({"data.image_size": size, "data.geometry": shape})), line

    def _problems_of_starts(self) -> list[Problem]:
        problems = []
        for name, changes in self.starts.items():
            try:
                self.base.changed(changes)
            except UserError as error:
                problems += [
                    replace(problem, subject=f"starts, {name}: {problem.subject}") for problem in error.problems
                ]
        return problems

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
    note: str = ""  # what was chosen for this data set
    precision: str = ""  # what `training.precision = auto` turned out to be for this study's network, where measured
    start_from: StartFrom = "all"  # what a new study's first trials after the control are given
    prune: bool = True
    # Both are set by `storage.resolved`.
    stored_key: str | None = None  # the study's name in Optuna and MLflow
    dataset_path: str | None = None  # the data set as `load` takes it here, where `base` has the name that it had first
    deadline: float | None = None  # time.monotonic(): later no trial goes on where another is complete; see budget

    def key(self, data: "TrainingData") -> str:
        """The name in Optuna and MLflow: study, version, data set."""
        return self.stored_key or str(StudyKey(self.name, self.version, data.name))

    def recipe(self, params: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial with these parameters."""
        changes = {field_of(name): from_choice(value) for name, value in params.items()}
        measured = {"training.precision": self.precision} if self.precision else {}
        return self.study.base.changed(changes, {**self.settings, **measured})

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

    @property
    def shortens(self) -> bool:
        """Whether most trials are short ones: see `short_trials`."""
        return self.shortens_of(self.trials)

    def shortens_of(self, trials: int) -> bool:
        """Whether most of so many trials would be short ones."""
        is_long = self.max_epochs >= MIN_EPOCHS and trials >= MIN_TRIALS
        return self.prune and self.study.pruner is None and is_long

    def short(self, recipe: Recipe) -> Recipe:
        """The recipe of the short trial."""
        return recipe.changed({"training.epochs": short_epochs(recipe.training.epochs)})

    def pruner(self) -> BasePruner:
        """The study's pruner, or none."""
        return (copy.deepcopy(self.study.pruner) if self.prune else None) or NopPruner()

    def why_exhausted(self, study: optuna.Study) -> str:
        """Why the study stops before its last trial; empty where it doesn't.

        The sampler has nothing more to suggest, or the last `patience` trials that ended, in any state, gave no score
        above the best before them. The score of an infeasible trial is none.
        """
        if self._sampler_is_done(study):
            return f"the sampler, {type(self.study.sampler).__name__}, has nothing more to suggest"
        ended = [trial for trial in study.get_trials(deepcopy=False) if counts_toward_budget(trial)]
        if self.patience is None or len(ended) <= self.patience:
            return ""
        scores = [trial.value if trial.value is not None and is_feasible(trial) else -math.inf for trial in ended]
        if not max(scores[-self.patience :]) <= max(scores[: -self.patience]) > -math.inf:
            return ""
        return (
            f"the last {self.patience} gave no better score (`--patience`); the same command with more patience resumes"
        )

    def _sampler_is_done(self, study: optuna.Study) -> bool:
        sampler = self.study.sampler
        if isinstance(sampler, GridSampler):  # it may have grown since it stopped
            return sampler.is_exhausted(study)
        return sampler is not None and StudyAttributes.of(study).stopped_by == type(sampler).__name__

    def step(self, epoch: int, recipe: Recipe, short: bool = False) -> int:
        """A trial's epoch as sampler and pruner see it: in epochs of the study's longest trial, or of its longest short one.

        Where lengths are searched, a training of fewer epochs is ahead of one of more at the same epoch, as its learning
        rate has fallen further; so the same fraction of both is compared.
        """
        longest = short_epochs(self.max_epochs) if short else self.max_epochs
        return round(epoch * longest / recipe.training.epochs)

    @cached_property
    def max_epochs(self) -> int:
        """The number of epochs of the longest trial that the space can give."""
        searched = self.values("training.epochs")
        return max(searched) if searched else self.base.training.epochs

    def sampler(self, num_trials: int, worker: int = 0) -> BaseSampler:
        """The study's sampler, or TPE; seeded anew at each resume and for each worker, so that no draw is repeated."""
        sampler = copy.deepcopy(self.study.sampler) or _default_sampler()
        reseed(sampler, (self.base.training.seed * 1_000_003 + num_trials + worker * 15_485_863) % 2**32)
        return sampler

    def fingerprint(self, data: "TrainingData") -> dict[str, Any]:
        """All that the scores of one search have in common, as JSON."""
        elsewhere = (
            "data.dataset",  # the data's path; the digest says what the data is
            "data.train_fraction",  # part of the split's digest
            "training.execution",  # depends on the device, and changes no result
        )
        space, flat = self.space(), {**self.settings, **self.base.flat()}
        base = {name: flat[name] for name in flat if name not in elsewhere and (name, flat[name]) not in LATER.items()}
        if self.precision:
            base["training.precision"] = "auto"  # asked, and answered the same for all trials
        return {
            "objective": self.study.objective,
            "constraints": dict(self.study.constraints),
            "data": data.digest,
            "split": data.split_digest,
            "base": json.loads(json.dumps(base)),
            "space": {name: distribution_to_json(space[name]) for name in sorted(space)},
        }

    def check(self) -> None:
        """UserError with all problems where a setting or the space is invalid, or the space can't give the base recipe."""
        self.recipe({})
        self.space()
        self._check_networks()
        if problems := [
            Problem(
                f"{name} = {self.settings[name]}",
                f"no such field where {kind_field(name)} is {_listed(kinds, 'or')}",
                f"{_listed(kinds_with(name), 'and')} can have it",
            )
            for name, kinds in self._kinds_without().items()
            if len(kinds) == len(self._kinds(name))
        ]:
            raise UserError.many(problems)
        self.control()
        self._rehearse()

    def _rehearse(self) -> None:
        """UserError where the study's own sampler or pruner fails with its space: three trials in memory, none trained."""
        own = [part for part in (self.study.sampler, self.study.pruner) if part]
        if not own:
            return
        try:
            study = optuna.create_study(direction="maximize", sampler=self.sampler(0), pruner=self.pruner())
            study.enqueue_trial(self.control())
            allow_stop(study)
            for score in (0.1, 0.2, 0.3):
                trial = study.ask()
                self.ask(trial)
                self.recipe(trial.params)
                trial.report(score, 1)
                trial.should_prune()
                study.tell(trial, score)
        except Exception as error:  # whatever a sampler raises
            rule = f"fails with this study's space ({type(error).__name__}: {first_line(error)})"
            remedy = f"install {error.name}" if isinstance(error, ImportError) else ""
            raise UserError(" and ".join(type(part).__name__ for part in own), rule, remedy) from error

    def _check_networks(self) -> None:
        """UserError where a network of timm, the control's or one that is searched, is not known or can't be built."""
        problems: dict[Problem, None] = {}
        for recipe in self.networks():
            from pipeline.models.build import check_network  # imports torch and timm, for these networks alone

            try:
                check_network(recipe.model, recipe.data.image_size)
            except UserError as error:
                problems.update(dict.fromkeys(error.problems))
        if problems:
            raise UserError.many(list(problems))

    def networks(self) -> list[Recipe]:
        """The control, or it with each backbone of timm that a trial may have; none where there is no such network."""
        base = self.recipe({})
        if base.model.network != "timm":
            return []
        return [
            base.changed({"model.backbone": name}) for name in self.values("model.backbone") or [base.model.backbone]
        ]

    def space(self) -> dict[str, BaseDistribution]:
        """Every parameter that the space can ask for, with its range."""
        return self._space.copy()

    @cached_property
    def _space(self) -> dict[str, BaseDistribution]:
        return explore(self.ask, self.recipe)

    @property
    def fields(self) -> list[str]:
        """The recipe fields that the space asks for, under whatever names."""
        return list(dict.fromkeys(map(field_of, self.space())))

    def values(self, field: str) -> list[Any]:
        """Every choice, or both ends, of what the space asks for a field; none where it doesn't."""
        return [value for name, asked in self.space().items() if field_of(name) == field for value in extremes(asked)]

    def control(self) -> dict[str, Any]:
        """The parameters of trial 0; where a kind was set whose default the space doesn't hold, nearest to the study's."""
        return control(self.ask, self.recipe({}), self.study.base)

    def executed(self) -> list[Recipe]:
        """The control, with each way of executing a step that a trial may have."""
        name = "training.execution"
        ways = self.values(name) or [self.base.training.execution]
        return [self.recipe({**self.control(), name: way}) for way in ways]

    def remarks(self) -> list[str]:
        """A line for each setting that does not apply to all trials, and each parameter or value that settings change."""
        original, current = self.study.base.flat(), self.base.flat()
        trial = self._with_settings(ScriptedTrial(self.control(), lowest))
        self.study.space(trial)
        lines = [self.note] if self.note else []
        lines += [
            f"{name} = {self.settings[name]}: not where {kind_field(name)} is {_listed(kinds, 'or')}, "
            "which can't have it; it applies to all other trials"
            for name, kinds in self._kinds_without().items()
        ]
        for section in KIND:
            kind = current[kind_field(section)]
            if kind_field(section) not in self.settings or kind == original[kind_field(section)]:
                continue
            if void := [name for name in trial.voided if name.startswith(f"{section}.")]:
                lines.append(f"{_listed(void, 'and')}: not searched, as {kind} can't have that")
            lines += [
                f"{name} = {current[name]}: {'' if current[name] == original[name] else 'nearest to '}the study's value, "
                f"as {kind} has no default" + ("; other trials search it" if self.values(name) else "")
                for name in original
                if name.startswith(f"{section}.") and name in current and name not in self.settings
                if not has_default(name, kind)
            ]
        return lines

    def _kinds(self, name: str) -> list[str]:
        """The kinds that a field's section has in any trial; none where the section has no kinds."""
        if not kinds_with(name):
            return []
        kinds = [self.recipe({}).flat()[kind_field(name)], *self.values(kind_field(name))]
        return list(dict.fromkeys(kinds))

    def _kinds_without(self) -> dict[str, list[str]]:
        """Setting -> those kinds of any trial that have no such field, where there are any."""
        without = {name: [kind for kind in self._kinds(name) if kind not in kinds_with(name)] for name in self.settings}
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
    for part, show in (("constraints", str), ("base", str), ("space", _describe_json)):
        former, present = stored.get(part, {}), current.get(part, {})
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


def _default_sampler() -> TPESampler:
    """TPE that draws parameters together, so near a good trial, after the control and the starts (studies/search)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(multivariate=True, group=True, constant_liar=True, n_startup_trials=MAX_STARTS + 1)


def counts_toward_budget(trial: FrozenTrial) -> bool:
    """Whether a trial counts toward the budget: all that ended do, except requeued ones."""
    return trial.state.is_finished() and not TrialAttributes.is_requeued(trial)


def _is_optional(value: object, kind: type) -> bool:
    return value is None or isinstance(value, kind)


def _constraint_problems(constraints: Any) -> list[Problem]:
    if not isinstance(constraints, Mapping):
        return [Problem(f"constraints = {constraints!r}", 'must be upper bounds, e.g. {"model/parameters": 1_000_000}')]
    return [
        Problem(
            f"constraints: {name}",
            f"can't be bounded{did_you_mean(str(name), MEASURES)}",
            f"there are {', '.join(MEASURES)}",
        )
        for name in constraints
        if name not in MEASURES
    ] + [
        Problem(f"constraints: {name} = {bound!r}", "must be a number above 0")
        for name, bound in constraints.items()
        if type(bound) not in (int, float) or not 0 < bound < math.inf
    ]


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is, as a person is told."""

    name: str
    finished: int  # trials that count against the budget
    pruned: int
    failed: int  # or interrupted
    trials: int  # that there will be in all, as it looks now
    best: tuple[int, float] | None  # number and score of a feasible one
    infeasible: int = 0  # completed, or pruned before they were trained
    short: int = 0  # of which none is counted as pruned


def study_progress(study: optuna.Study, finished: int, in_all: int = 0) -> StudyProgress:
    """Of a study of which so many trials have ended, of so many."""
    infeasible = [trial for trial in study.get_trials(deepcopy=False) if not is_feasible(trial)]
    pruned = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    completed = _completed(study)
    short = [trial for trial in pruned if TrialAttributes.of(trial).short and is_feasible(trial)]
    feasible = (trial for trial in completed if is_feasible(trial))
    best = min(feasible, key=lambda trial: (-(trial.value or 0.0), trial.number), default=None)
    return StudyProgress(
        name=study.study_name,
        finished=finished,
        pruned=sum(map(is_feasible, pruned)) - len(short),
        failed=finished - len(completed) - len(pruned),
        trials=in_all,
        best=(best.number, best.value or 0.0) if best else None,
        infeasible=len(infeasible),
        short=len(short),
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
            "infeasible": violations(search.study.constraints, attributes.metrics),
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


def _completed(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def nearest_infeasible(study: optuna.Study, search: Search) -> str:
    """Of infeasible trials the nearest to the bounds, as `constraints.nearest` words it; empty where there are none."""
    measured = [
        (f"trial {trial.number}", TrialAttributes.of(trial).metrics)
        for trial in study.get_trials(deepcopy=False)
        if not is_feasible(trial)
    ]
    return nearest(search.study.constraints, measured) if measured else ""
