"""What a new study's first trials are given."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import GridSampler
from optuna.trial import TrialState, create_trial
from study_harness import StudyHarness, attributes_of

from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.search.portfolio import PORTFOLIO
from pipeline.search.run_study import run_study
from pipeline.search.search import MAX_STARTS, Search
from pipeline.search.space_check import nearest_value, to_choice
from pipeline.search.starts import nearest, not_as_named, starts
from pipeline.search.stored_study import open_study
from pipeline.search.study import Study, load_study
from pipeline.search.study_attributes import StudyAttributes
from pipeline.search.suggest import suggest_optimizer
from pipeline.search.trial_attributes import TrialAttributes


def space(trial: Any) -> None:
    trial.suggest_int("augmentation.crop_padding", 0, 3, step=3)
    kind = trial.suggest_categorical("optimizer.name", ["sgd", "adamw"])
    trial.suggest_float(f"optimizer.lr@{kind}", 0.01, 0.05, log=True)
    if kind == "sgd":
        trial.suggest_categorical("optimizer.weight_decay", [0, 1e-4, 1e-2])


def a_search(recipe: Recipe, trials: int = 20, settings: Mapping[str, Any] | None = None, **fields: Any) -> Search:
    base = recipe.changed({"augmentation.crop_padding": 0, "optimizer.lr": 0.02, "optimizer.weight_decay": 0})
    study = Study(
        question="?", base=base, space=fields.pop("space", space), objective="val/accuracy", trials=1, **fields
    )
    return Search("tiny", study, settings or {}, 1, trials, None)


def test_the_nearest_parameters_are_the_ends_steps_and_choices_next_to_what_is_wanted(small_recipe: Recipe) -> None:
    search = a_search(small_recipe)
    wanted = {"augmentation.crop_padding": 2, "optimizer.lr": 0.1, "optimizer.weight_decay": 5e-4}
    assert nearest(search, wanted) == {
        "augmentation.crop_padding": 3,
        "optimizer.name": "sgd",
        "optimizer.lr@sgd": 0.05,
        "optimizer.weight_decay": 1e-4,
    }
    adamw = {"optimizer.name": "adamw", "optimizer.lr": 0.03}
    assert nearest(search, adamw) == {
        "augmentation.crop_padding": 0,
        "optimizer.name": "adamw",
        "optimizer.lr@adamw": 0.03,
    }


def test_a_kind_that_the_trials_cannot_have_is_not_started_with(small_recipe: Recipe) -> None:
    adam = {"optimizer.name": "adam", "optimizer.lr": 0.03}
    assert nearest(a_search(small_recipe), adam) is None
    fixed = a_search(small_recipe, settings={"optimizer.name": "adamw"})
    assert nearest(fixed, {"optimizer.name": "sgd", "optimizer.lr": 0.03}) is None
    assert nearest(fixed, {"optimizer.lr": 0.03}) == {"augmentation.crop_padding": 0, "optimizer.lr@adamw": 0.03}


def test_starts_are_each_given_once_and_not_as_the_control_is(small_recipe: Recipe) -> None:
    two = {"optimizer.lr": 0.03}
    search = a_search(small_recipe, starts={"one": {}, "two": two, "three": two, "four": {"optimizer.lr": 0.04}})
    assert [start.source for start in starts(search, "all", [])] == ["study: two", "study: four"]
    assert starts(search, "none", []) == starts(search, "winners", []) == []


def test_a_start_that_is_not_given_as_named_is_said(small_recipe: Recipe) -> None:
    named = {
        "as it is": {"optimizer.lr": 0.04},
        "too high": {"optimizer.lr": 0.1, "augmentation.crop_padding": 3, "loss.label_smoothing": 0.2},
        "control": {},
    }
    search = a_search(small_recipe, starts=named)
    high, unasked, control = not_as_named(search, starts(search, "all", []))
    assert high == "start too high: optimizer.lr = 0.1 is not in the space; it gets 0.05"
    assert unasked == "start too high: loss.label_smoothing = 0.2 is not in the space; it gets 0.1"
    assert control.startswith("start control is not given: it equals the control or another start")
    assert not not_as_named(replace(search, start_from="none"), [])
    portfolio = a_search(small_recipe)
    assert not not_as_named(portfolio, starts(portfolio, "all", []))


@pytest.mark.parametrize(
    ("choices", "wanted", "found"),
    [((1e-4, 1e-2), 5e-4, 1e-4), ((1, 2), -1, 1), ((-1, 1, 2), 3, 2), ((0.0, 0.1), 0, 0.0)],
)
def test_choice_of_the_nearest_magnitude_is_given(choices: Sequence[float], wanted: float, found: float) -> None:
    """A depth of -1 is one of AugMix."""
    assert nearest_value(CategoricalDistribution(choices), wanted) == found


@pytest.mark.parametrize(("trials", "given"), [(1, 0), (2, 0), (3, 1), (9, 4), (30, MAX_STARTS)])
def test_at_most_half_of_the_trials_are_given(trials: int, given: int, small_recipe: Recipe) -> None:
    kinds = ("sgd", "adamw", "muon")
    search = a_search(small_recipe, trials, space=lambda trial: suggest_optimizer(trial, kinds))
    assert len(starts(search, "portfolio", [])) == given


@pytest.mark.parametrize(("trials", "given"), [(1, 0), (3, 2), (9, 8), (30, 9)])
def test_all_that_a_study_names_are_given(trials: int, given: int, small_recipe: Recipe) -> None:
    many = {str(number): {"optimizer.lr": 0.021 + number / 1000} for number in range(9)}
    assert len(starts(a_search(small_recipe, trials, starts=many), "all", [])) == given
    assert starts(a_search(small_recipe, trials, starts=many), "winners", []) == []


@pytest.mark.parametrize("kinds", [("sgd", "adamw"), ("sgd", "adamw", "muon")])
def test_the_portfolio_is_of_use_where_its_kinds_are(small_recipe: Recipe, kinds: tuple[str, ...]) -> None:
    given = starts(a_search(small_recipe, space=lambda trial: suggest_optimizer(trial, kinds)), "portfolio", [])
    assert {start.params["optimizer.name"] for start in given} == set(kinds)
    assert all(start.source.removeprefix("portfolio: ") in PORTFOLIO for start in given)


def test_studies_of_networks_for_small_images_start_with_muon() -> None:
    for name in ("attention", "baseline", "efficient", "expert", "improved", "plain"):
        study = load_study(name)
        search = Search(name, study, study.settings({"data.dataset": "cifar10"}), 1, 24, None)
        first = starts(search, "portfolio", [])[0]
        assert first.params["optimizer.name"] == "muon"
        assert first.params["optimizer.lr@muon"] == 0.06 and first.params["optimizer.head_lr"] == 0.1


def earlier(name: str, base: Recipe, scores: Mapping[float, float]) -> optuna.Study:
    """A study of rates whose trials have ended: rate -> score."""
    study = optuna.create_study(study_name=name, direction="maximize")
    flat = base.flat()
    del flat["data.dataset"]
    StudyAttributes.update(study, fingerprint={"base": flat})
    for rate, score in scores.items():
        study.add_trial(
            create_trial(params={"optimizer.lr@sgd": rate}, distributions={"optimizer.lr@sgd": RANGE}, value=score)
        )
    return study


def test_a_field_of_other_networks_is_left_out_and_one_of_no_network_refused(small_recipe: Recipe) -> None:
    def dropout(trial: Any) -> None:
        space(trial)
        trial.suggest_float("model.dropout", 0, 0.5, step=0.1)

    wanted = {"optimizer.lr": 0.03, "model.dropout": 0.3}
    found = nearest(a_search(small_recipe, space=dropout), wanted)
    assert found is not None and found["model.dropout"] == 0.3
    without = small_recipe.changed({"model.network": "baseline"})
    found = nearest(a_search(without, starts={"one": wanted}), wanted)
    assert found is not None and found["optimizer.lr@sgd"] == 0.03
    with pytest.raises(UserError, match="dropuot"):
        a_search(without, starts={"one": {"model.dropuot": 0.3}})


RANGE = FloatDistribution(1e-3, 1)


def test_winners_of_earlier_studies_follow_own_starts_those_of_the_same_network_first(small_recipe: Recipe) -> None:
    other = small_recipe.changed({"model.network": "baseline", "augmentation.crop_padding": 3, "training.epochs": 7})
    studies = [
        earlier("other-v1-pets", other, {0.03: 0.9, 0.04: 0.7}),
        earlier("same-v1-digits", small_recipe, {0.04: 0.5, 0.045: 0.4}),
        earlier("none-v1-digits", small_recipe, {}),
        earlier("newer-v1-pets", other, {0.02: 0.1}),
    ]
    found = starts(a_search(small_recipe, starts={"own": {"optimizer.lr": 0.011}}), "all", studies)
    assert [(start.source, start.params["optimizer.lr@sgd"]) for start in found] == [
        ("study: own", 0.011),
        ("same-v1-digits, trial 0", 0.04),
        ("newer-v1-pets, trial 0", 0.02),
    ]
    assert found[2].params["augmentation.crop_padding"] == 3  # of its study's base


def test_a_winner_keeps_only_the_fields_of_its_own_kinds_and_a_study_is_no_winner_of_itself(
    small_recipe: Recipe,
) -> None:
    adam = small_recipe.changed({"optimizer.name": "adam", "optimizer.lr": 1e-3, "optimizer.beta2": 0.9})
    study = earlier("adam-v1-digits", adam, {})
    params = {"optimizer.name": "sgd", "optimizer.lr": 0.03}
    kinds = optuna.distributions.CategoricalDistribution(["sgd", "adam"])
    study.add_trial(
        create_trial(params=params, distributions={"optimizer.name": kinds, "optimizer.lr": RANGE}, value=1)
    )
    search = a_search(small_recipe, starts={})
    (start,) = starts(search, "all", [study])
    assert start.params["optimizer.lr@sgd"] == 0.03
    assert starts(replace(search, stored_key="adam-v1-digits"), "all", [study]) == []


def test_an_infeasible_trial_is_no_winner(small_recipe: Recipe) -> None:
    study = earlier("same-v1-digits", small_recipe, {0.03: 0.5})
    broken = study.ask()
    broken.suggest_float("optimizer.lr@sgd", 1e-3, 1, log=True)
    broken.set_constraint("model/parameters", 1.0)
    study.tell(broken, 0.9)
    search = a_search(small_recipe, starts={})
    assert [start.source for start in starts(search, "all", [study])] == ["same-v1-digits, trial 0"]
    none = optuna.create_study(study_name="none-v1-digits", direction="maximize")
    none.add_trial(study.trials[1])
    assert starts(search, "all", [none]) == []


def test_a_grid_is_given_only_what_its_study_names(small_recipe: Recipe) -> None:
    winners = [earlier("same-v1-digits", small_recipe, {0.04: 0.5})]
    grid = {"sampler": GridSampler({"optimizer.lr@sgd": [0.01, 0.03]})}
    assert starts(a_search(small_recipe, **grid), "all", winners) == []
    named = a_search(small_recipe, starts={"own": {"optimizer.lr": 0.03}}, **grid)
    assert [start.source for start in starts(named, "all", winners)] == ["study: own"]


def test_a_control_is_no_winner(small_recipe: Recipe) -> None:
    """As of a study of one trial, or where it is the best."""
    study = earlier("same-v1-digits", small_recipe, {0.03: 0.5})
    about = {"user_attrs": TrialAttributes(control=True).to_optuna(), "distributions": {"optimizer.lr@sgd": RANGE}}
    study.add_trial(create_trial(params={"optimizer.lr@sgd": 0.04}, value=0.9, **about))
    search = a_search(small_recipe, starts={})
    assert [start.source for start in starts(search, "all", [study])] == ["same-v1-digits, trial 0"]
    alone = optuna.create_study(study_name="one-v1-digits", direction="maximize")
    alone.add_trial(study.trials[1])
    assert starts(search, "all", [alone]) == []


def test_winners_do_not_displace_the_best_of_the_portfolio(small_recipe: Recipe) -> None:
    studies = [earlier(f"s{number}-v1-digits", small_recipe, {rate: 0.5}) for number, rate in enumerate((0.03, 0.04))]

    def sources(trials: int, *studies: optuna.Study) -> list[str]:
        kinds = ("sgd", "adamw", "muon")
        search = a_search(small_recipe, trials, space=lambda trial: suggest_optimizer(trial, kinds))
        return [start.source.partition(":")[0] for start in starts(search, "all", studies)]

    assert sources(5, *studies) == ["portfolio", "portfolio"]
    assert sources(20, *studies) == ["portfolio", "portfolio", "s1-v1-digits, trial 0", "s0-v1-digits, trial 0"]
    assert sources(20, studies[0]) == ["portfolio", "portfolio", "s0-v1-digits, trial 0", "portfolio"]


def test_a_winner_may_have_widths_and_the_policy_that_recipes_have_by_default(small_recipe: Recipe) -> None:
    choices = [list(small_recipe.flat()["model.widths"]), [8, 16]]

    def widths(trial: Any) -> None:
        trial.suggest_categorical("model.widths", choices)
        trial.suggest_float("augmentation.rotation", 0, 15, step=5)

    search = a_search(small_recipe, space=widths, starts={})
    study = earlier("same-v1-digits", small_recipe.changed({"augmentation.rotation": 10}), {})
    base = dict(StudyAttributes.of(study).fingerprint["base"])
    del base["augmentation.policy"]  # as a fingerprint leaves it out
    StudyAttributes.update(study, fingerprint={"base": base})
    kinds = optuna.distributions.CategoricalDistribution([to_choice(choice) for choice in choices])
    study.add_trial(
        create_trial(params={"model.widths": to_choice([8, 16])}, distributions={"model.widths": kinds}, value=1)
    )
    (start,) = starts(search, "all", [study])
    assert start.params == {"model.widths": to_choice([8, 16]), "augmentation.rotation": 10}


def test_a_start_with_a_wrong_field_is_refused_with_the_study(small_recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"starts, mine: optimizer\.rate: .*no such field"):
        a_search(small_recipe, starts={"mine": {"optimizer.rate": 1}})


def given(harness: StudyHarness) -> list[tuple[bool, str]]:
    return [(attributes.control, attributes.start) for attributes in attributes_of(harness.trials())]


def test_a_new_study_is_given_the_control_and_the_starts_once(
    harness: StudyHarness, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    search = harness.search(9)
    named = {"a": {"optimizer.lr": 0.2}, "b": {"optimizer.lr": 0.3}}
    search = replace(search, study=replace(search.study, starts=named))
    study = open_study(search, harness.data, harness.storage, harness.home)
    all_given = [(True, ""), (False, "study: a"), (False, "study: b")]
    assert given(harness) == all_given
    assert "first trials after the control: study: a; study: b" in caplog.text

    # As a kill in the middle leaves it: the control and the first start are there.
    optuna.delete_study(study_name=harness.key, storage=harness.storage)
    study = open_study(replace(search, start_from="none"), harness.data, harness.storage, harness.home)
    study.enqueue_trial({"optimizer.lr": 0.2}, user_attrs=TrialAttributes(start="study: a").to_optuna())
    for _ in range(2):
        open_study(search, harness.data, harness.storage, harness.home)
        assert given(harness) == all_given

    # Once a trial besides the control has begun, no start is added.
    optuna.delete_study(study_name=harness.key, storage=harness.storage)
    study = open_study(replace(search, start_from="none"), harness.data, harness.storage, harness.home)
    study.tell(study.ask(), state=TrialState.FAIL)
    study.ask()
    open_study(search, harness.data, harness.storage, harness.home)
    assert given(harness) == [(True, ""), (False, "")]


def test_a_study_that_was_first_tried_with_one_trial_is_given_its_starts(harness: StudyHarness) -> None:
    search = harness.search(1)
    named = replace(search.study, starts={"a": {"optimizer.lr": 0.2}, "b": {"optimizer.lr": 0.3}})
    study = run_study(harness.context(replace(search, study=named)))
    assert given(harness) == [(True, "")]
    study.enqueue_trial({}, user_attrs=TrialAttributes(control=True, retry_of=0).to_optuna())  # as where it was stopped
    for _ in range(2):
        open_study(replace(search, study=named, trials=9), harness.data, harness.storage, harness.home)
        assert given(harness) == [(True, ""), (True, ""), (False, "study: a"), (False, "study: b")]


def test_starts_of_a_base_above_its_bound_get_a_smaller_network(harness: StudyHarness) -> None:
    def widths(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)
        trial.suggest_categorical("model.widths", [[8, 16], [4, 8], [6, 12]])
        trial.suggest_float("model.dropout", 0, 0.5)

    named = {"starts": {"a": {"optimizer.lr": 0.2}, "b": {"optimizer.lr": 0.3, "model.widths": (4, 8)}}}
    base = harness.base.changed({"model.widths": (8, 16), "model.dropout": 0.1})
    search = harness.search(9, widths, base, {"constraints": {"model/parameters": 4000}, **named})
    study = open_study(search, harness.data, harness.storage, harness.home)
    control, first, second = (trial.system_attrs["fixed_params"] for trial in study.trials)
    assert control["model.widths"] == "[8, 16]", "it is trained all the same"
    assert first["model.widths"] in ("[4, 8]", "[6, 12]")
    assert second["model.widths"] == "[4, 8]", "as it is named"
    assert (first["optimizer.lr"], first["model.dropout"]) == (0.2, 0.1)
    hopeless = replace(search, version=2, study=replace(search.study, constraints={"model/parameters": 1}))
    (_, first, _) = open_study(hopeless, harness.data, harness.storage, harness.home).trials
    assert first.system_attrs["fixed_params"]["model.widths"] == "[8, 16]"


def test_a_run_says_where_its_parameters_come_from(harness: StudyHarness) -> None:
    search = harness.search(3)
    named = replace(search.study, starts={"mine": {"optimizer.lr": 0.2}})
    run_study(harness.context(replace(search, study=named)))
    runs = harness.runs_by_trial()
    assert [runs[number].data.tags.get("start") for number in range(3)] == [None, "study: mine", None]
    assert float(runs[1].data.params["optimizer.lr"]) == 0.2
