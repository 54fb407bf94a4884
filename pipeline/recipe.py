"""What a run is: an immutable, validated value, JSON both ways, with a digest.

The dotted name of a field (`optimizer.lr`) is also the name of a search parameter and of an MLflow parameter column.
The fields are those of `sections/`. A section that comes in kinds (`model.network`, `augmentation.policy`,
`optimizer.name`, `schedule.name`, `loss.name`) has just the fields of its kind.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Any, Self, get_args

from pydantic import ValidationError, model_validator

from pipeline.errors import NO_SUCH_FIELD, Problem, UserError, did_you_mean, validation_problems
from pipeline.sections.augmentation import AnyAugmentation, Augmentation, Custom
from pipeline.sections.curriculum import Curriculum
from pipeline.sections.data import COLUMNS, Data
from pipeline.sections.loss import AnyLoss, CrossEntropy, Loss
from pipeline.sections.model import Model
from pipeline.sections.optimizer import Optimizer
from pipeline.sections.schedule import AnySchedule, Cosine
from pipeline.sections.section import Section
from pipeline.sections.training import Training
from pipeline.sections.transfer import Transfer
from pipeline.sections.weights import without_place

# The field of a section that says which kind it is; a change of kind starts from that kind's defaults.
KIND = {"model": "network", "augmentation": "policy", "optimizer": "name", "schedule": "name", "loss": "name"}
# Section -> kind -> the class that holds it.
_KINDS: dict[str, dict[str, type[Section]]] = {
    section: {kind.model_fields[KIND[section]].default: kind for kind in get_args(get_args(union)[0])}
    for section, union in {
        "model": Model,
        "augmentation": AnyAugmentation,
        "optimizer": Optimizer,
        "schedule": AnySchedule,
        "loss": AnyLoss,
    }.items()
}
# Section -> fields that mean the same in each of its kinds: a change of kind keeps their values.
_KEPT = {"augmentation": frozenset(Augmentation.model_fields), "loss": frozenset(Loss.model_fields)}
_TAGS = frozenset(kind for kinds in _KINDS.values() for kind in kinds) | {"probability", "alternating"}


def kind_field(name: str) -> str:
    """The dotted name of the field that says a section's kind, from the name of the section or of one of its fields."""
    section = name.partition(".")[0]
    return f"{section}.{KIND[section]}"


def kinds_with(name: str) -> list[str]:
    """The kinds of a section that have the field of this dotted name; none for a section without kinds."""
    section, _, field = name.partition(".")
    return [kind for kind, fields in _KINDS.get(section, {}).items() if field in fields.model_fields]


def has_default(name: str, kind: str) -> bool:
    """Whether the field of this dotted name has a default in this kind, which has the field."""
    section, _, field = name.partition(".")
    return not _KINDS[section][kind].model_fields[field].is_required()


def field_label(name: str) -> str:
    """A dotted field for a reader: without its section; a kind is called by its section: `optimizer.name` -> `optimizer`."""
    section, _, field = name.partition(".")
    return section if KIND.get(section) == field else field.replace("_", " ")


def value_label(value: Any) -> str:
    """A field's value for a reader: a number in three digits, a whole one in all of them; yes and no for flags."""
    if str(value) in ("True", "False"):  # numpy's too
        return "yes" if str(value) == "True" else "no"
    if not isinstance(value, Real):
        return str(value)
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"


# Fields added later, with the value that equals the behaviour before: with it they are left out of the digest.
LATER = {
    "data.train_fraction": 1.0,
    "data.folds": 0,
    "data.fold": 0,
    "data.test_fraction": 0.1,
    "data.columns": ",".join(COLUMNS),
    "data.duplicates": "drop",
    "data.corrupt": "refuse",
    "data.geometry": "squash",
    "data.crop_scale": 0.35,
    "data.sampler": "uniform",
    "data.sampler_power": 1.0,
    "loss.name": "cross_entropy",
    "loss.class_weights": 0.0,
    "model.attention": "cbam",
    "augmentation.policy": "custom",
    "augmentation.consistency": 0.0,
    "training.execution": "eager",
    "loss.teacher": "none",
    "loss.teacher_weight": 0.9,
    "loss.temperature": 4.0,
    "curriculum.start_size": 0,
    "curriculum.start_strength": 1.0,
    "curriculum.until": 0.8,
    "transfer.frozen_epochs": 0,
    "transfer.frozen_share": 0.0,
    "transfer.layer_decay": 1.0,
    "transfer.head_multiple": 1.0,
    "transfer.weights": "none",
}


class Recipe(Section):
    """Everything that a run depends on but the data's bytes, the code and the machine."""

    data: Data = Data()
    model: Model
    augmentation: AnyAugmentation = Custom()
    optimizer: Optimizer
    schedule: AnySchedule = Cosine()
    loss: AnyLoss = CrossEntropy()
    transfer: Transfer = Transfer()
    curriculum: Curriculum = Curriculum()
    training: Training

    @model_validator(mode="after")
    def _network_fits(self) -> Self:
        halvings, size = self.model.halvings, self.data.image_size
        if size < 2**halvings:
            raise ValueError(
                f"model.network {self.model.network} halves images {halvings} times: data.image_size {size} must be at "
                f"least {2**halvings}, or model.widths fewer"
            )
        return self

    @model_validator(mode="after")
    def _images_grow(self) -> Self:
        start, size, halvings = self.curriculum.start_size, self.data.image_size, self.model.halvings
        if start > size or 0 < start < 2**halvings:
            raise ValueError(
                f"curriculum.start_size {start}: must be 0, or from {2**halvings} (model.network {self.model.network} "
                f"halves images {halvings} times) to data.image_size {size}"
            )
        return self

    @model_validator(mode="after")
    def _mirror_fits(self) -> Self:
        padding, size = self.augmentation.crop_padding, self.data.image_size
        if self.augmentation.crop_mode == "reflect" and padding >= size:
            raise ValueError(
                f"augmentation.crop_padding {padding} mirrors images of data.image_size {size}: must be smaller"
            )
        return self

    def flat(self) -> dict[str, Any]:
        """Dotted field name -> value, of every field."""
        return {
            f"{section}.{field}": value
            for section, fields in self.model_dump().items()
            for field, value in fields.items()
        }

    @property
    def rates(self) -> dict[str, float]:
        """Dotted field -> learning rate, of each that the optimizer has; Muon has three."""
        return {name: value for name, value in self.flat().items() if re.fullmatch(r"optimizer\.(\w+_)?lr", name)}

    @property
    def epoch_counts(self) -> dict[str, int]:
        """Dotted field -> count, of each field that counts epochs, the length of the training too."""
        return {name: value for name, value in self.flat().items() if re.fullmatch(r"\w+\.(\w+_)?epochs", name)}

    def of_length(self, epochs: int) -> "Recipe":
        """A copy that trains for so many epochs, with all counts of epochs in proportion, as fields that are shares are.

        Rounded down: what holds for a part of this training never holds for the whole of the other one.
        """
        full = self.training.epochs
        return self.changed({name: count * epochs // full for name, count in self.epoch_counts.items()})

    def changed(self, changes: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> "Recipe":
        """A copy with some dotted fields changed, validated together.

        Changing a section's kind (`optimizer.name`) starts that section from the new kind's defaults; a field keeps its
        value, where it has any, if it has no default or is one that all policies of augmentation share. `settings`
        override `changes`: they are applied last, as far as the section's kind then has such a field. Raises UserError
        with a problem for each fault.
        """
        settings = settings or {}
        sections = self.model_dump()
        assigned = {**changes, **settings}
        known = {name: value for name, value in assigned.items() if name.partition(".")[0] in sections and "." in name}
        problems = [Problem(name, NO_SUCH_FIELD) for name in assigned if name not in known]
        for section, field in KIND.items():
            kind = known.get(f"{section}.{field}", sections[section][field])
            if kind != sections[section][field]:
                sections[section] = _section_of_kind(section, kind, sections[section])
        for dotted, value in known.items():
            section, _, field = dotted.partition(".")
            kinds = kinds_with(dotted)
            if dotted not in settings or not kinds or sections[section][KIND[section]] in kinds:
                sections[section][field] = value
        try:
            recipe = parse_recipe(sections)
        except UserError as error:
            problems += error.problems
        if problems:
            raise UserError.many([self._with_hint(problem) for problem in problems])
        return recipe

    def _with_hint(self, problem: Problem) -> Problem:
        """For an unknown field, the kinds that have it, or the known one that may be meant: of its section, or of all."""
        if problem.rule != NO_SUCH_FIELD:
            return problem
        if kinds := kinds_with(problem.subject):
            return replace(problem, remedy=f"{kind_field(problem.subject)} {' or '.join(kinds)} has it")
        section, _, field = problem.subject.partition(".")
        siblings = [name.partition(".")[2] for name in self.flat() if name.startswith(f"{section}.")]
        if siblings:
            hint = did_you_mean(field, siblings).replace("mean ", f"mean {section}.")
        else:
            same = [name for name in self.flat() if name.endswith(f".{section}")]  # named without its section
            hint = f" (did you mean {same[0]}?)" if same else did_you_mean(problem.subject, self.flat())
        listed = f"`fields {section}` lists its fields" if siblings else "`fields` lists all"
        return replace(problem, rule=problem.rule + hint, remedy="" if hint else listed)

    def difference(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """Dotted field -> (this recipe's value, the other's) where they differ; None where a kind has no such field."""
        fields, others = self.flat(), other.flat()
        return {
            name: (fields.get(name), others.get(name))
            for name in fields | others
            if fields.get(name) != others.get(name) or (name in fields) != (name in others)
        }

    def to_json(self) -> str:
        """Readable JSON; `parse_recipe` takes it back."""
        return self.model_dump_json(indent=2)

    def digest(self) -> str:
        """64 hexadecimal digits that change with any field; of a file of weights with its content, not with its place."""
        sections = self.model_dump(mode="json")
        for section, field in (name.split(".") for name, before in LATER.items() if self.flat().get(name) == before):
            del sections[section][field]
            if not sections[section]:
                del sections[section]
        wherever = {
            section: {field: without_place(value) for field, value in fields.items()}
            for section, fields in sections.items()
        }
        canonical = json.dumps(wherever, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _section_of_kind(section: str, kind: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a new kind: its defaults, and from `before` the fields that have none or mean the same."""
    fields = _KINDS[section][kind].model_fields if isinstance(kind, str) and kind in _KINDS[section] else {}
    return {KIND[section]: kind} | {
        name: before[name]
        for name, field in fields.items()
        if name in before and (field.is_required() or name in _KEPT.get(section, ()))
    }


def parse_recipe(source: str | bytes | Mapping[str, Any]) -> Recipe:
    """A recipe from JSON text or nested dictionaries; UserError with a problem for each fault."""
    try:
        if isinstance(source, (str, bytes)):
            return Recipe.model_validate_json(source)
        return Recipe.model_validate(source)
    except ValidationError as error:
        raise UserError.many(validation_problems(error, _TAGS)) from None
