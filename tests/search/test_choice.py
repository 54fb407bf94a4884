"""How a study's trials are executed: by which execution, how many workers, in which precision."""

import dataclasses
from typing import Any

import pytest
import torch
from optuna.trial import TrialState
from study_harness import search_of, stored

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.search import choice as choice_module
from pipeline.search.choice import Way, choose, choose_execution, measure_ways
from pipeline.search.search import Search
from pipeline.search.speed import TRACKING_S, RecipeFails
from pipeline.search.study_attributes import Choice, StudyAttributes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_module, "CONTROL_S", 0.0)


EAGER, GRAPHED = Way("eager", 53.0, 0.5, 1.0), Way("graphed", 18.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("ways", "trials", "cores", "free_gib", "expected"),
    [
        ([EAGER, GRAPHED], 100, 16, 70, ("graphed", 1)),  # `attention`, as its launches foretell: one fills the device
        ([EAGER, Way("graphed", 45.0, 0.5, 1.0)], 100, 16, 70, ("eager", 1)),  # saves less than a fifth
        ([Way("eager", 1.6, 0.6, 1), Way("graphed", 1.4, 0.6, 1)], 100, 16, 70, ("eager", 2)),  # short trials
        ([Way("eager", 4.0, 3.0, 1), Way("graphed", 1.0, 3.0, 1)], 100, 16, 70, ("graphed", 4)),
        ([Way("eager", 4.0, 3.0, 1), Way("graphed", 1.0, 3.0, 1)], 100, 16, 9.5, ("graphed", 3)),  # 3 GiB each
        ([Way("eager", 4.0, 3.0, 1), Way("graphed", 1.0, 3.0, 1)], 100, 2, 70, ("graphed", 2)),
        ([Way("eager", 4.0, 3.0, 1), Way("graphed", 1.0, 3.0, 1)], 3, 16, 70, ("graphed", 2)),  # three save 2 s of 12
        ([Way("eager", 53.0, 0.5, 60)], 100, 16, 1, ("eager", 1)),  # the graph failed, and there is no room
    ],
)
def test_simplest_way_that_is_hardly_slower_is_chosen(
    ways: list[Way], trials: int, cores: int, free_gib: float, expected: tuple[str, int]
) -> None:
    choice = choose(ways, trials, cores, free_gib)
    assert (choice.execution, choice.workers) == expected


def test_each_gpu_is_counted() -> None:
    """Eight workers on eight GPUs share none: each should be as fast as it can."""
    ways = [Way("eager", 5.0, 0.2, 1.0), Way("graphed", 1.2, 0.2, 1.0)]
    choice = choose(ways, 24, 16, 70, workers=8, gpus=8)
    assert choice.execution == "graphed" and choice.taken == pytest.approx(1.2 / 1.4 / 8)
    assert choose(ways, 24, 16, 70, workers=8).execution == "eager", "on one they take turns"
    long = [dataclasses.replace(way, training_s=1000 * way.training_s) for way in ways]
    assert choose(long, 96, 16, 70, gpus=8).workers == 7, "hardly slower than eight"
    assert choose(long, 96, 16, 2, gpus=8).workers == 1, "no GPU has room for a worker"
    assert choose(long, 96, 16, 3, gpus=8).workers == 7, "each has room for one"


def test_choice_reports_what_was_measured() -> None:
    choice = choose([EAGER, GRAPHED], 100, 16, 70, failed="compiled fails (no compiler)")
    times = "eager 53.5 s, graphed 18.5 s, compiled fails (no compiler)"
    assert choice.why == f"a complete trial takes {times}; the device is free for 0.5 s of it"
    assert choice.taken == pytest.approx(18 / 18.5)
    typed = choose([EAGER, GRAPHED], 100, cores=1, free_gib=0, workers=3)
    assert (typed.execution, typed.workers, typed.taken) == ("eager", 3, pytest.approx(18 / 53.5)), (
        "three eager ones leave the device no pause"
    )


def test_ways_are_measured_and_a_failing_one_is_reported(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = choice_module.measure_mean

    def measure(recipe: Recipe, *rest: Any) -> Any:
        if recipe.training.execution == "graphed":
            raise failure
        return measured(recipe, *rest)

    monkeypatch.setattr(choice_module, "measure_mean", measure)
    search = search_of(small_recipe, 2)
    failure = RecipeFails("resnet", "out of memory")
    ways, failed = measure_ways(search, digits, CPU, ("eager", "graphed"))
    assert failed == "graphed fails (resnet: out of memory)"
    failure = RuntimeError("capture failed\nmore")
    ways, failed = measure_ways(search, digits, CPU, ("eager", "graphed"))
    assert ([way.execution for way in ways], failed) == (["eager"], "graphed fails (capture failed)")
    assert ways[0].training_s > 0 and ways[0].tracking_s > TRACKING_S and ways[0].memory_gib > 0
    with pytest.raises(RuntimeError, match="capture failed"):
        measure_ways(search, digits, CPU, ("graphed",))
    monkeypatch.setattr("torch.rand", lambda *shape, device: measure(small_recipe.changed(graphed)))
    with pytest.raises(
        UserError, match=r"cpu: graphed fails \(capture failed\); `--set training.execution=eager` trains"
    ):
        choice_module._check_usable(CPU, failed)


graphed = {"training.execution": "graphed"}


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU knows two executions, with made-up times; what was measured."""
    measured: list[str] = []

    def ways(search: Search, data: Any, device: Any, executions: Any) -> Any:
        measured.extend(executions)
        return [EAGER, GRAPHED], ""

    monkeypatch.setattr(choice_module, "EXECUTIONS", {"cpu": ("eager", "graphed")})
    monkeypatch.setattr(choice_module, "measure_ways", ways)
    monkeypatch.setattr(choice_module, "_free_gib", lambda device: 70.0)
    monkeypatch.setattr(choice_module, "check_execution", lambda recipe, device: None)
    return measured


def test_cpu_needs_no_measuring(small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_module, "measure_ways", lambda *what: pytest.fail("measured"))
    search = search_of(small_recipe, 2)
    assert choose_execution(search, digits, CPU, None) == (search, Choice("eager", 1))
    assert choose_execution(search, digits, CPU, None, workers=2)[1] == Choice("eager", 2)


def test_precision_of_photo_networks_is_measured_once_and_kept(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in every trial's recipe, and no part of the question."""
    measured = []
    monkeypatch.setattr(choice_module, "bf16_supported", lambda device: True)
    monkeypatch.setattr(choice_module, "fastest_precision", lambda recipe, classes: measured.append(1) or "fp32")
    timm = small_recipe.changed({"model.network": "timm", "model.backbone": "test_resnet", "data.image_size": 32})
    asked = search_of(timm, 6)
    search, choice = choose_execution(asked, digits, CPU, None)
    assert search.base.training.precision == choice.precision == "fp32"
    assert search.fingerprint(digits) == asked.fingerprint(digits)
    study = stored([TrialState.COMPLETE])
    StudyAttributes.update(study, choice=dataclasses.replace(choice, precision="bf16"))
    assert choose_execution(asked, digits, CPU, study)[0].base.training.precision == "bf16", "as the study started"
    assert choose_execution(asked, digits, CPU, stored([TrialState.COMPLETE]))[0].base.training.precision == "auto"
    for other in (small_recipe, timm.changed({"training.precision": "bf16"})):
        assert choose_execution(search_of(other, 6), digits, CPU, None)[1].precision == ""
    assert measured == [1]


def test_new_study_is_measured_unless_the_execution_is_set(
    small_recipe: Recipe, digits: TrainingData, like_a_gpu: list[str]
) -> None:
    search, choice = choose_execution(search_of(small_recipe, 100), digits, CPU, None)
    assert (choice.execution, choice.workers) == ("graphed", 1)
    assert search.base == small_recipe.changed(graphed) and search.recipe({}).training.execution == "graphed"
    assert like_a_gpu == ["eager", "graphed"]

    like_a_gpu.clear()
    typed = dataclasses.replace(search_of(small_recipe, 100), settings={"training.execution": "eager"})
    assert choose_execution(typed, digits, CPU, None) == (typed, Choice("eager", 1))
    written = search_of(small_recipe.changed({"training.execution": "compiled"}), 100)
    assert choose_execution(written, digits, CPU, None, workers=2) == (written, Choice("compiled", 2))
    assert not like_a_gpu


def test_resumed_study_keeps_its_choice(small_recipe: Recipe, digits: TrainingData, like_a_gpu: list[str]) -> None:
    search, study = search_of(small_recipe, 100), stored([TrialState.COMPLETE])
    assert choose_execution(search, digits, CPU, study) == (search, Choice("eager", 1)), (
        "from before there was a choice"
    )
    StudyAttributes.update(study, choice=Choice("graphed", 3, 0.9, "measured"))
    found, choice = choose_execution(search, digits, CPU, study)
    assert found.base.training.execution == choice.execution == "graphed"
    assert (choice.taken, choice.why) == (0.9, "as the study started")
    assert not like_a_gpu


def test_trials_whose_time_is_bounded_do_not_share_a_device(
    small_recipe: Recipe, digits: TrainingData, like_a_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [Way("eager", 1.6, 0.6, 1)]
    monkeypatch.setattr(choice_module, "measure_ways", lambda *what: (short, ""))
    monkeypatch.setattr(choice_module.os, "cpu_count", lambda: 16)
    search = search_of(small_recipe, 100)
    assert choose_execution(search, digits, CPU, None)[1].workers == 2
    bounded = dataclasses.replace(
        search, study=dataclasses.replace(search.study, constraints={"model/latency_ms": 5.0})
    )
    assert choose_execution(bounded, digits, CPU, None)[1].workers == 1
    with pytest.raises(UserError, match="`--workers 2`: the study bounds model/latency_ms"):
        choose_execution(bounded, digits, CPU, None, workers=2)


def test_study_of_a_gpu_is_refused_on_a_cpu(small_recipe: Recipe, digits: TrainingData) -> None:
    study = stored([TrialState.COMPLETE])
    StudyAttributes.update(study, choice=Choice("graphed", 3, 0.9, "measured"))
    with pytest.raises(UserError, match=r"a graph needs a GPU, and this is cpu; `--set training.execution=eager`"):
        choose_execution(search_of(small_recipe, 2), digits, CPU, study)
