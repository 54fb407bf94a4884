"""A search: its identity, what it draws, and when it ends."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import BruteForceSampler, GridSampler, RandomSampler, TPESampler
from optuna.trial import create_trial
from study_harness import rates

from pipeline.cli.common import load_data
from pipeline.data.datasets import load
from pipeline.data.prepare import TrainingData, prepare
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.search.search import Search, check_same
from pipeline.search.study import Study
from pipeline.search.study_attributes import StudyAttributes
from pipeline.sections.data import Data


def space(trial: Any) -> None:
    trial.suggest_float("optimizer.lr", 0.01, 1, log=True)


@pytest.fixture
def search(small_recipe: Recipe) -> Search:
    study = Study(question="?", base=small_recipe, space=space, objective="val/accuracy", trials=8)
    return Search("tiny", study, {}, version=1, trials=8, timeout_s=None)


def with_fields(search: Search, **fields: Any) -> Search:
    return replace(search, study=replace(search.study, **fields))


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


def test_weights_that_moved_are_the_same_question(search: Search, digits: TrainingData) -> None:
    def taught(place: str, sha256: str) -> Search:
        return replace(search, settings={"loss.teacher": f"{place}#sha256={sha256 * 64}"})

    stored = taught("/here", "0").fingerprint(digits)
    check_same("tiny", stored, taught("/there", "0").fingerprint(digits), 1)
    assert any("base loss.teacher" in line for line in refusal(taught("/here", "0"), taught("/here", "1"), digits))


def test_fraction_of_the_training_images_changes_the_split(
    search: Search, digits: TrainingData, tmp_path: Path
) -> None:
    """The field itself is not in the fingerprint."""
    third = Search("tiny", search.study, {"data.train_fraction": 0.3}, 1, 8, None)
    data = prepare(load(Data(dataset="digits", image_size=8), tmp_path), third.base.data, torch.device("cpu"))
    former, current = search.fingerprint(digits), third.fingerprint(data)
    assert {key for key in former if former[key] != current[key]} == {"split"}


def test_execution_is_not_part_of_the_fingerprint(search: Search, digits: TrainingData) -> None:
    graphed = Search("tiny", search.study, {"training.execution": "graphed"}, 1, 8, None)
    assert graphed.fingerprint(digits) == search.fingerprint(digits)


def test_changed_constraint_is_refused_and_none_equals_a_study_before_there_were_any(
    search: Search, digits: TrainingData
) -> None:
    bounded = with_fields(search, constraints={"model/parameters": 9000})
    assert "  constraints model/parameters: None then, 9000 now" in refusal(search, bounded, digits)
    former = search.fingerprint(digits)
    del former["constraints"]
    check_same("tiny", former, search.fingerprint(digits), 1)


def test_sampler_and_pruning_are_not_part_of_the_question(search: Search, digits: TrainingData) -> None:
    other = replace(with_fields(search, sampler=RandomSampler(), pruner=MedianPruner()), prune=False)
    assert other.fingerprint(digits) == search.fingerprint(digits)


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
    assert [search.step(1, search.short(recipe), short=True) for recipe in (short, long)] == [2, 1]
    assert search.step(2, search.short(long), short=True) == 2


def test_a_field_with_several_ranges_is_one_field(small_recipe: Recipe) -> None:
    def labelled(trial: Any) -> None:
        kind = trial.suggest_categorical("optimizer.name", ["sgd", "adamw"])
        trial.suggest_float(f"optimizer.lr@{kind}", *((0.01, 1) if kind == "sgd" else (1e-4, 1e-2)), log=True)

    study = Study(question="?", base=small_recipe, space=labelled, objective="val/accuracy", trials=8)
    search = Search("tiny", study, {}, version=1, trials=8, timeout_s=None)
    assert list(search.space()) == ["optimizer.name", "optimizer.lr@sgd", "optimizer.lr@adamw"]
    assert search.fields == ["optimizer.name", "optimizer.lr"]
    assert search.values("optimizer.lr") == [0.01, 1, 1e-4, 1e-2]
    recipe = search.recipe({"optimizer.name": "adamw", "optimizer.lr@adamw": 2e-3})
    assert (recipe.optimizer.name, recipe.optimizer.lr) == ("adamw", 2e-3)


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


def test_searched_teachers_and_sizes_are_checked_before_the_start(small_recipe: Recipe, tmp_path: Path) -> None:
    """The teachers with the data, which say the classes."""
    (tmp_path / "weights.safetensors").touch()

    def searched(trial: Any) -> None:
        trial.suggest_categorical("loss.teacher", ["none", str(tmp_path)])
        trial.suggest_categorical("curriculum.start_size", [0, 4])

    study = Study(question="?", base=small_recipe, space=searched, objective="val/accuracy", trials=8)
    search = Search("tiny", study, {}, 1, 8, None)
    search.check()
    with pytest.raises(UserError, match=rf"loss.teacher = {tmp_path}: there is no such model any more"):
        load_data(search, tmp_path, torch.device("cpu"))
    flat = replace(search, settings={"model.network": "plain", "model.widths": (4, 8)})
    with pytest.raises(
        UserError, match=r"curriculum.start_size = 4: the network plain, .* takes none of 4 pixels; 0 trains"
    ):
        flat.check()


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


@pytest.mark.parametrize("sampler", [None, TPESampler(), TPESampler(seed=7), RandomSampler(), BruteForceSampler()])
def test_samplers_draw_other_values_after_a_resume_and_in_each_worker(sampler: Any, search: Search) -> None:
    """And the same ones again where nothing differs: a sampler without a seed has the search's."""

    def first_draw(num_trials: int, worker: int = 0) -> float:
        trial = optuna.create_study(sampler=with_fields(search, sampler=sampler).sampler(num_trials, worker)).ask()
        return trial.suggest_float("x", 0, 1, step=1e-6)

    assert first_draw(0) == first_draw(0)
    assert len({first_draw(0), first_draw(3), first_draw(0, 1)}) == 3


def test_a_samplers_own_seed_counts_too(search: Search) -> None:
    first, second = (with_fields(search, sampler=RandomSampler(seed=seed)).sampler(0) for seed in (1, 2))
    draws = [optuna.create_study(sampler=sampler).ask().suggest_float("x", 0, 1) for sampler in (first, second)]
    assert draws[0] != draws[1]


def test_own_pruner_replaces_short_trials_and_no_pruning_both(search: Search) -> None:
    longer = with_fields(search, base=search.study.base.changed({"training.epochs": 4}))
    assert longer.shortens and longer.short(longer.base).training.epochs == 1
    own = with_fields(longer, pruner=MedianPruner(n_startup_trials=9))
    assert not own.shortens and not replace(longer, prune=False).shortens
    assert not search.shortens, "of two epochs"
    assert not replace(longer, trials=5).shortens, "too few trials to compare"
    assert vars(own.pruner()) == vars(own.study.pruner) and isinstance(own.pruner(), MedianPruner)
    assert isinstance(replace(own, prune=False).pruner(), NopPruner)
    assert isinstance(replace(search, prune=False).pruner(), NopPruner)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"sampler": GridSampler({"optimizer.momentum": [0.5, 0.6]})},
            "GridSampler: fails with this study's space (ValueError: The parameter name, optimizer.lr, is not found",
        ),
        (
            {"sampler": BruteForceSampler(), "pruner": MedianPruner()},  # which asks for a step
            "BruteForceSampler and MedianPruner: fails with this study's space (ValueError: FloatDistribution",
        ),
    ],
)
def test_sampler_that_does_not_fit_the_space_is_refused_before_the_start(
    fields: dict[str, Any], line: str, search: Search
) -> None:
    with pytest.raises(UserError) as caught:
        with_fields(search, **fields).check()
    assert caught.value.lines[0].startswith(line)


def test_lists_are_choices(small_recipe: Recipe) -> None:
    """Optuna keeps plain values only, so their JSON text; the space sees lists."""
    seen = []

    def widths(trial: Any) -> None:
        seen.append(trial.suggest_categorical("model.widths", [(4, 8), [8, 16]]))

    search = Search(
        "tiny", Study(question="?", base=small_recipe, space=widths, objective="val/accuracy", trials=3), {}, 1, 3, None
    )
    search.check()
    assert search.control() == {"model.widths": "[4, 8]"}
    study = optuna.create_study(storage="sqlite://", sampler=search.sampler(0))
    for expected in ("[4, 8]", "[8, 16]"):
        study.enqueue_trial({"model.widths": expected})
        trial = study.ask()
        search.ask(trial)
        assert trial.params == {"model.widths": expected} and seen[-1] == json.loads(expected)
        assert list(search.recipe(trial.params).model.widths) == json.loads(expected)
        study.tell(trial, 0.5)


@pytest.mark.parametrize(
    ("scores", "patience", "exhausted"),
    [
        ([0.5, 0.4, 0.5], 2, True),  # an equal score is no better one
        ([0.5, 0.4, 0.6], 2, False),
        ([0.5, 0.4], 2, False),  # nothing is known of a second half yet
        ([0.5, None, "failed"], 2, True),  # pruned and failed trials count too
        ([0.5, "short", "short", 0.4, "short"], 2, False),  # short ones can't give a better score
        (["failed", "failed", "failed"], 2, False),  # nothing to fall short of
        ([0.5, "requeued", 0.4], 2, False),
        ([0.5, 0.4, 0.3], None, False),
    ],
)
def test_patience_ends_after_trials_without_a_better_score(
    scores: list[Any], patience: int | None, exhausted: bool, search: Search
) -> None:
    study = optuna.create_study(direction="maximize")
    states = {"failed": "FAIL", "requeued": "FAIL", "short": "PRUNED", None: "PRUNED"}
    for score in scores:
        state = optuna.trial.TrialState[states.get(score, "COMPLETE")]
        value = score if isinstance(score, float) else None
        attributes = {score: True} if score in ("requeued", "short") else {}
        study.add_trial(optuna.trial.create_trial(state=state, value=value, user_attrs=attributes))
    assert bool(replace(search, patience=patience).why_exhausted(study)) is exhausted


def test_score_of_an_infeasible_trial_does_not_prolong_a_study(search: Search) -> None:
    study = optuna.create_study(direction="maximize")
    for score, above in ((0.5, 0.0), (0.4, -1.0), (0.9, 1.0)):
        study.add_trial(create_trial(value=score, system_attrs={"constraints:model/parameters": above}))
    assert replace(search, patience=2).why_exhausted(study)


def test_sampler_that_stopped_ends_the_study_and_another_one_continues(search: Search) -> None:
    study = optuna.create_study()
    StudyAttributes.update(study, stopped_by="BruteForceSampler")
    assert with_fields(search, sampler=BruteForceSampler()).why_exhausted(study)
    assert not with_fields(search, sampler=RandomSampler()).why_exhausted(study)
    assert not search.why_exhausted(study)


def test_epochs_that_are_all_frozen_are_said(search: Search, small_recipe: Recipe) -> None:
    epochs = small_recipe.training.epochs
    (line,) = replace(search, settings={"transfer.frozen_epochs": epochs}).remarks()
    assert line.startswith(f"transfer.frozen_epochs = {epochs} of {epochs} epochs: the control's head alone learns")
    assert not replace(search, settings={"transfer.frozen_epochs": epochs - 1}).remarks()


@pytest.mark.parametrize(
    ("epochs", "frozen", "short"), [(20, 0, 0), (20, 2, 0), (20, 8, 2), (4, 1, 0), (4, 3, 0), (4, 4, 1), (4, 9, 2)]
)
def test_short_trials_freeze_the_same_share_of_their_epochs(
    epochs: int, frozen: int, short: int, search: Search
) -> None:
    """Of which only the head learns in all epochs where it does so in the full ones."""
    full = search.base.changed({"training.epochs": epochs, "transfer.frozen_epochs": frozen})
    changed = search.short(full).difference(full)
    assert changed.pop("training.epochs") == (epochs // 4, epochs)
    assert changed == ({"transfer.frozen_epochs": (short, frozen)} if frozen else {})


def test_counts_of_epochs_that_short_trials_cannot_compare_are_said(search: Search) -> None:
    def remarks(most: int, **fields: Any) -> list[str]:
        def frozen(trial: Any) -> None:
            trial.suggest_int("transfer.frozen_epochs", 0, most)

        searched = with_fields(search, space=frozen, base=search.base.changed({"training.epochs": 20}))
        return replace(searched, **fields).remarks()

    line = "transfer.frozen_epochs = 0 to 3 of 20 epochs: 0 of 5 in short trials, which can't compare them"
    assert remarks(3) == [line]
    assert remarks(4) == [], "1 of 5"
    assert remarks(3, prune=False) == remarks(3, settings={"transfer.frozen_epochs": 1}) == []


def test_batches_that_leave_out_many_images_are_said(search: Search) -> None:
    def batches(trial: Any) -> None:
        trial.suggest_categorical("training.batch_size", [64, 128, 1024])

    searched = with_fields(search, space=batches)
    (line,) = searched.left_out(1294)
    assert line.startswith("training.batch_size = 1024: 270 of 1,294 training images (21 %) don't fill a batch")
    assert [line.partition(":")[0] for line in searched.left_out(250)] == [
        f"training.batch_size = {size}" for size in (64, 128)
    ], "a batch of more images than there are has all"
    assert searched.left_out(45_000) == []
    assert len(replace(searched, settings={"training.batch_size": 1000}).left_out(1294)) == 1


def test_networks_of_timm_are_checked_with_the_search(small_recipe: Recipe) -> None:
    def backbones(trial: Any) -> None:
        trial.suggest_categorical("model.backbone", ["test_resnet", "test_resnot", "resnet19"])

    base = small_recipe.changed({"model.network": "timm", "model.backbone": "test_resnet", "data.image_size": 32})
    study = Study(question="?", base=base, space=backbones, objective="val/accuracy", trials=8)
    with pytest.raises(UserError) as caught:
        Search("tiny", study, {}, 1, 8, None).check()
    assert [line.partition(":")[0] for line in caught.value.lines] == [
        "model.backbone = test_resnot",
        "model.backbone = resnet19",
    ]


def test_networks_are_checked_at_both_ends_of_the_space(small_recipe: Recipe) -> None:
    """The control has no stochastic depth, and a size that suits it."""

    def space(trial: Any) -> None:
        backbone = trial.suggest_categorical("model.backbone", ["test_resnet", "vgg11", "test_vit"])
        if backbone != "vgg11" or asks_vgg:
            trial.suggest_float("model.drop_path", 0, 0.3)
        trial.suggest_int("data.image_size", 32, 40 if asks_vgg else 32, step=8)

    base = small_recipe.changed({"model.network": "timm", "model.backbone": "test_resnet", "data.image_size": 32})
    study = Study(question="?", base=base, space=space, objective="val/accuracy", trials=8)
    asks_vgg = False
    Search("tiny", study, {}, 1, 8, None).check()
    asks_vgg = True
    with pytest.raises(UserError) as caught:
        Search("tiny", study, {}, 1, 8, None).check()
    vgg, vit = caught.value.lines
    assert vgg.startswith("model.backbone = vgg11: can't be built with data.image_size 40, model.drop_path 0.3")
    assert vgg.endswith("unexpected keyword argument 'drop_path_rate'; `--set model.drop_path=0`")
    assert vit.startswith("model.backbone = test_vit: can't be built with data.image_size 40")
    assert vit.endswith("its own size is `--set data.image_size=160`")
    Search("tiny", study, {"model.drop_path": 0.0, "data.image_size": 32}, 1, 8, None).check()


def test_a_grid_with_more_cells_than_trials_is_said(small_recipe: Recipe) -> None:
    grid = GridSampler({"optimizer.lr": [1e-3, 1e-2, 0.1, 1.0], "optimizer.momentum": [0.5, 0.6]})
    study = Study(question="?", base=small_recipe, space=rates, objective="val/accuracy", trials=8, sampler=grid)
    search = Search("lab", study, {}, version=1, trials=8, timeout_s=None)
    assert search.remarks() == [
        "8 trials for a grid of 8 cells: it is tried in part; with the control all take at least 9"
    ]
    assert not replace(search, trials=9).remarks()
    long = replace(search, study=replace(study, base=small_recipe.changed({"training.epochs": 8})))
    (line,) = replace(long, trials=10).remarks()
    assert line.endswith("with the control and what is trained in full all take at least 11")
    assert not replace(long, trials=11).remarks()
