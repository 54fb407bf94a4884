"""A study's definition, its identity, and how it is found."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from pipeline.cli.common import load_data
from pipeline.data.datasets import load
from pipeline.data.prepare import TrainingData, prepare
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.search import study as study_module
from pipeline.search.study import Search, Study, available, check_same, load_study


def space(trial: Any) -> None:
    trial.suggest_float("optimizer.lr", 0.01, 1, log=True)


@pytest.fixture
def search(small_recipe: Recipe) -> Search:
    study = Study(question="?", base=small_recipe, space=space, objective="val/accuracy", trials=8)
    return Search("tiny", study, {}, version=1, trials=8, timeout_s=None)


def test_fields_of_a_study_are_checked_at_once(small_recipe: Recipe) -> None:
    with pytest.raises(UserError) as caught:
        Study(question="?", base={}, space=3, objective="val/acc", trials=0, patience=0)  # type: ignore[arg-type]
    assert [line.split(" = ")[0] for line in caught.value.lines] == ["base", "space", "objective", "trials", "patience"]


def refusal(search: Search, other: Search, data: TrainingData) -> list[str]:
    stored = json.loads(json.dumps(search.fingerprint(data)))
    with pytest.raises(UserError) as caught:
        check_same(search.key(data), stored, other.fingerprint(data), 1)
    return caught.value.lines


def test_same_search_is_accepted(search: Search, digits: TrainingData) -> None:
    check_same("tiny", json.loads(json.dumps(search.fingerprint(digits))), search.fingerprint(digits), 1)


def test_changed_space_is_refused_with_the_difference(
    search: Search, small_recipe: Recipe, digits: TrainingData
) -> None:
    def wider(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 0.001, 1, log=True)
        trial.suggest_float("optimizer.momentum", 0, 0.95)

    changed = Study(question="?", base=small_recipe, space=wider, objective="val/accuracy", trials=8)
    other = Search("tiny", changed, {}, version=1, trials=8, timeout_s=None)
    assert refusal(search, other, digits) == [
        "study tiny-v1-digits: has trials that answer another question; `--version 2` (or `version` in its module) starts "
        "a new study; the former values resume this one",
        "  space optimizer.lr: 0.01 to 1 (log) then, 0.001 to 1 (log) now",
        "  space optimizer.momentum: not searched then, 0 to 0.95 now",
    ]


def test_changed_base_objective_data_or_split_is_refused(search: Search, digits: TrainingData) -> None:
    stored = search.fingerprint(digits)
    for what in ("objective", "data", "split"):
        with pytest.raises(UserError, match=rf"{what}: other then"):
            check_same("tiny", stored | {what: "other"}, stored, 1)
    longer = Search("tiny", search.study, {"training.epochs": 5}, 1, 8, None)
    assert "  base training.epochs: 2 then, 5 now" in refusal(search, longer, digits)


def test_fraction_of_the_training_images_changes_the_split(
    search: Search, digits: TrainingData, tmp_path: Path
) -> None:
    """The field itself is not in the fingerprint."""
    third = Search("tiny", search.study, {"data.train_fraction": 0.3}, 1, 8, None)
    data = prepare(load("digits", 8, tmp_path), third.base.data, torch.device("cpu"))
    former, current = search.fingerprint(digits), third.fingerprint(data)
    assert {key for key in former if former[key] != current[key]} == {"split"}


def test_execution_is_not_part_of_the_fingerprint(search: Search, digits: TrainingData) -> None:
    graphed = Search("tiny", search.study, {"training.execution": "graphed"}, 1, 8, None)
    assert graphed.fingerprint(digits) == search.fingerprint(digits)


def test_fields_of_later_days_are_not_in_the_fingerprint_at_first(search: Search, digits: TrainingData) -> None:
    """A study of before there were policies is resumed."""
    assert "augmentation.policy" not in search.fingerprint(digits)["base"]
    other = Search("tiny", search.study, {"augmentation.policy": "augmix"}, 1, 8, None)
    assert "  base augmentation.policy: None then, augmix now" in refusal(search, other, digits)


def searched_policies(trial: Any) -> None:
    if trial.suggest_categorical("augmentation.policy", ["custom", "randaugment", "augmix"]) == "custom":
        trial.suggest_float("augmentation.rotation", 0, 30)


def custom_policy(trial: Any) -> None:
    trial.suggest_float("augmentation.rotation", 0, 30)
    trial.suggest_float("augmentation.erasing", 0, 0.5)


@pytest.mark.parametrize(
    ("space", "settings", "remarks"),
    [
        (searched_policies, {"augmentation.crop_padding": 2, "augmentation.erasing": 0.1}, []),
        (
            searched_policies,
            {"augmentation.rotation": 10},
            [
                "augmentation.rotation = 10: not where augmentation.policy is randaugment or augmix, which can't have it; "
                "it applies to all other trials"
            ],
        ),
        (
            custom_policy,
            {"augmentation.policy": "trivialaugment"},
            ["augmentation.rotation: not searched, as trivialaugment can't have that"],
        ),
    ],
)
def test_policies_are_searched_and_set(
    space: Any, settings: dict[str, Any], remarks: list[str], small_recipe: Recipe
) -> None:
    study = Study(question="?", base=small_recipe, space=space, objective="val/accuracy", trials=8)
    search = Search("tiny", study, settings, 1, 8, None)
    search.check()
    assert search.remarks() == remarks
    drawn = search.recipe({"augmentation.policy": "augmix"}).flat()
    assert drawn["augmentation.policy"] == settings.get("augmentation.policy", "augmix")
    assert drawn["augmentation.crop_padding"] == settings.get("augmentation.crop_padding", 1)
    assert "augmentation.rotation" not in drawn


def test_the_number_of_trials_may_change(search: Search, digits: TrainingData) -> None:
    more = Search("tiny", search.study, {}, 1, trials=99, timeout_s=5)
    check_same("tiny", search.fingerprint(digits), more.fingerprint(digits), 1)


def lengths(trial: Any) -> None:
    trial.suggest_float("optimizer.lr", 0.01, 1, log=True)
    trial.suggest_int("training.epochs", 2, 8, step=2)


def with_lengths(recipe: Recipe, **settings: Any) -> Search:
    study = Study(question="?", base=recipe, space=lengths, objective="val/accuracy", trials=8)
    return Search("tiny", study, settings, version=1, trials=8, timeout_s=None)


def test_trials_are_compared_at_equal_fractions_of_their_epochs(small_recipe: Recipe) -> None:
    search = with_lengths(small_recipe)
    short, long = (search.recipe({"training.epochs": epochs}) for epochs in (2, 8))
    assert search.max_epochs == 8
    assert [search.step(epoch, short) for epoch in (1, 2)] == [4, 8]
    assert [search.step(epoch, long) for epoch in (1, 4, 8)] == [1, 4, 8]
    assert search.pruner().rungs == [2, 3, 6]


def test_settings_are_not_searched(small_recipe: Recipe) -> None:
    """So `--epochs` may be outside the space, and a data set's variant too."""
    with pytest.raises(UserError, match=r"training.epochs = 3 in the base recipe: outside the space"):
        with_lengths(small_recipe.changed({"training.epochs": 3})).check()
    search = with_lengths(small_recipe, **{"training.epochs": 3, "data.dataset": "digits"})
    search.check()
    assert list(search.space()) == list(search.control()) == ["optimizer.lr"]
    assert search.max_epochs == 3
    trial = optuna.create_study(sampler=search.sampler(0)).ask()
    search.ask(trial)
    assert list(trial.params) == ["optimizer.lr"]
    assert search.recipe(trial.params).training.epochs == 3


def test_all_searched_executions_are_checked_before_the_start(small_recipe: Recipe, tmp_path: Path) -> None:
    def ways(trial: Any) -> None:
        trial.suggest_categorical("training.execution", ["eager", "graphed"])

    study = Study(question="?", base=small_recipe, space=ways, objective="val/accuracy", trials=8)
    search = Search("tiny", study, {}, 1, 8, None)
    assert [recipe.training.execution for recipe in search.executed()] == ["eager", "graphed"]
    with pytest.raises(UserError, match=r"training.execution = graphed: a graph needs a GPU"):
        load_data(search, tmp_path, torch.device("cpu"))
    eager = replace(search, settings={"training.execution": "eager"})
    assert [recipe.training.execution for recipe in eager.executed()] == ["eager"]


def test_fields_of_searched_kinds_are_in_the_fingerprint(search: Search, digits: TrainingData) -> None:
    """Otherwise a study would be resumed with another value."""
    fingerprints = [replace(search, settings={"optimizer.beta2": beta}).fingerprint(digits) for beta in (0.9, 0.95)]
    assert fingerprints[0] != fingerprints[1]


def test_space_sees_the_setting_and_its_trial(small_recipe: Recipe) -> None:
    seen = []

    def branching(trial: Any) -> None:
        seen.append((trial.suggest_categorical(name="optimizer.name", choices=["sgd", "adam"]), trial.number))

    study = Study(question="?", base=small_recipe, space=branching, objective="val/accuracy", trials=8)
    search = Search("tiny", study, {"optimizer.name": "sgd"}, 1, 8, None)
    search.ask(optuna.create_study().ask())
    assert seen == [("sgd", 0)]


def test_samplers_draw_other_values_after_a_resume(search: Search) -> None:
    def first_draw(num_trials: int) -> float:
        trial = optuna.create_study(sampler=search.sampler(num_trials)).ask()
        return trial.suggest_float("x", 0, 1)

    assert first_draw(0) == first_draw(0) != first_draw(3)


@pytest.mark.parametrize("name", ["", "A", "../x", "a b", "a'b", "-a", "é", "a/b", "a.py", "$(x)", "a\nb", "_x"])
def test_name_outside_the_alphabet_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="must be lower-case letters") as caught:
        load_study(name)
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize("name", ["attention-v2", "a-v1-b"])
def test_name_that_would_make_keys_ambiguous_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="must not contain -v and a number"):
        load_study(name)


def test_unknown_study_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError) as caught:
        load_study("atention")
    assert caught.value.lines[0] == "no study atention (did you mean attention?)"
    assert caught.value.lines[1].startswith("  studies: ")
    assert "attention" in available()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("STUDY = ", "line 1: SyntaxError"),
        ("x = 1\ny = x / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("STUDY = 3\n", "STUDY is a int: must be a pipeline.search.study.Study"),
        ("pass\n", "AttributeError: module 'studies.broken' has no attribute 'STUDY'"),
        ("import nothing_of_that_name\n", "line 1: ModuleNotFoundError"),
        (
            "from pipeline.recipe import parse_recipe\nBASE = parse_recipe({'optimizer': {'name': 'sgd', 'lr': -1}})\n",
            "optimizer.lr = -1: should be greater than 0",
        ),
    ],
)
def test_broken_study_is_refused_with_file_and_line(
    text: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.setattr(study_module, "FOLDER", tmp_path)
    with pytest.raises(UserError) as caught:
        load_study("broken")
    assert any("broken.py" in got and line in got for got in caught.value.lines), caught.value.lines


@pytest.mark.parametrize(
    ("scores", "patience", "exhausted"),
    [
        ([0.5, 0.4, 0.5], 2, True),  # an equal score is no better one
        ([0.5, 0.4, 0.6], 2, False),
        ([0.5, 0.4], 2, False),  # nothing is known of a second half yet
        ([0.5, None, "failed"], 2, True),  # pruned and failed trials count too
        (["failed", "failed", "failed"], 2, False),  # nothing to fall short of
        ([0.5, "requeued", 0.4], 2, False),
        ([0.5, 0.4, 0.3], None, False),
    ],
)
def test_patience_ends_after_trials_without_a_better_score(
    scores: list[Any], patience: int | None, exhausted: bool, search: Search
) -> None:
    study = optuna.create_study(direction="maximize")
    states = {"failed": "FAIL", "requeued": "FAIL", None: "PRUNED"}
    for score in scores:
        state = optuna.trial.TrialState[states.get(score, "COMPLETE")]
        value = score if isinstance(score, float) else None
        attributes = {"requeued": True} if score == "requeued" else {}
        study.add_trial(optuna.trial.create_trial(state=state, value=value, user_attrs=attributes))
    assert replace(search, patience=patience).is_exhausted(study) is exhausted
