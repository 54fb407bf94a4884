"""What a study will cost, and what it really took."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optuna
import pytest
import torch
from optuna.pruners import MedianPruner
from optuna.trial import TrialState
from study_harness import RecordingObserver, StudyHarness

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.search import forecast as forecast_module
from pipeline.search.forecast import Choice, Way, actual, choose, decide, forecast, measure_ways
from pipeline.search.run_study import run_study
from pipeline.search.search import Search
from pipeline.search.storage import find_study
from pipeline.search.study import Study
from pipeline.search.study_attributes import StudyAttributes
from pipeline.search.trial import StudyInterrupted
from pipeline.tracking import queries
from pipeline.training.loop import Diverged

CPU = torch.device("cpu")
ONE = Choice("eager", 1)


@pytest.fixture(autouse=True)
def short_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_module, "CONTROL_S", 0.0)


def search_of(base: Recipe, trials: int, asks_epochs: bool = False) -> Search:
    def space(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)
        if asks_epochs:
            trial.suggest_int("training.epochs", 2, 6, step=2)

    study = Study(question="?", base=base, space=space, objective="val/accuracy", trials=trials)
    return Search("lab", study, {}, version=1, trials=trials, timeout_s=None)


def stored(states: list[TrialState]) -> optuna.Study:
    study = optuna.create_study()
    for state in states:
        value = 0.5 if state is TrialState.COMPLETE else None
        study.add_trial(optuna.trial.create_trial(state=state, value=value))
    return study


def test_forecast_is_for_the_remaining_trials(small_recipe: Recipe, digits: TrainingData) -> None:
    search = search_of(small_recipe, 6)
    found = forecast(search, digits, CPU, stored([TrialState.COMPLETE] * 4), ONE)
    assert found
    assert (found.trials, found.unpruned_epochs) == (2, 4)
    assert found.seconds > found.unpruned_epochs * found.epoch_s * 0.5
    assert found.memory_gib is None, "there is no GPU"
    assert forecast(search, digits, CPU, stored([TrialState.COMPLETE] * 6), ONE) is None


def test_most_trials_are_short_and_the_best_are_in_full(small_recipe: Recipe) -> None:
    search = search_of(small_recipe.changed({"training.epochs": 20}), 24)
    share, pruned = forecast_module._pruning(search, 24, 0)
    assert pruned == pytest.approx(18.5 / 24, abs=0.05), "of 24 the control and four to six others are in full"
    assert share == pytest.approx(1 - pruned + pruned * 5 / 20)
    rest_share, rest_pruned = forecast_module._pruning(search, 24, 1)
    assert rest_share < share and rest_pruned > pruned, "the control is in full"


def test_no_pruning_is_assumed_where_trials_are_in_full(small_recipe: Recipe) -> None:
    search = search_of(small_recipe.changed({"training.epochs": 20}), 24)
    none = dataclasses.replace(search, prune=False)
    other = dataclasses.replace(search, study=dataclasses.replace(search.study, pruner=MedianPruner()))
    brief = search_of(small_recipe.changed({"training.epochs": 3}), 24)
    few = dataclasses.replace(search, trials=5)
    for each in (none, other, brief, few):
        assert forecast_module._pruning(each, each.trials, 0) == (1.0, 0.0)


def test_searched_epochs_are_averaged(small_recipe: Recipe, digits: TrainingData) -> None:
    found = forecast(search_of(small_recipe, 10, asks_epochs=True), digits, CPU, None, ONE)
    assert found
    assert found.unpruned_epochs == pytest.approx(10 * 4, rel=0.15)
    assert found.epochs < found.unpruned_epochs


def test_time_and_disk_grow_with_the_trials(small_recipe: Recipe, digits: TrainingData) -> None:
    one, many = (forecast(search_of(small_recipe, trials), digits, CPU, None, ONE) for trials in (1, 10_000))
    assert one and many
    assert one.measured == 1, "a short study is measured by its control alone"
    assert many.measured == 1 + forecast_module.NUM_OTHER_RECIPES
    assert many.unpruned_seconds > 1000 * one.unpruned_seconds
    weights = 2 * sum(p.numel() for p in _network(small_recipe).parameters()) * 4 / 2**20
    assert one.disk_mib > weights, "plain and averaged weights, and more"


def _network(recipe: Recipe) -> torch.nn.Module:
    from pipeline.models.build import build_network

    return build_network(recipe.model, 10, 8, 0)


def test_study_stores_its_forecast_and_what_it_took(
    harness: StudyHarness,
) -> None:
    search, observer = harness.search(2), RecordingObserver()
    choice = Choice("eager", 1, why="measured")
    study = run_study(harness.context(search, observer), choice=choice, with_forecast=True)
    stored = StudyAttributes.of(study)
    assert stored.forecast == observer.forecast
    assert stored.choice == choice and observer.forecast["choice"] == dataclasses.asdict(choice)
    truth = stored.actual
    assert truth and set(truth) <= set(observer.forecast)
    assert (truth["trials"], truth["epochs"], truth["pruned"]) == (2, 4, 0)
    assert truth["seconds"] > 4 * truth["epoch_s"] > 0
    assert truth["disk_mib"] > 0.2
    assert len(study.trials) == 2 and len(queries.studies(harness.tracker)) == 1, "measuring leaves no trial"
    assert find_study(search, harness.data, harness.storage)
    assert find_study(dataclasses.replace(search, version=2), harness.data, harness.storage) is None

    resumed = StudyAttributes.of(run_study(harness.context(search), with_forecast=True))
    assert resumed.forecast is None and resumed.actual is None, "no trial remained"


def test_stop_ends_the_measuring(small_recipe: Recipe, digits: TrainingData) -> None:
    def stop(epoch: int, step: int, steps: int) -> None:
        raise StudyInterrupted

    with pytest.raises(StudyInterrupted):
        forecast(search_of(small_recipe, 2), digits, CPU, None, ONE, stop)


def test_actual_counts_what_ended_since_a_trial(small_recipe: Recipe) -> None:
    study = optuna.create_study()
    for epochs, epoch_s, state in (
        (9, 9.0, TrialState.COMPLETE),
        (3, 1.0, TrialState.COMPLETE),
        (1, 2.0, TrialState.PRUNED),
    ):
        attributes = {"epochs": epochs, "epoch_s": epoch_s}
        value = 0.5 if state is TrialState.COMPLETE else None
        study.add_trial(optuna.trial.create_trial(state=state, value=value, user_attrs=attributes))
    found = actual(study, 1, 12.0, 3.0)
    assert (found.trials, found.epochs, found.pruned, found.seconds, found.disk_mib) == (2, 4, 1, 12.0, 3.0)
    assert found.epoch_s == pytest.approx((3 * 1 + 1 * 2) / 4)


def test_workers_share_the_time_up_to_the_number_of_cores(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast_module.os, "cpu_count", lambda: 2)
    for name in ("measure_mean", "measure_overhead"):  # once: the machine may be busier the second time
        monkeypatch.setattr(forecast_module, name, _first_of(getattr(forecast_module, name)))
    search, threads = search_of(small_recipe, 40), torch.get_num_threads()
    one, many = (forecast(search, digits, CPU, None, Choice("eager", workers)) for workers in (1, 8))
    assert one and many and torch.get_num_threads() == threads
    assert many.unpruned_seconds - forecast_module.WORKER_START_S == pytest.approx(one.unpruned_seconds / 2)


def _first_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the first call returned, for all."""
    returned: list[Any] = []

    def first(*arguments: Any) -> Any:
        if not returned:
            returned.append(function(*arguments))
        return returned[0]

    return first


# ------------------------------------------------------------------------------------------- execution and workers

EAGER, GRAPHED = Way("eager", 53.0, 0.5, 1.0), Way("graphed", 18.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("ways", "trials", "cores", "free_gib", "expected"),
    [
        (
            [EAGER, GRAPHED],
            100,
            16,
            70,
            ("graphed", 1),
        ),  # `attention` as its launches foretell it: one fills the device
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


def test_recipes_that_would_fail_as_trials_are_not_measured(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, too_large = (
        forecast_module.measure_mean,
        [torch.OutOfMemoryError("CUDA out of memory.\nmore"), Diverged()],
    )

    def measure(recipe: Recipe, *rest: Any) -> Any:
        if recipe.optimizer.lr != small_recipe.optimizer.lr and too_large:
            raise too_large.pop()
        return measured(recipe, *rest)

    monkeypatch.setattr(forecast_module, "measure_mean", measure)
    search = search_of(small_recipe, 10_000)
    costs = forecast_module.measure_costs(search, digits, CPU, ONE, 10_000)
    assert costs.measured == 1 + forecast_module.NUM_OTHER_RECIPES - 2
    too_large += [torch.OutOfMemoryError("CUDA out of memory.\nmore")]
    base = search.base.changed({"optimizer.lr": 0.5})
    of_control = dataclasses.replace(search, study=dataclasses.replace(search.study, base=base))
    for call in (
        lambda: forecast_module.measure_costs(of_control, digits, CPU, ONE, 10_000),
        lambda: measure_ways(of_control, digits, CPU, ("eager",)),
    ):
        too_large[:] = [torch.OutOfMemoryError("CUDA out of memory.\nmore")]
        with pytest.raises(UserError, match=r"images of 8 pixels: out of memory: CUDA out of memory\.; smaller ones"):
            call()
    monkeypatch.setattr(forecast_module, "measure_mean", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forecast_module.measure_costs(search, digits, CPU, ONE, 10_000)


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
    measured = forecast_module.measure_mean

    def measure(recipe: Recipe, *rest: Any) -> Any:
        if recipe.training.execution == "graphed":
            raise RuntimeError("capture failed\nmore")
        return measured(recipe, *rest)

    monkeypatch.setattr(forecast_module, "measure_mean", measure)
    search = search_of(small_recipe, 2)
    ways, failed = measure_ways(search, digits, CPU, ("eager", "graphed"))
    assert ([way.execution for way in ways], failed) == (["eager"], "graphed fails (capture failed)")
    assert ways[0].training_s > 0 and ways[0].tracking_s > forecast_module.TRACKING_S and ways[0].memory_gib > 0
    with pytest.raises(RuntimeError, match="capture failed"):
        measure_ways(search, digits, CPU, ("graphed",))
    monkeypatch.setattr("torch.rand", lambda *shape, device: measure(small_recipe.changed(graphed)))
    with pytest.raises(
        UserError, match=r"cpu: graphed fails \(capture failed\); `--set training.execution=eager` trains"
    ):
        forecast_module._check_usable(CPU, failed)


graphed = {"training.execution": "graphed"}


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU knows two executions, with made-up times; what was measured."""
    measured: list[str] = []

    def ways(search: Search, data: Any, device: Any, executions: Any) -> Any:
        measured.extend(executions)
        return [EAGER, GRAPHED], ""

    monkeypatch.setattr(forecast_module, "EXECUTIONS", {"cpu": ("eager", "graphed")})
    monkeypatch.setattr(forecast_module, "measure_ways", ways)
    monkeypatch.setattr(forecast_module, "_free_gib", lambda device: 70.0)
    monkeypatch.setattr(forecast_module, "check_execution", lambda recipe, device: None)
    return measured


def test_cpu_needs_no_measuring(small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_module, "measure_ways", lambda *what: pytest.fail("measured"))
    search = search_of(small_recipe, 2)
    assert decide(search, digits, CPU, None) == (search, Choice("eager", 1))
    assert decide(search, digits, CPU, None, workers=2)[1] == Choice("eager", 2)


def test_precision_of_photo_networks_is_measured_once_and_kept(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in every trial's recipe, and no part of the question."""
    measured = []
    monkeypatch.setattr(forecast_module, "bf16_supported", lambda device: True)
    monkeypatch.setattr(forecast_module, "fastest_precision", lambda recipe, classes: measured.append(1) or "fp32")
    timm = small_recipe.changed({"model.network": "timm", "model.backbone": "test_resnet", "data.image_size": 32})
    asked = search_of(timm, 6)
    search, choice = decide(asked, digits, CPU, None)
    assert search.base.training.precision == choice.precision == "fp32"
    assert search.fingerprint(digits) == asked.fingerprint(digits)
    study = stored([TrialState.COMPLETE])
    StudyAttributes.update(study, choice=dataclasses.replace(choice, precision="bf16"))
    assert decide(asked, digits, CPU, study)[0].base.training.precision == "bf16", "as the study started"
    assert decide(asked, digits, CPU, stored([TrialState.COMPLETE]))[0].base.training.precision == "auto"
    for other in (small_recipe, timm.changed({"training.precision": "bf16"})):
        assert decide(search_of(other, 6), digits, CPU, None)[1].precision == ""
    assert measured == [1]


def test_new_study_is_measured_unless_the_execution_is_set(
    small_recipe: Recipe, digits: TrainingData, like_a_gpu: list[str]
) -> None:
    search, choice = decide(search_of(small_recipe, 100), digits, CPU, None)
    assert (choice.execution, choice.workers) == ("graphed", 1)
    assert search.base == small_recipe.changed(graphed) and search.recipe({}).training.execution == "graphed"
    assert like_a_gpu == ["eager", "graphed"]

    like_a_gpu.clear()
    typed = dataclasses.replace(search_of(small_recipe, 100), settings={"training.execution": "eager"})
    assert decide(typed, digits, CPU, None) == (typed, Choice("eager", 1))
    written = search_of(small_recipe.changed({"training.execution": "compiled"}), 100)
    assert decide(written, digits, CPU, None, workers=2) == (written, Choice("compiled", 2))
    assert not like_a_gpu


def test_resumed_study_keeps_its_choice(small_recipe: Recipe, digits: TrainingData, like_a_gpu: list[str]) -> None:
    search, study = search_of(small_recipe, 100), stored([TrialState.COMPLETE])
    assert decide(search, digits, CPU, study) == (search, Choice("eager", 1)), "from before there was a choice"
    StudyAttributes.update(study, choice=Choice("graphed", 3, 0.9, "measured"))
    found, choice = decide(search, digits, CPU, study)
    assert found.base.training.execution == choice.execution == "graphed"
    assert (choice.taken, choice.why) == (0.9, "as the study started")
    assert not like_a_gpu


def test_study_of_a_gpu_is_refused_on_a_cpu(small_recipe: Recipe, digits: TrainingData) -> None:
    study = stored([TrialState.COMPLETE])
    StudyAttributes.update(study, choice=Choice("graphed", 3, 0.9, "measured"))
    with pytest.raises(UserError, match=r"a graph needs a GPU, and this is cpu; `--set training.execution=eager`"):
        decide(search_of(small_recipe, 2), digits, CPU, study)


def test_only_worker_of_a_gpu_starts_as_others_do(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a study's only worker is the command itself."""

    def on_cpu(measured: Callable[..., Any]) -> Callable[..., Any]:
        return lambda recipe, data, device, *others: measured(recipe, data, CPU, *others)

    for name in ("measure_mean", "measure_overhead"):
        monkeypatch.setattr(forecast_module, name, on_cpu(getattr(forecast_module, name)))
    start_s = {
        device: forecast_module.measure_costs(
            search_of(small_recipe, 10), digits, torch.device(device), Choice("eager", 1), 10
        ).start_s
        for device in ("cpu", "cuda")
    }
    assert start_s == {"cpu": 0, "cuda": forecast_module.WORKER_START_S}


def test_device_in_use_is_not_shared_further(small_recipe: Recipe, digits: TrainingData) -> None:
    """A forecast for several workers on one device."""
    search = search_of(small_recipe, 10)
    found = forecast(search, digits, CPU, None, Choice("eager", 1, taken=3.0))
    assert found and found.choice and found.choice.taken == 3.0
    free = found.unpruned_epochs * found.epoch_s
    assert found.unpruned_seconds > 3 * free, "three times what one worker takes"
