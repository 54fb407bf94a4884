"""A run is made again from MLflow alone, and what differs is told."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Trained, run_pipeline

from pipeline import experiment
from pipeline.cli.exit_codes import exit_code
from pipeline.data.prepare import TrainingData
from pipeline.errors import DataError, NotReproduced, UserError
from pipeline.experiment import Outcome
from pipeline.recipe import Recipe
from pipeline.registry import finals, reproduce
from pipeline.registry.reproduce import Difference, compare, differences, find_past, verdict
from pipeline.tracking.tracker import MlflowTracker, State

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tracker(trained: Trained) -> MlflowTracker:
    return MlflowTracker(trained.home)


@pytest.fixture(scope="module")
def other_seed(tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData) -> Outcome:
    """The fixture's finished run with another seed, outside any study."""
    return experiment.run(small_recipe.changed({"training.seed": 5}), digits, CPU, tracker, "other seed")


def command(run_id: str, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run_pipeline("reproduce", run_id, "--device", "cpu", *options, cwd=home.parent)


def test_a_fresh_process_with_other_threads_gives_every_bit_again_and_the_reproduction_is_no_candidate(
    trained: Trained, tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    [study] = [study for study in tracker.studies() if study.name == "tiny-v1-digits"]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    done = command(trained.finished, trained.home)
    assert done.returncode == 0, done.stdout + done.stderr
    then = find_past(tracker, trained.finished).threads
    if then != 2 and (os.cpu_count() or 1) > 1:
        assert f"threads: {then} then, 2 here by default; trains with {then}" in done.stdout
    for line in ("weights.safetensors: equal, SHA-256", "predictions: those of all 144 images equal"):
        assert line in done.stdout
    assert done.stdout.rstrip().endswith("reproduced bit for bit")
    [run] = tracker.children(study, "reproduction")
    assert (run.data.tags["reproduces"], run.data.tags["reproduced"]) == (trained.finished, "reproduced bit for bit")
    assert tracker.best_run_ids(study, 10) == [trained.finished]
    assert [c.trial_run for c in finals.plan_finals(tracker, study, 5, 1).candidates] == [trained.finished]


def test_what_was_stored_and_is_not_what_comes_out_ends_with_exit_code_6(
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
    run_id = tracker.id_of(experiment.run(one_epoch, digits, CPU, tracker, "tampered").run_key)
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
    [again] = tracker.client.search_runs([tracker.experiment("digits")], f"tags.reproduces = '{run_id}'")
    assert again.data.tags["reproduced"].startswith("not reproduced")


def test_a_pruned_run_is_compared_over_the_epochs_that_it_had(
    trained: Trained, tracker: MlflowTracker, digits: TrainingData
) -> None:
    past = find_past(tracker, trained.pruned)
    assert (past.state, past.epochs) == ("pruned", 1)
    outcome = reproduce.reproduce(tracker, past, digits, CPU)
    assert (outcome.state, outcome.epochs) == (State.PRUNED, 1)
    comparison = compare(tracker, past, tracker.id_of(outcome.run_key), 144, None)
    assert comparison.equal and comparison.points == 0
    assert comparison.lines[0] == "metrics: 6 numbers of 1 epochs, 6 equal"


def test_a_run_of_two_threads_is_trained_with_two(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    seen, before = [], torch.get_num_threads()
    short = small_recipe.changed({"training.epochs": 1})
    with reproduce.threads(2):
        first = experiment.run(short, digits, CPU, tracker, "two threads")
    past = find_past(tracker, tracker.id_of(first.run_key))
    assert past.threads == 2
    again = reproduce.reproduce(tracker, past, digits, CPU, lambda report: seen.append(torch.get_num_threads()))
    assert seen == [2] and torch.get_num_threads() == before
    assert compare(tracker, past, tracker.id_of(again.run_key), 144, None).equal


def test_another_training_is_found_to_differ_in_every_part(
    trained: Trained, tracker: MlflowTracker, other_seed: Outcome
) -> None:
    past = find_past(tracker, trained.finished)
    comparison = compare(tracker, past, tracker.id_of(other_seed.run_key), 144, None)
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


def test_unequal_bits_are_forgiven_within_the_tolerance_and_only_for_a_cause(
    trained: Trained, tracker: MlflowTracker, other_seed: Outcome
) -> None:
    past = find_past(tracker, trained.finished)
    wide, none = (compare(tracker, past, tracker.id_of(other_seed.run_key), 144, points) for points in (100.0, 0.0))
    cause = [Difference("torch: 2.11 then, 2.15 now", matters=True), Difference("pytest: 8 then, 9 now", matters=False)]
    said = verdict(wide, cause)
    assert said.startswith("reproduced within the tolerance: val/accuracy differs by")
    assert said.endswith("equal bits can't be expected: torch")
    assert none.points > 0
    for comparison, found in ((wide, cause[1:]), (none, cause)):
        with pytest.raises(NotReproduced, match=r"^not reproduced") as caught:
            verdict(comparison, found)
        assert exit_code(caught.value) == 6
        assert len(caught.value.lines) == 1 + len(comparison.lines)


def test_the_default_tolerance_is_three_standard_deviations_between_two_seeds(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    def tolerance(accuracy: float, images: int) -> float:
        with tracker.run("scored", small_recipe, digits) as run:
            run.log_metrics({"val/accuracy": accuracy}, 1)
            run.end(State.FINISHED)
        return reproduce.default_tolerance(find_past(tracker, tracker.id_of(run.key)), images)

    assert tolerance(0.94, 5000) == pytest.approx(1.04, abs=0.01)
    assert tolerance(1.0, 144) == pytest.approx(300 / 144), "three images, where none was wrong"


def test_what_differs_from_then_is_told_line_by_line(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    with tracker.run("old", small_recipe, digits) as run:
        run.log_metrics({"val/accuracy": 0.5}, 1)
        run.end(State.FINISHED)
    assert differences(tracker, find_past(tracker, tracker.id_of(run.key)), CPU) == []

    environment = (tracker.read_file(tracker.id_of(run.key), "environment.txt") or b"").decode()
    changed = environment.replace("# cpu: ", "# cpu: Old ").replace("\ntorch==", "\ntorch==0.").replace(
        "\npytest==", "\ntransistor==1.0\npytest=="
    )  # fmt: skip
    (tmp_path / "environment.txt").write_text(changed)
    (tmp_path / "diff.patch").write_text("--- a\n+++ b\n")
    for name in ("environment.txt", "diff.patch"):
        tracker.client.log_artifact(tracker.id_of(run.key), str(tmp_path / name))
    tracker.client.set_tag(tracker.id_of(run.key), "mlflow.source.git.commit", "0" * 40)
    tracker.client.set_tag(tracker.id_of(run.key), "device", "cuda")
    found = {d.line.partition(":")[0]: d for d in differences(tracker, find_past(tracker, tracker.id_of(run.key)), CPU)}
    matter = {name: difference.matters for name, difference in found.items()}
    assert matter == {
        "commit": True,
        "uncommitted difference": True,
        "processor": True,
        "torch": True,
        "transistor": False,
        "device": True,
    }
    assert found["transistor"].line == "transistor: 1.0 then, none now"
    assert found["uncommitted difference"].line.startswith("uncommitted difference: 2 lines then (diff.patch of run ")


def test_what_can_not_be_reproduced_is_told(
    trained: Trained, tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with tracker.run("stillborn", small_recipe, digits) as stillborn:
        stillborn.end(State.FAILED, "diverged")
    parent = tracker.studies()[0].parent
    for run_id, line in {
        "last": "RUN last: must be a run's id, 32 of 0-9a-f",
        "0" * 32: "no such run in the tracking store",
        parent: "a whole study",
        tracker.id_of(stillborn.key): "failed before its first epoch ended; there is nothing to compare",
    }.items():
        with pytest.raises(UserError) as caught:
            find_past(tracker, run_id)
        assert line in caught.value.lines[0]
    with tracker.run("open", small_recipe, digits) as still_open, pytest.raises(UserError, match="has not ended"):
        find_past(tracker, tracker.id_of(still_open.key))


def test_other_data_is_refused(trained: Trained, tracker: MlflowTracker, digits: TrainingData) -> None:
    import dataclasses

    past = find_past(tracker, trained.finished)
    with pytest.raises(DataError, match="trained on other data than is here"):
        reproduce.reproduce(tracker, past, dataclasses.replace(digits, digest="f" * 64), CPU)
