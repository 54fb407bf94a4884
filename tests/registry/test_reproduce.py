"""A run is reproduced from MLflow alone, and differences are reported."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import Trained, run_pipeline
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from pipeline import experiment
from pipeline.cli.exit_codes import exit_code
from pipeline.data.prepare import TrainingData
from pipeline.errors import DataError, NotReproduced, UserError
from pipeline.experiment import ExperimentRequest, Outcome
from pipeline.recipe import Recipe
from pipeline.registry import card, finals, reproduce
from pipeline.registry.reproduce import Difference, compare, differences, find_original, summarise
from pipeline.tracking import queries
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker, RunRequest

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """A copy for this file, whose runs others would find in the store of the session."""
    home = tmp_path_factory.mktemp("reproduced") / "mlruns"
    trained.copy(home)
    yield replace(trained, home=home)
    _artifact_repos_cache.clear()  # it has the copy's folders by the ids of the runs


@pytest.fixture(scope="module")
def tracker(trained: Trained) -> MlflowTracker:
    return MlflowTracker(trained.home)


@pytest.fixture(scope="module")
def other_seed(tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData) -> Outcome:
    """The fixture's finished run with another seed, outside any study."""
    recipe = small_recipe.changed({"training.seed": 5})
    request = ExperimentRequest(recipe=recipe, data=digits, device=CPU, name="other seed")
    return experiment.run(request, tracker)


def command(run_id: str, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run_pipeline("reproduce", run_id, "--device", "cpu", *options, cwd=home.parent)


def test_fresh_process_reproduces_every_bit_and_is_no_candidate(
    trained: Trained, tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    [study] = [study for study in queries.studies(tracker) if study.name == "tiny-v1-digits"]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    done = command(trained.finished, trained.home)
    assert done.returncode == 0, done.stdout + done.stderr
    then = find_original(tracker, trained.finished).threads
    if then != 2 and (os.cpu_count() or 1) > 1:
        assert f"threads: {then} then, 2 here by default; trains with {then}" in done.stdout
    for line in ("weights.safetensors: equal, SHA-256", "predictions: those of all 144 images equal"):
        assert line in done.stdout
    assert done.stdout.rstrip().endswith("reproduced bit for bit")
    [run] = queries.children(tracker, study, "reproduction")
    tags = RunTags.of(run)
    assert (tags.reproduces, tags.reproduced) == (trained.finished, "reproduced bit for bit")
    assert queries.best_run_ids(tracker, study, 10) == [trained.finished]
    assert [c.trial_run for c in finals.plan_finals(tracker, study, CPU, 5, 1).candidates] == [trained.finished]


def test_tampered_weights_end_with_exit_code_6(
    trained: Trained,
    tracker: MlflowTracker,
    small_recipe: Recipe,
    digits: TrainingData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pipeline.cli.main import main

    one_epoch = small_recipe.changed({"training.epochs": 1})
    request = ExperimentRequest(recipe=one_epoch, data=digits, device=CPU, name="tampered")
    run_id = tracker.id_of(experiment.run(request, tracker).run_key)
    weights = tracker.client.download_artifacts(trained.finished, "weights.safetensors", str(tmp_path))
    tracker.client.log_artifact(run_id, weights)
    monkeypatch.chdir(trained.home.parent)
    monkeypatch.setattr(sys, "argv", ["pipeline", "reproduce", run_id])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended.value.code == 6
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("error: not reproduced: code, versions, processor and threads are the same")
    assert errors[1].startswith("  weights.safetensors: differs, by up to")
    [run] = tracker.client.search_runs([tracker.store.experiment("digits")], f"tags.reproduces = '{run_id}'")
    assert (RunTags.of(run).reproduced or "").startswith("not reproduced")


def test_pruned_run_is_compared_over_its_epochs(trained: Trained, tracker: MlflowTracker, digits: TrainingData) -> None:
    original = find_original(tracker, trained.pruned)
    assert (original.state, original.epochs) == ("pruned", 1)
    outcome = reproduce.reproduce(tracker, original, digits, CPU)
    assert (outcome.state, outcome.epochs) == (State.PRUNED, 1)
    comparison = compare(tracker, original, tracker.id_of(outcome.run_key), 144, None)
    assert comparison.equal and comparison.points == 0
    assert comparison.lines[0] == "metrics: 17 numbers of 1 epochs, 17 equal"


def test_what_the_original_did_not_log_is_no_difference(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    """An older version logged fewer metrics; F1 of many classes is also there where the original was interrupted."""
    more, f1 = {"val/balanced_accuracy": 0.5}, {"val/f1/cat": 0.4}
    ids = []
    for epochs in ([{}, f1, f1], [more, more, more | f1]):
        with tracker.run(RunRequest(name="one", recipe=small_recipe, data=digits)) as run:
            for epoch, values in enumerate(epochs, start=1):
                run.log_metrics({"val/accuracy": epoch / 10, **values}, epoch)
            run.end(State.PRUNED)
        ids.append(tracker.id_of(run.key))
    comparison = compare(tracker, find_original(tracker, ids[0]), ids[1], 144, None)
    assert comparison.equal, comparison.lines


def test_run_of_two_threads_is_trained_with_two(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    seen, before = [], torch.get_num_threads()
    short = small_recipe.changed({"training.epochs": 1})
    with reproduce.use_threads(2):
        first = experiment.run(ExperimentRequest(recipe=short, data=digits, device=CPU, name="two threads"), tracker)
    original = find_original(tracker, tracker.id_of(first.run_key))
    assert original.threads == 2
    repeated = reproduce.reproduce(tracker, original, digits, CPU, lambda report: seen.append(torch.get_num_threads()))
    assert seen == [2] and torch.get_num_threads() == before
    assert compare(tracker, original, tracker.id_of(repeated.run_key), 144, None).equal


def test_another_training_differs_in_every_part(trained: Trained, tracker: MlflowTracker, other_seed: Outcome) -> None:
    original = find_original(tracker, trained.finished)
    comparison = compare(tracker, original, tracker.id_of(other_seed.run_key), 144, None)
    assert not comparison.equal
    weights, predictions, metrics, score = comparison.lines
    assert "weights.safetensors: differs, by up to" in weights and "weights_plain.safetensors: differs" in weights
    assert "another class for" in predictions
    assert "the first that differs:" in metrics and "after epoch 1" in metrics
    assert score.startswith("val/accuracy after epoch 2: ")
    values = [
        tracker.client.get_run(run).data.metrics["val/accuracy"]
        for run in (trained.finished, tracker.id_of(other_seed.run_key))
    ]
    assert comparison.points == pytest.approx(100 * abs(values[0] - values[1]))


def test_unequal_bits_pass_within_tolerance_and_for_a_cause_only(
    trained: Trained, tracker: MlflowTracker, other_seed: Outcome
) -> None:
    original = find_original(tracker, trained.finished)
    wide, none = (compare(tracker, original, tracker.id_of(other_seed.run_key), 144, points) for points in (100.0, 0.0))
    cause = [Difference("torch: 2.11 then, 2.15 now", matters=True), Difference("pytest: 8 then, 9 now", matters=False)]
    summary = summarise(wide, cause)
    assert summary.startswith("reproduced within the tolerance: val/accuracy differs by")
    assert summary.endswith("equal bits can't be expected: torch")
    assert none.points > 0
    for comparison, changes in ((wide, cause[1:]), (none, cause)):
        with pytest.raises(NotReproduced, match=r"^not reproduced") as caught:
            summarise(comparison, changes)
        assert exit_code(caught.value) == 6
        assert len(caught.value.lines) == 1 + len(comparison.lines)


def test_default_tolerance_is_three_standard_deviations(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    def tolerance(accuracy: float, images: int) -> float:
        with tracker.run(RunRequest(name="scored", recipe=small_recipe, data=digits)) as run:
            run.log_metrics({"val/accuracy": accuracy}, 1)
            run.end(State.FINISHED)
        return reproduce.default_tolerance(find_original(tracker, tracker.id_of(run.key)), images)

    assert tolerance(0.94, 5000) == pytest.approx(1.04, abs=0.01)
    assert tolerance(1.0, 144) == pytest.approx(300 / 144), "three images, where none was wrong"


def test_each_difference_has_a_line(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    pretrained = {"model.network": "timm", "model.weights": "efficientnet-lite0", "data.image_size": 32}
    with tracker.run(RunRequest(name="old", recipe=small_recipe.changed(pretrained), data=digits)) as run:
        run.log_metrics({"val/accuracy": 0.5}, 1)
        run.end(State.FINISHED)
    digest = RunTags.of(tracker.client.get_run(tracker.id_of(run.key))).weights_sha256
    assert digest and digest.startswith("57934424"), "as the package's file is called"
    assert digest in card._weights("a file.", RunTags.of(tracker.client.get_run(tracker.id_of(run.key))))
    assert differences(tracker, find_original(tracker, tracker.id_of(run.key)), CPU) == []

    environment = (queries.read_file(tracker, tracker.id_of(run.key), "environment.txt") or b"").decode()
    changed = environment.replace("# cpu: ", "# cpu: Old ").replace("\ntorch==", "\ntorch==0.").replace(
        "\npytest==", "\ntransistor==1.0\npytest=="
    ).replace("\ntimm==", "\ntimm==0.")  # fmt: skip
    (tmp_path / "environment.txt").write_text(changed)
    (tmp_path / "diff.patch").write_text("--- a\n+++ b\n")
    for name in ("environment.txt", "diff.patch"):
        tracker.client.log_artifact(tracker.id_of(run.key), str(tmp_path / name))
    tracker.client.set_tag(tracker.id_of(run.key), "mlflow.source.git.commit", "0" * 40)
    tracker.client.set_tag(tracker.id_of(run.key), "device", "cuda")
    tracker.client.set_tag(tracker.id_of(run.key), "weights_sha256", "f" * 64)
    by_name = {
        d.line.partition(":")[0]: d for d in differences(tracker, find_original(tracker, tracker.id_of(run.key)), CPU)
    }
    matter = {name: difference.matters for name, difference in by_name.items()}
    assert matter == {
        "commit": True,
        "uncommitted difference": True,
        "weights": True,
        "processor": True,
        "torch": True,
        "timm": True,
        "transistor": False,
        "device": True,
    }
    assert by_name["transistor"].line == "transistor: 1.0 then, none now"
    assert by_name["uncommitted difference"].line.startswith("uncommitted difference: 2 lines then (diff.patch of run ")


def test_files_names_are_no_part_of_what_is_reproduced(
    trained: Trained, tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    """Runs of before don't have them, and a data set's files may be renamed."""
    stored = pq.read_table(tracker.client.download_artifacts(trained.finished, "predictions.parquet", str(tmp_path)))
    with tracker.run(RunRequest(name="named", recipe=small_recipe, data=digits)) as run:
        run.end(State.FINISHED)
    pq.write_table(stored.append_column("image", [["a.png"] * len(stored)]), tmp_path / "predictions.parquet")
    tracker.client.log_artifact(tracker.id_of(run.key), str(tmp_path / "predictions.parquet"))
    line, equal = reproduce._predictions(tracker, trained.finished, tracker.id_of(run.key))
    assert equal and line == f"predictions: those of all {len(stored)} images equal"


def test_graphed_run_is_reproduced_eagerly_without_a_gpu(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    graphed = small_recipe.changed({"training.execution": "graphed", "training.epochs": 1})
    with tracker.run(RunRequest(name="graphed", recipe=graphed, data=digits)) as run:
        run.log_metrics({"val/accuracy": 0.5}, 1)
        run.end(State.INTERRUPTED)
    original = find_original(tracker, tracker.id_of(run.key))
    [difference] = differences(tracker, original, CPU)
    assert difference.matters
    assert difference.line == "training.execution = graphed: a graph needs a GPU, and this is cpu; executed as eager"
    outcome = reproduce.reproduce(tracker, original, digits, CPU)
    repeated = find_original(tracker, tracker.id_of(outcome.run_key))
    assert repeated.recipe == graphed.changed({"training.execution": "eager"}), "what was executed is recorded"


def test_run_that_cannot_be_reproduced_is_refused(
    trained: Trained, tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with tracker.run(RunRequest(name="stillborn", recipe=small_recipe, data=digits)) as stillborn:
        stillborn.end(State.FAILED, "diverged")
    parent = queries.studies(tracker)[0].parent
    for run_id, line in {
        "last": "run last: not a run's id (32 of 0-9a-f)",
        "0" * 32: "no such run in the tracking store",
        parent: "a study's own run",
        tracker.id_of(stillborn.key): "failed before its first epoch ended; there is nothing to compare",
    }.items():
        with pytest.raises(UserError) as caught:
            find_original(tracker, run_id)
        assert line in caught.value.lines[0]
    with (
        tracker.run(RunRequest(name="open", recipe=small_recipe, data=digits)) as still_open,
        pytest.raises(UserError, match="has not ended"),
    ):
        find_original(tracker, tracker.id_of(still_open.key))


def test_other_data_is_refused(trained: Trained, tracker: MlflowTracker, digits: TrainingData) -> None:
    import dataclasses

    original = find_original(tracker, trained.finished)
    with pytest.raises(DataError, match="trained on other data than is here"):
        reproduce.reproduce(tracker, original, dataclasses.replace(digits, digest="f" * 64), CPU)
