"""A study resolved for one data set: the recipes that it can give, how they are drawn, when it ends."""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, GridSampler

from pipeline.errors import Problem, UserError, counted, first_line
from pipeline.recipe import KIND, LATER, Recipe, has_default, kind_field, kinds_with
from pipeline.search.local_search import LocalSearchSampler
from pipeline.search.optuna_internals import allow_stop, num_cells, reseed
from pipeline.search.short_trials import ETA, MIN_EPOCHS, MIN_TRIALS, next_in_full, short_epochs
from pipeline.search.space_check import (
    FixedFields,
    ScriptedTrial,
    control,
    describe,
    explore,
    extremes,
    field_of,
    from_choice,
    lowest,
)
from pipeline.search.study import Study
from pipeline.search.study_attributes import StudyAttributes
from pipeline.search.trial_attributes import TrialAttributes, counts_toward_budget, is_feasible
from pipeline.sections.data import FILE_FIELDS
from pipeline.sections.weights import without_place
from pipeline.tracking.study_key import StudyKey

if TYPE_CHECKING:  # importing it imports torch, and a wrong name has to be refused at once
    from pipeline.data.datasets import Listed
    from pipeline.data.prepare import TrainingData

MAX_STARTS = 4  # trials of a new study that are given, besides the control
MOST_LEFT_OUT = 0.1  # share of the training images that an epoch may miss unsaid
StartFrom = Literal["all", "portfolio", "winners", "none"]


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
    notes: Sequence[str] = ()  # what was chosen for this data set, a line each
    precision: str = ""  # what `training.precision = auto` turned out to be for this study's network, where measured
    start_from: StartFrom = "all"  # what a new study's first trials after the control are given
    prune: bool = True
    listed: "Listed | None" = field(
        default=None, repr=False, compare=False
    )  # the data set's files, by `--dataset`'s look
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
        return recipe.of_length(short_epochs(recipe.training.epochs))

    def pruner(self) -> BasePruner:
        """The study's pruner, or none."""
        return (copy.deepcopy(self.study.pruner) if self.prune else None) or NopPruner()

    def why_exhausted(self, study: optuna.Study) -> str:
        """Why the study stops before its last trial; empty where it doesn't.

        The sampler has nothing more to suggest, and the best of the short trials are in full. Or the last `patience` trials
        that ended, in any state, gave no score above the best before them: the score of an infeasible trial is none, and
        short ones don't count, as they can't give one.
        """
        if self.sampler_is_done(study):
            best = next_in_full(study.get_trials(deepcopy=False), is_exhausted=True) if self.shortens else None
            if best is None:
                return f"the sampler, {self._sampler_kind.__name__}, has nothing more to suggest"
        if self.patience is None:
            return ""
        ended = [
            trial
            for trial in study.get_trials(deepcopy=False)
            if counts_toward_budget(trial) and not TrialAttributes.of(trial).short
        ]
        if len(ended) <= self.patience:
            return ""
        scores = [trial.value if trial.value is not None and is_feasible(trial) else -math.inf for trial in ended]
        if not max(scores[-self.patience :]) <= max(scores[: -self.patience]) > -math.inf:
            return ""
        why = f"the last {self.patience} full trials gave no better score (`--patience`)"
        return f"{why}; the same command with more patience resumes"

    def sampler_is_done(self, study: optuna.Study) -> bool:
        """Whether all that the sampler can suggest was tried."""
        sampler = self.study.sampler
        if isinstance(sampler, GridSampler):  # it may have grown since it stopped
            return sampler.is_exhausted(study)
        return StudyAttributes.of(study).stopped_by == self._sampler_kind.__name__

    @property
    def _sampler_kind(self) -> type[BaseSampler]:
        return type(self.study.sampler) if self.study.sampler else LocalSearchSampler

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
        """The study's sampler, or the default; seeded anew at each resume and in each worker, so that no draw is repeated."""
        sampler = copy.deepcopy(self.study.sampler) or LocalSearchSampler(self.ask, n_startup_trials=MAX_STARTS + 1)
        reseed(sampler, (self.base.training.seed * 1_000_003 + num_trials + worker * 15_485_863) % 2**32)
        return sampler

    def fingerprint(self, data: "TrainingData") -> dict[str, Any]:
        """All that the scores of one search have in common, as JSON."""
        elsewhere = (
            *FILE_FIELDS,  # the data's digest says what the data is
            *("data.train_fraction", "data.folds", "data.fold"),  # parts of the split's digest
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
        """UserError where a network of timm that a trial may have is not known or can't be built, or where images are to
        grow and the control's network doesn't take all their sizes."""
        problems: dict[Problem, None] = {}
        starts = self.values("curriculum.start_size") or [self.recipe({}).curriculum.start_size]
        recipes = [recipe for network in self.networks() for recipe in (network, *self._ends(network))]
        differing = {(recipe.model, recipe.data.image_size): recipe for recipe in recipes}  # each takes a second
        for recipe in differing.values() or ([self.recipe({})] if any(starts) else []):
            from pipeline.models.build import check_network, check_sizes  # imports torch, for these recipes alone
            from pipeline.training.progressive import smaller_sizes

            model, full = recipe.model, recipe.data.image_size
            try:
                check_network(model, full)
                for start in starts:
                    check_sizes(model, full, smaller_sizes(full, start))
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

    def _ends(self, network: Recipe) -> list[Recipe]:
        """What the space gives at all its lower ends, and at all its upper ones, with this network of timm."""
        backbone = network.flat()["model.backbone"]

        def at(end: int) -> Recipe:
            def choose(name: str, asked: BaseDistribution) -> Any:
                return backbone if field_of(name) == "model.backbone" else extremes(asked)[end]

            trial = ScriptedTrial({}, choose)
            self.ask(trial)
            return self.recipe(trial.params)

        return [recipe for recipe in (at(0), at(-1)) if recipe.model.network == "timm"]

    def taught(self) -> list[Recipe]:
        """The control, with each teacher that a trial may have."""
        base = self.recipe({})
        return [base.changed({"loss.teacher": name}) for name in self.values("loss.teacher") or [base.loss.teacher]]

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
        """A line for each setting that does not apply to all trials, and each parameter or value that settings change; where
        the control's head is all that learns; and where short trials can't compare what is searched."""
        original, current = self.study.base.flat(), self.base.flat()
        trial = self._with_settings(ScriptedTrial(self.control(), lowest))
        self.study.space(trial)
        lines = [*self.notes]
        lines += [
            f"{name} = {self.settings[name]}: not where {kind_field(name)} is {_listed(kinds, 'or')}, "
            "which can't have it; it applies to all other trials"
            for name, kinds in self._kinds_without().items()
        ]
        if isinstance(self.study.sampler, GridSampler):
            cells = num_cells(self.study.sampler)
            needed = cells + 1 + (cells // ETA if self.shortens else 0)
            if self.trials < needed:
                lines.append(
                    f"{counted(self.trials, 'trial')} for a grid of {counted(cells, 'cell')}: it is tried in part; with the "
                    f"control{' and what is trained in full' if self.shortens else ''} all take at least {needed}"
                )
        frozen, epochs = self.base.transfer.frozen_epochs, self.base.training.epochs
        if frozen >= epochs:
            lines.append(
                f"transfer.frozen_epochs = {frozen} of {counted(epochs, 'epoch')}: the control's head alone learns"
            )
        lines += self._lost_in_short_trials()
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

    def left_out(self, num_images: int) -> list[str]:
        """A line for each batch size of the space with which an epoch shows clearly fewer than all training images."""
        sizes = sorted({*self.values("training.batch_size"), self.base.training.batch_size})
        rests = {size: num_images % min(size, num_images) for size in sizes}
        return [
            f"training.batch_size = {size}: {rest:,} of {num_images:,} training images ({100 * rest / num_images:.0f} %) "
            "don't fill a batch and are left out of each epoch, others each time"
            for size, rest in rests.items()
            if rest > MOST_LEFT_OUT * num_images
        ]

    def _lost_in_short_trials(self) -> list[str]:
        """A line for each searched count of epochs whose values are all the same in a short trial."""
        lines = []
        for name in self.base.epoch_counts if self.shortens else ():
            full = [self.base.changed({name: value}) for value in sorted(self.values(name))]
            short = [self.short(recipe) for recipe in full]
            if len(full) > 1 and len({recipe.epoch_counts[name] for recipe in short}) == 1:
                first, last = (recipe.epoch_counts[name] for recipe in (full[0], full[-1]))
                lines.append(
                    f"{name} = {first} to {last} of {counted(full[0].training.epochs, 'epoch')}: "
                    f"{short[0].epoch_counts[name]} of {short[0].training.epochs} in short trials, which can't compare them"
                )
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
            if without_place(former.get(key)) != without_place(present.get(key))
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
