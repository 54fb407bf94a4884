"""A study: one question, asked by a search around a base recipe."""

import importlib.util
import json
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.samplers import TPESampler

from pipeline.errors import UserError, did_you_mean
from pipeline.recipe import KIND, Recipe, has_default, kind_field, kinds_with
from pipeline.search.pruner import RecentTrialsPruner
from pipeline.search.space_check import FixedFields, ScriptedTrial, Space, control, describe, explore, extremes, lowest
from pipeline.tracking.study_key import StudyKey

if TYPE_CHECKING:  # it brings torch with it, and a wrong name is to be told at once
    from pipeline.data.prepare import TrainingData

OBJECTIVES = ("val/accuracy", "val/f1_macro")
FOLDER = Path(__file__).resolve().parents[2] / "studies"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The same question on other data: a few changed fields and another number of trials."""

    changes: Mapping[str, Any]
    trials: int


# Digits are few: a study that says nothing else about them is over in a few minutes on two cores.
DEMONSTRATION = Variant(changes={"training.epochs": 8, "training.batch_size": 64}, trials=10)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a module in studies/ defines.

    `space(trial)` asks an Optuna trial for values; a parameter's name is the recipe field that it sets in `base`.
    `version` goes up when space or base change: scores of different questions don't mix in one search.
    """

    question: str
    base: Recipe
    space: Space
    objective: Literal["val/accuracy", "val/f1_macro"]
    trials: int
    patience: int | None = None  # trials without a better score, after which the study stops by itself
    version: int = 1
    variants: Mapping[str, Variant] = field(default_factory=lambda: {"digits": DEMONSTRATION})

    def __post_init__(self) -> None:
        """UserError, a line for each fault."""
        rules = {
            "base": (isinstance(self.base, Recipe), "a Recipe, as parse_recipe makes"),
            "space": (callable(self.space), "a function of a trial"),
            "objective": (self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}"),
            "trials": (isinstance(self.trials, int) and self.trials >= 1, "a whole number of at least 1"),
            "patience": (
                self.patience is None or (isinstance(self.patience, int) and self.patience >= 1),
                "None or a whole number of at least 1",
            ),
            "version": (isinstance(self.version, int) and self.version >= 1, "a whole number of at least 1"),
        }
        lines = [
            f"{name} = {getattr(self, name)!r}: must be {rule}" for name, (kept, rule) in rules.items() if not kept
        ]
        if lines:
            raise UserError(lines)

    def settings(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of all trials: what was said of them, and what suits the data set that was said."""
        from pipeline.data.datasets import default_image_size

        dataset = str(said.get("data.dataset", self.base.data.dataset))
        size = None if dataset == self.base.data.dataset else default_image_size(dataset)
        variant = self.variants.get(dataset)
        return {
            "data.dataset": dataset,
            **({"data.image_size": size} if size else {}),
            **(variant.changes if variant else {}),
            **said,
        }


@dataclass(frozen=True)
class Search:
    """A study resolved for one data set: what is run.

    `settings` are fields that were set for all trials: a data set's, a variant's, EPOCHS, SEED, SET. They are not
    searched, though the space may ask for them. `recipe` is where study, settings and a trial's parameters come together.
    """

    name: str
    study: Study
    settings: Mapping[str, Any]
    version: int
    trials: int
    timeout_s: float | None
    patience: int | None = None
    stored_key: str | None = None  # of the study that goes on; this and the next once `storage.resolved` has looked
    lies_at: str | None = None  # the data set as `load` takes it here, where `base` has the name that it had first

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
        """Put the space's questions to a trial, but those that are answered for all trials."""
        self.study.space(self._seen(trial))

    def _seen(self, trial: Any) -> FixedFields:
        return FixedFields(trial, self._given, self._is_void, self.study.base)

    @cached_property
    def _given(self) -> dict[str, Any]:
        """The settings, as the recipe has them where it has."""
        flat = self.recipe({}).flat()
        return {name: flat.get(name, value) for name, value in self.settings.items()}

    def _is_void(self, name: str) -> bool:
        """Whether the kind that was set for this field's section has no such field."""
        kinds = kinds_with(name)
        return bool(kinds) and self.settings.get(kind_field(name), kinds[0]) not in kinds

    def pruner(self) -> RecentTrialsPruner:
        """What judges the trials; the first WHOLE go on all the same."""
        return RecentTrialsPruner(self.most_epochs)

    def is_exhausted(self, study: optuna.Study) -> bool:
        """Whether the last `patience` trials that ended, in whatever state, gave no score above the best before them."""
        ended = [trial for trial in study.get_trials(deepcopy=False) if counts_toward_budget(trial)]
        if self.patience is None or len(ended) <= self.patience:
            return False
        scores = [trial.value if trial.value is not None else -math.inf for trial in ended]
        return max(scores[-self.patience :]) <= max(scores[: -self.patience]) > -math.inf

    def step(self, epoch: int, recipe: Recipe) -> int:
        """Where a trial stands after an epoch, for the pruner: in epochs of the study's longest trial.

        A short training is ahead of a long one at the same epoch, as its rate has fallen further; so the same share
        of both is compared.
        """
        return round(epoch * self.most_epochs / recipe.training.epochs)

    @cached_property
    def most_epochs(self) -> int:
        """Of any trial, where the space asks for `training.epochs`; else those of all."""
        asked = self.space().get("training.epochs")
        return max(extremes(asked)) if asked else self.base.training.epochs

    def sampler(self, num_asked: int, worker: int = 0) -> TPESampler:
        """TPE; seeded anew at each resume and for each worker, or the first draws would be drawn again."""
        seed = self.base.training.seed * 1_000_003 + num_asked + worker * 15_485_863
        return TPESampler(seed=seed % 2**32, n_startup_trials=min(10, self.trials // 2))

    def fingerprint(self, data: "TrainingData") -> dict[str, Any]:
        """All that the scores of one search have in common; JSON."""
        space, base = self.space(), {**self.settings, **self.base.flat()}
        del base["data.dataset"]  # where the data lies; what it is, its digest says
        del base["data.train_fraction"]  # the split's digest says it, and studies older than the field go on
        del base["training.execution"]  # how, as the device is, not what; and older studies go on
        return {
            "objective": self.study.objective,
            "data": data.digest,
            "split": data.split_digest,
            "base": json.loads(json.dumps(base)),
            "space": {name: distribution_to_json(space[name]) for name in sorted(space)},
        }

    def check(self) -> None:
        """UserError, a line for each fault, where a setting or the space says what can't be, or can't give the base recipe."""
        self.recipe({})
        space = self.space()
        if lines := [
            f"{name} = {self.settings[name]}: no such field where {kind_field(name)} is {_words(kinds, 'or')}; "
            f"{_words(kinds_with(name), 'and')} can have it"
            for name, kinds in self._kinds_without(space).items()
            if len(kinds) == len(self._kinds(name, space))
        ]:
            raise UserError(lines)
        self.control()

    def space(self) -> dict[str, BaseDistribution]:
        """Every parameter that the study can ask for, with its range."""
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
        """A line for each setting that doesn't hold for all trials, and each question or value that settings change."""
        space, before, now = self.space(), self.study.base.flat(), self.base.flat()
        seen = self._seen(ScriptedTrial(self.control(), lowest))
        self.study.space(seen)
        lines = [
            f"{name} = {self.settings[name]}: not where {kind_field(name)} is {_words(kinds, 'or')}, "
            "which can't have it; it holds for all other trials"
            for name, kinds in self._kinds_without(space).items()
        ]
        for section in KIND:
            chosen = kind_field(section)
            kind = now[chosen]
            if chosen not in self.settings or kind == before[chosen]:
                continue
            if void := [name for name in seen.voided if name.startswith(f"{section}.")]:
                lines.append(f"{_words(void, 'and')}: not searched, as {kind} can't have that")
            lines += [
                f"{name} = {now[name]}: the study's value, as {kind} has no default"
                + ("; other trials search it" if name in space else "")
                for name in before
                if name.startswith(f"{section}.") and name in now and name not in self.settings
                if not has_default(name, kind)
            ]
        return lines

    def _kinds(self, name: str, space: Mapping[str, BaseDistribution]) -> list[str]:
        """The kinds that a field's section is of in any trial; none where it comes in no kinds."""
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


def _words(names: Sequence[str], joint: str) -> str:
    """`a, b or c`."""
    return f" {joint} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def available() -> list[str]:
    """The names of the studies in studies/."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if not file.stem.startswith("_"))


def load_study(name: str) -> Study:
    """The study that studies/<name>.py defines; UserError where there is none, or it can't be read."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise UserError(
            f"study name {name!r}: must be small letters, digits, _ and -, and begin with a letter or digit"
        )
    if re.search(r"-v\d+(-|$)", name):
        raise UserError(f"study name {name!r}: must not hold -v and a number, which stand behind it in a study's key")
    if name not in available():
        raise UserError([f"no study {name}{did_you_mean(name, available())}", f"studies: {', '.join(available())}"])
    file = FOLDER / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"studies.{name}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        study = module.STUDY
    except UserError as error:
        raise UserError([f"{file.name}: {line}" for line in error.lines]) from None
    except (Exception, SystemExit) as error:
        place = _line_of(error, file)
        raise UserError(f"{file}{place}: {type(error).__name__}: {str(error) or 'no reason given'}") from error
    if not isinstance(study, Study):
        raise UserError(f"{file}: STUDY is a {type(study).__name__}: must be a pipeline.search.study.Study")
    return study


def check_same(name: str, stored: Mapping[str, Any], now: Mapping[str, Any], version: int) -> None:
    """UserError, with the difference, where a study would go on with another space, base, data set or split."""
    lines = [
        f"{what}: {str(stored.get(what))[:16]} then, {str(now.get(what))[:16]} now"
        for what in ("objective", "data", "split")
        if stored.get(what) != now.get(what)
    ]
    for part, show in (("base", str), ("space", _describe_json)):
        then, today = stored.get(part, {}), now[part]
        lines += [
            f"{part} {key}: {show(then.get(key))} then, {show(today.get(key))} now"
            for key in sorted(then.keys() | today.keys())
            if then.get(key) != today.get(key)
        ]
    if lines:
        lines = [f"study {name} has trials that answer another question:", *(f"  {line}" for line in lines)]
        way = (
            f"VERSION={version + 1} (or `version` in the module) starts a new study beside it; the former values go on"
        )
        raise UserError([*lines, f"way out: {way}"])


def _describe_json(distribution: str | None) -> str:
    return describe(json_to_distribution(distribution)) if distribution else "not asked"


def _line_of(error: BaseException, file: Path) -> str:
    """`, line N` of the study's module, where an error arose there."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f", line {error.lineno}"
    place, traceback = "", error.__traceback__
    while traceback:
        if traceback.tb_frame.f_code.co_filename == str(file):
            place = f", line {traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


def counts_toward_budget(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial counts against the budget: all that ended do, but those asked again."""
    return trial.state.is_finished() and not trial.user_attrs.get("asked_again")


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is, as a person is told."""

    name: str
    finished: int  # trials that count against the budget
    pruned: int
    failed: int  # or interrupted
    best: tuple[int, float] | None  # number and score


def study_progress(study: optuna.Study, finished: int) -> StudyProgress:
    """Of a study of which so many trials have ended."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    pruned = states.count(optuna.trial.TrialState.PRUNED)
    completed = _completed(study)
    best = min(completed, key=lambda trial: (-(trial.value or 0.0), trial.number), default=None)
    return StudyProgress(
        name=study.study_name,
        finished=finished,
        pruned=pruned,
        failed=finished - len(completed) - pruned,
        best=(best.number, best.value or 0.0) if best else None,
    )


def records(study: optuna.Study, search: Search, without: Collection[str] = ()) -> list[dict[str, Any]]:
    """The completed trials as rows of `report.trials.table`, of what a table of the best needs; `run_id` is the run's key.

    From Optuna, which has them all when a study ends; MLflow may be away, or get the last of them later. `without` those
    of these run keys.
    """
    return [
        {
            **{name: _as_text(value) for name, value in search.recipe(trial.params).flat().items()},
            **trial.user_attrs["metrics"],
            "study": study.study_name,
            "trial": trial.number,
            "run_id": trial.user_attrs["run_key"],
            "role": "trial",
            "state": "finished",
            "control": bool(trial.user_attrs.get("control")),
            "objective": search.study.objective,
            "score": trial.value,
            "seconds": trial.user_attrs["seconds"],
            "epochs": trial.user_attrs["epochs"],
        }
        for trial in _completed(study)
        if trial.user_attrs["run_key"] not in without
    ]


def _as_text(value: Any) -> Any:
    """A list as MLflow keeps it; what else a recipe holds as it is."""
    return str(list(value)) if isinstance(value, tuple) else value


def _completed(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
