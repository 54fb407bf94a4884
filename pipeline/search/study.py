"""A study: one question, asked by a search around a base recipe; what a module in studies/ defines."""

import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from pipeline.errors import Problem, UserError, did_you_mean
from pipeline.evaluation.constraints import MEASURES
from pipeline.evaluation.scores import OBJECTIVES, Objective
from pipeline.recipe import Recipe
from pipeline.search.portfolio import PORTFOLIO, fields_for
from pipeline.search.space_check import Space

if TYPE_CHECKING:  # importing it imports torch, and a wrong name has to be refused at once
    from pipeline.data.listing import Listing

PHOTO_SIZE = 64  # pixels; of a folder of larger images, for networks made for 32
# Largest elongation, long by short side -> what suits such images: a crop of 2:1 would lose half of them.
GEOMETRIES = {1.1: "squash", 1.6: "crop", math.inf: "pad"}
FOLDER = Path(__file__).resolve().parents[2] / "studies"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The same question on other data: a few changed fields and another number of trials."""

    changes: Mapping[str, Any]
    trials: int

    def lines(self, dataset: str, given: Collection[str]) -> list[str]:
        """What it changes for this data set, as a line: of the fields, and `trials`, those that are not given otherwise."""
        parts = [] if "trials" in given else [f"trials={self.trials}"]
        parts += [f"{name}={value}" for name, value in self.changes.items() if name not in given]
        line = f"{dataset} has a variant of this study: {' '.join(parts)} for all trials; "
        return (
            [f"{line}`--trials`, `--epochs` and `--set` change it, for good `variants` in its module"] if parts else []
        )


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
    sampler: BaseSampler | None = None  # None: see local_search
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

    def suited_to(self, listing: "Listing", settings: Mapping[str, Any]) -> tuple["Study", str]:
        """The study with a base that suits the images of a listing, by a look at their sizes; and a line that says it.

        What the settings say already is not chosen here.
        Networks for photos keep their study's size; those for small images get PHOTO_SIZE where the images have it.
        """
        from pipeline.data.files import look

        sizes = look(listing)
        if sizes is None:
            return self, ""
        shape = next(geometry for most, geometry in GEOMETRIES.items() if sizes.elongation <= most)
        size = self.base.data.image_size
        if self.base.model.network != "timm" and min(sizes.width, sizes.height) >= PHOTO_SIZE:
            size = max(size, PHOTO_SIZE)
        suiting = {"data.image_size": size, "data.geometry": shape}
        chosen = {field: value for field, value in suiting.items() if field not in settings}
        if not chosen:
            return self, ""
        line = (
            f"images of {sizes.width} x {sizes.height} pixels, long by short side {sizes.elongation:.2f} (medians of "
            f"{sizes.num_images} looked at): the control has {' '.join(f'{f}={v}' for f, v in chosen.items())}; `--set` "
            "chooses others for all trials"
        )
        return replace(self, base=self.base.changed(chosen)), line

    def _problems_of_starts(self) -> list[Problem]:
        problems = []
        for name, changes in self.starts.items():
            try:
                self.base.changed(fields_for(self.base, changes))
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


def available() -> list[str]:
    """The names of the studies in studies/."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if not file.stem.startswith("_"))


def load_study(name: str) -> Study:
    """The study that studies/<name>.py defines; UserError where there is none, or it can't be read."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        rule = "must be lower-case letters, digits, _ and -, and begin with a letter or digit"
        raise UserError(f"study name {name!r}", rule)
    if key := re.fullmatch(r"(.+?)-v(\d+)(-.*)?", name):
        rule = "is a whole key, or contains -v and a number, which follow a study's name in its key"
        remedy = f"`study {key[1]} --version {key[2]}` resumes it, with the `--dataset` that it had"
        raise UserError(f"study name {name!r}", rule, remedy)
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
    except UserError as error:
        problems = [replace(problem, subject=f"{file.name}: {problem.subject}") for problem in error.problems]
        raise UserError.many(problems) from None
    except (Exception, SystemExit) as error:
        rule = f"{type(error).__name__}: {str(error) or 'no reason given'}"
        raise UserError(f"{file}{_line_of(error, file)}", rule) from error
    if not hasattr(module, "STUDY"):
        raise UserError(str(file), "defines no STUDY", "end it with `STUDY = Study(...)`, see pipeline/README.md")
    if not isinstance(module.STUDY, Study):
        raise UserError(str(file), f"STUDY is a {type(module.STUDY).__name__}: must be a pipeline.search.study.Study")
    return module.STUDY


def _line_of(error: BaseException, file: Path) -> str:
    """`, line N` of a study's module, where an error was raised through it."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f", line {error.lineno}"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(file)]
    return f", line {lines[-1]}" if lines else ""
