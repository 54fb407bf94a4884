"""Every study that comes with the project keeps what studies promise."""

import ast
import itertools
import random
import re
import shutil
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import pytest
from conftest import SHIPPED_STUDIES
from optuna.distributions import CategoricalDistribution
from optuna.trial import FixedTrial
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from pipeline.errors import UserError
from pipeline.recipe import KIND, Recipe, kind_field, kinds_with
from pipeline.search.search import Search
from pipeline.search.space_check import ScriptedTrial, control, extremes, field_of
from pipeline.search.study import FOLDER, Study, load_study


@pytest.mark.parametrize("name", SHIPPED_STUDIES)
def test_control_is_the_base_recipe(name: str) -> None:
    study = load_study(name)
    params = control(study.space, study.base)
    assert search_with_own_data(name).recipe(params).digest() == study.base.digest()
    study.space(FixedTrial(params))


@pytest.mark.parametrize("name", SHIPPED_STUDIES)
def test_every_variant_is_a_valid_base_inside_the_space(name: str) -> None:
    study = load_study(name)
    for dataset, variant in study.variants.items():
        Search(name, study, study.settings({"data.dataset": dataset}), 1, variant.trials, None).check()
        assert variant.trials >= 8


VALUES = [
    0.07,
    0.31,
    3,
    5,
    16,
    (16, 16, 16),
    "constant",
    "reflect",
    "alternating",
    "balanced",
    "bf16",
    "compiled",
    "default",
    f"/teacher#sha256={'0' * 64}",
    "pad",
    "path,label,split,patient",
    "none",
    "keep",
    "skip",
]
DRAWS = 24


def kinds_of(section: str) -> list[Any]:
    """The section's class, or those of its kinds."""
    annotation = Recipe.model_fields[section].annotation
    return list(typing.get_args(annotation)) or [annotation]


def other_value(field: FieldInfo, before: object) -> Any:
    """A value that the field takes, and doesn't have."""
    if field.annotation is bool:
        return not before
    valid = TypeAdapter(Annotated[field.annotation, "a field", *field.metadata])
    for value in VALUES:
        try:
            if valid.validate_python(value) != before:
                return value
        except ValidationError:
            continue
    raise AssertionError(f"{field}: none of VALUES is a valid other value")


def settable(base: Recipe) -> list[dict[str, Any]]:
    """Every field of every kind but the kinds and the data set, with another value; one of each section at a time."""
    flat, columns = base.flat(), []
    for section in Recipe.model_fields:
        fields = {f"{section}.{name}": info for kind in kinds_of(section) for name, info in kind.model_fields.items()}
        # A fold needs data.folds, and the first size suits image and network.
        for name in (f"{section}.{KIND.get(section)}", "data.dataset", "data.fold", "curriculum.start_size"):
            fields.pop(name, None)
        columns.append([(name, other_value(info, flat.get(name, info.default))) for name, info in fields.items()])
    return [dict(filter(None, row)) for row in itertools.zip_longest(*columns)]


def drawn(search: Search) -> Iterator[Recipe]:
    """The recipes of the control and of random trials."""
    rng = random.Random(0)
    yield search.recipe(search.control())
    for _ in range(DRAWS):
        trial = ScriptedTrial({}, lambda name, distribution: rng.choice(extremes(distribution)))
        search.ask(trial)
        yield search.recipe(trial.params)


def search_with(study: Study, settings: Mapping[str, Any]) -> Search:
    """With the settings that suit digits, too."""
    return Search("any", study, study.settings({"data.dataset": "digits", **settings}), 1, 8, None)


def search_with_own_data(name: str) -> Search:
    study = load_study(name)
    return Search(name, study, {}, 1, study.trials, None)


def check_that_settings_hold(search: Search) -> set[str]:
    """In the recipe of every trial whose kind has such a field; the kinds that were drawn."""
    seen = set()
    for recipe in drawn(search):
        flat = recipe.flat()
        seen |= {str(flat[kind_field(section)]) for section in KIND}
        for name, value in search.settings.items():
            if name in flat:
                assert flat[name] == value, (name, value, flat)
            else:
                assert kinds_with(name), name
                assert flat[kind_field(name)] not in kinds_with(name), (name, value, flat)
    return seen


@pytest.mark.parametrize("name", SHIPPED_STUDIES)
def test_settings_are_in_all_recipes_that_can_have_them(name: str) -> None:
    study, seen = load_study(name), set()
    for said in settable(study.base):
        seen |= check_that_settings_hold(search_with(study, said))
    kinds = [search_with_own_data(name).values(kind_field(section)) for section in KIND]
    assert seen >= set(itertools.chain(*kinds)), "every kind was drawn"


@pytest.mark.parametrize("name", SHIPPED_STUDIES)
def test_set_kind_is_in_all_trials(name: str) -> None:
    study = load_study(name)
    for section, field in KIND.items():
        for kind in kinds_of(section):
            own = kind.model_fields[field].default
            search = search_with(study, {f"{section}.{field}": own})
            check_that_settings_hold(search)
            if section == "optimizer":
                search.check()
                assert search.values("optimizer.lr")


@pytest.mark.parametrize(
    ("name", "settings", "remarks"),
    [
        ("attention", {"optimizer.weight_decay": 0.001}, []),
        (
            "attention",
            {"schedule.warmup": 0.25},
            ["schedule.warmup = 0.25: not where schedule.name is one_cycle, which can't have it"],
        ),
        ("plain", {"optimizer.lr": 0.02}, []),
        (
            "plain",
            {"optimizer.name": "sgd"},
            ["optimizer.lr = 0.005: nearest to the study's value, as sgd has no default; other trials search it"],
        ),
        (
            "fast",
            {"optimizer.name": "adamw", "optimizer.lr": 0.01},
            ["optimizer.momentum, optimizer.bias_lr, optimizer.head_lr and optimizer.sgd_momentum: not searched"],
        ),
    ],
)
def test_settings_that_do_not_apply_to_all_are_reported(
    name: str, settings: dict[str, Any], remarks: list[str]
) -> None:
    search = search_with(load_study(name), settings)
    search.check()
    lines = search.remarks()
    assert len(lines) == len(remarks)
    assert all(line.startswith(start) for line, start in zip(lines, remarks, strict=True)), lines


def test_setting_that_no_trial_can_have_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        search_with(load_study("cct"), {"optimizer.sgd_momentum": 0.5, "model.dilation": 2}).check()
    assert caught.value.lines == [
        "optimizer.sgd_momentum = 0.5: no such field where optimizer.name is adamw or sgd; muon can have it",
        "model.dilation = 2: no such field where model.network is cct; efficient can have it",
    ]


@pytest.mark.parametrize("name", SHIPPED_STUDIES)
def test_augmentation_optimizer_and_schedule_are_searched(name: str) -> None:
    space = search_with_own_data(name).space()
    fields = {field_of(parameter) for parameter in space}
    assert {"augmentation", "optimizer", "schedule"} <= {field.partition(".")[0] for field in fields}
    rates = [
        asked for parameter, asked in space.items() if field_of(parameter) in ("optimizer.lr", "optimizer.weight_decay")
    ]
    assert all(rate.log for rate in rates if not isinstance(rate, CategoricalDistribution)), "rates: on a log scale"
    if name != "fast":  # its question is how to use Muon, not whether
        assert f"optimizer.{KIND['optimizer']}" in fields


@pytest.mark.parametrize("name", SHIPPED_STUDIES)
def test_docstring_states_question_command_cost_and_result(name: str) -> None:
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    assert text.splitlines()[0].endswith("?")
    assert f"make study NAME={name}" in text
    assert "Cost" in text
    assert "result" in text.lower()


def test_example_of_the_readme_is_a_study_with_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (FOLDER.parent / "README.md").read_text()
    [code], [name] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL), re.findall(r"as `studies/(\w+).py`", readme)
    taken = {*SHIPPED_STUDIES, *(kind.model_fields["name"].default for kind in kinds_of("optimizer"))}
    assert name not in taken and f"NAME={name}" in readme
    folder = shutil.copytree(FOLDER, tmp_path / "studies")
    (folder / f"{name}.py").write_text(code)
    monkeypatch.setattr("pipeline.search.study.FOLDER", folder)
    search_with_own_data(name).check()
    functions = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)]
    assert all(node.returns and all(each.annotation for each in node.args.args) for node in functions), "make check"


def test_plain_searches_around_its_authors_lessons() -> None:
    space = search_with_own_data("plain").space()
    rotation_more_dropout_longer = {
        "augmentation.rotation": 0,
        "augmentation.erasing": 0,
        "augmentation.mixup": 0,
        "model.convolution_dropout": 0,
        "training.epochs": 15,
    }
    for name, lowest in rotation_more_dropout_longer.items():
        low, *_, high = extremes(space[name])
        assert low == lowest and high > low, name


def test_control_of_attention_is_the_published_recipe() -> None:
    flat = load_study("attention").base.flat()
    published = {
        "model.widths": (31, 62, 124, 248),
        "model.dropout": 0.3,
        "augmentation.crop_mode": "reflect",
        "augmentation.rotation": 15,
        "augmentation.mixup": 0.3,
        "augmentation.cutmix": 0.3,
        "optimizer.name": "sgd",
        "optimizer.lr": 0.1,
        "optimizer.weight_decay": 5e-4,
        "schedule.name": "cosine",
        "training.batch_size": 128,
        "training.ema_decay": 0.999,
    }
    assert {name: flat[name] for name in published} == published
