"""A stopped training resumes from its state, and ends as one that was never stopped."""

import random
import resource
import shutil
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fork_server import shared_fork_server
from safetensors.torch import load_file, save
from test_checkpoints import killed_at
from training_cases import at_size

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.models.build import build_network
from pipeline.recipe import Recipe
from pipeline.search.speed import few_images
from pipeline.sections.data import Data
from pipeline.training import checkpoints
from pipeline.training.checkpoints import RECORD, read_checkpoint, save_folder
from pipeline.training.loop import EpochReport, Result, _Learner, train
from pipeline.training.optimizers import build_optimizer
from pipeline.training.resume import TENSORS, Parts, Resume

CPU = torch.device("cpu")
EPOCHS = 5
ADAPTIVE = {"optimizer.lr": 3e-3, "optimizer.weight_decay": 0.01}
STEP = {"schedule.name": "step", "schedule.interval": 0.3, "schedule.gamma": 0.5}
ONE_CYCLE = {"schedule.name": "one_cycle", "schedule.peak": 0.4}
FAST = {
    "model.network": "fast",
    "model.widths": (8, 16),
    "augmentation.horizontal_flip": "alternating",
    "optimizer.name": "muon",
    "optimizer.lr": 0.1,
    "optimizer.bias_lr": 10,
    "optimizer.head_lr": 100,
    "optimizer.whitening_share": 0.5,
    "curriculum.start_size": 6,
    "curriculum.start_strength": 0.3,
}
KINDS = {
    "sgd nesterov, one-cycle, mixup, dropout, average": {"optimizer.momentum": 0.9, **ONE_CYCLE},
    "sgd without momentum, bf16": {"optimizer.momentum": 0, "optimizer.nesterov": False, "training.precision": "bf16"},
    "adam, step, fp32": {"optimizer.name": "adam", "training.precision": "fp32", **ADAPTIVE, **STEP},
    "adamw, no average, balanced classes, weights, focal loss": {
        "optimizer.name": "adamw",
        "training.ema_decay": 0,
        "data.sampler": "balanced",
        "loss.name": "focal",
        "loss.class_weights": 0.5,
        **ADAPTIVE,
    },
    "muon, whitening that freezes, alternating flip, growing images": FAST,
    "adamw, frozen layers and epochs, rates by layer, stochastic depth": {
        "data.image_size": 32,
        "model.network": "timm",
        "model.backbone": "test_efficientnet",
        "model.drop_path": 0.3,
        "optimizer.name": "adamw",
        "transfer.frozen_epochs": 2,
        "transfer.frozen_share": 0.5,
        "transfer.layer_decay": 0.7,
        "transfer.head_multiple": 10,
        **ADAPTIVE,
    },
    "adam, dropout of whole maps": {
        "model.network": "plain",
        "model.widths": (4, 8),
        "model.convolution_dropout": 0.2,
        "model.dropout": 0.2,
        "optimizer.name": "adam",
        **ADAPTIVE,
    },
}


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def few(digits: TrainingData) -> TrainingData:
    """Four batches of 64, and a rest that waits for another epoch's order."""
    return few_images(digits, 4 * 64 + 20, 60)


@pytest.fixture(scope="module")
def recipe(small_recipe: Recipe) -> Recipe:
    return small_recipe.changed({"training.epochs": EPOCHS})


def train_until(recipe: Recipe, data: TrainingData, folder: Path, epoch: int, step: int = 2) -> list[int]:
    """Train, from the state in `folder`, until a step of an epoch; the epochs that it reported."""
    reported: list[int] = []
    keep = Resume(folder, every_s=0)

    def on_step(*at: int) -> None:
        if at[:2] == (epoch, step):
            raise Stop

    with pytest.raises(Stop):
        train(recipe, data, CPU, lambda report: reported.append(report.epoch), on_step, resume=keep)
    return reported


def untimed(history: list[EpochReport]) -> list[dict[str, float]]:
    timed = {"time/epoch_s", "throughput/images_per_s", "memory/peak_gib"}
    return [{k: v for k, v in report.metrics.items() if k not in timed} | {"epoch": report.epoch} for report in history]


def assert_equal_results(one: Result, other: Result) -> None:
    for mine, theirs in ((one.network, other.network), (one.plain, other.plain)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            expected = theirs.state_dict()
            for name, tensor in mine.state_dict().items():
                assert torch.equal(tensor, expected[name]), name
    assert torch.equal(one.validation_logits, other.validation_logits)
    assert untimed(one.history) == untimed(other.history)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_resume_after_many_stops_equals_an_uninterrupted_training(
    changes: dict, recipe: Recipe, few: TrainingData, tmp_path: Path
) -> None:
    recipe = recipe.changed(changes)
    few = at_size(few, recipe.data.image_size)
    uninterrupted = train(recipe, few, CPU)
    assert len({str(metrics["val/loss"]) for metrics in untimed(uninterrupted.history)}) > 1, "it must learn something"
    folder, draw, done = tmp_path / "a" / "key", random.Random(str(changes)), 0
    for epoch in (1, *sorted(draw.choices(range(1, EPOCHS + 1), k=3)), EPOCHS):
        reported = train_until(recipe, few, folder, epoch, step=draw.randint(1, 4))
        assert reported == list(range(done + 1, epoch)), "an epoch that was reported is not reported again"
        done = epoch - 1
    keep, last = Resume(folder, every_s=0), []
    result = train(recipe, few, CPU, last.append, resume=keep)
    assert [report.epoch for report in last] == [EPOCHS]
    assert keep.notes == [f"resumes after epoch {EPOCHS - 1} of {EPOCHS}"]
    assert_equal_results(result, uninterrupted)
    assert result.seconds > sum(report.metrics["time/epoch_s"] for report in result.history)


def test_resume_continues_after_kill(recipe: Recipe, few: TrainingData, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    at = 2 * 4 + 3  # the third epoch's third step
    assert shared_fork_server().script(KILLED, str(tmp_path), str(at)).wait() == -signal.SIGKILL
    keep = Resume(tmp_path / "state", every_s=0)
    result = train(recipe, few, CPU, resume=keep)
    assert keep.notes == ["resumes after epoch 2 of 5"]
    assert_equal_results(result, train(recipe, few, CPU))


KILLED = """
import os, signal, sys
from itertools import count
from pathlib import Path
import torch
from pipeline.data.datasets import load
from pipeline.data.prepare import prepare
from pipeline.recipe import parse_recipe
from pipeline.search.speed import few_images
from pipeline.training.loop import train
from pipeline.training.resume import Resume

home, at, steps = Path(sys.argv[1]), int(sys.argv[2]), count(1)
recipe = parse_recipe((home / "recipe.json").read_bytes())
data = few_images(prepare(load(recipe.data, Path("data")), recipe.data, torch.device("cpu")), 4 * 64 + 20, 60)

def on_step(epoch, step, total):
    if next(steps) == at:
        os.kill(os.getpid(), signal.SIGKILL)

train(recipe, data, torch.device("cpu"), on_step=on_step, resume=Resume(home / "state", every_s=0))
"""


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def kept(recipe: Recipe, few: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the states after epochs 2 and 3; to be copied."""
    folder = tmp_path_factory.mktemp("kept") / "key"
    train_until(recipe, few, folder, 4)
    assert states(folder) == ["epoch-000002", "epoch-000003"]
    return folder


def parts_of(recipe: Recipe, seed: int) -> Parts:
    network = build_network(recipe.model, 10, 8, seed)
    return Parts(network, build_optimizer(network, recipe.optimizer, CPU), None)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_kill_at_any_point_of_a_save_leaves_a_complete_state(recipe: Recipe, few: TrainingData, tmp_path: Path) -> None:
    resumed_after = []
    for at in count(1):
        folder = tmp_path / str(at)

        def save_next(epoch: int, folder: Path = folder) -> None:
            keep = Resume(folder, every_s=0)
            keep.restore(recipe, few, parts_of(recipe, 0))
            assert len(keep.history) == epoch - 1
            keep.save_if_due(parts_of(recipe, epoch), [{"val/loss": 1.0}] * epoch, seconds=epoch)

        for epoch in (1, 2):
            save_next(epoch)
        killed = killed_at(at, lambda: save_next(3))
        keep, parts = Resume(folder, every_s=0), parts_of(recipe, 0)
        keep.restore(recipe, few, parts)
        resumed_after.append(len(keep.history))
        assert keep.notes == [f"resumes after epoch {resumed_after[-1]} of {EPOCHS}"], (
            "nothing half written is taken for damaged"
        )
        expected = parts_of(recipe, resumed_after[-1]).network.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in parts.network.state_dict().items())
        if not killed:
            break
        for epoch in range(resumed_after[-1] + 1, 5):
            save_next(epoch)
        assert sorted(path.name for path in folder.iterdir()) == ["epoch-000003", "epoch-000004"], "leftovers go"
    assert resumed_after == sorted(resumed_after)
    assert set(resumed_after) == {2, 3}
    assert len(resumed_after) > 15, "every system call must have been cut"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_kill_at_any_point_of_the_removal_is_no_obstacle(recipe: Recipe, few: TrainingData, tmp_path: Path) -> None:
    """The states are removed when the run ends, in any order of their files; whoever repeats it saves them again."""

    def save_until(folder: Path, last: int) -> None:
        keep = Resume(folder, every_s=0)
        keep.restore(recipe, few, parts_of(recipe, 0))
        for epoch in range(len(keep.history) + 1, last + 1):
            keep.save_if_due(parts_of(recipe, epoch), [{"val/loss": 1.0}] * epoch, seconds=epoch)

    for at in count(0):
        folder, killed = tmp_path / str(at), True
        save_until(folder, 3)
        if at == 0:
            (folder / "epoch-000003" / RECORD).unlink()
        else:
            killed = killed_at(at, lambda folder=folder: shutil.rmtree(folder, ignore_errors=True))
        save_until(folder, 4)
        assert states(folder) == ["epoch-000003", "epoch-000004"]
        if not killed:
            break
    assert at > 8, "every removal must have been cut"


def test_damaged_state_is_noted_and_the_previous_one_used(
    kept: Path, recipe: Recipe, few: TrainingData, tmp_path: Path
) -> None:
    uninterrupted = train(recipe, few, CPU)
    for number, name in enumerate((TENSORS, TENSORS, "checkpoint.json")):
        folder = tmp_path / str(number)
        shutil.copytree(kept, folder)
        file = folder / "epoch-000003" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if number else content[: len(content) // 2])
        keep = Resume(folder, every_s=0)
        result = train(recipe, few, CPU, resume=keep)
        assert keep.notes[0].startswith(f"the state of epoch-000003 is not used: {file}: damaged")
        assert keep.notes[1:] == ["resumes after epoch 2 of 5"]
        assert_equal_results(result, uninterrupted)


def test_training_restarts_where_all_states_are_damaged(
    kept: Path, recipe: Recipe, few: TrainingData, tmp_path: Path
) -> None:
    folder = tmp_path / "key"
    shutil.copytree(kept, folder)
    (folder / "epoch-000002" / TENSORS).unlink()
    (folder / "epoch-000003" / TENSORS).write_bytes(b"")
    keep, reported = Resume(folder, every_s=0), []
    result = train(recipe, few, CPU, reported.append, resume=keep)
    assert [line.partition(":")[0] for line in keep.notes[:2]] == [
        "the state of epoch-000003 is not used",
        "the state of epoch-000002 is not used",
    ]
    assert keep.notes[2:] == ["no usable state remains: starts from epoch 1 again"]
    assert len(reported) == EPOCHS
    assert_equal_results(result, train(recipe, few, CPU))


def test_tensors_that_do_not_fit_are_not_used(kept: Path, recipe: Recipe, few: TrainingData, tmp_path: Path) -> None:
    newest = kept / "epoch-000003"
    facts, tensors = read_checkpoint(newest), load_file(newest / TENSORS)
    weight = next(name for name in tensors if name.startswith("network.") and name.endswith("weight"))
    momentum = next(name for name in tensors if name.startswith("optimizer.") and tensors[name].ndim == 4)
    wrong = {
        "wider": tensors | {weight: torch.zeros(99, 3, 3, 3)},
        "half": tensors | {weight: tensors[weight].half()},
        "fewer": {name: tensor for name, tensor in tensors.items() if name != weight},
        "more": tensors | {"network.nothing": torch.zeros(1)},
        "momentum": tensors | {momentum: torch.zeros(7)},
        "no such parameter": tensors | {"optimizer.999.momentum_buffer": torch.zeros(7)},
    }
    for name, content in wrong.items():
        folder = tmp_path / name
        shutil.copytree(kept, folder)
        save_folder(folder / "epoch-000003", {TENSORS: save(content)}, facts)
        keep = Resume(folder, every_s=60)
        with pytest.raises(Stop):
            train(recipe, few, CPU, on_step=_stop, resume=keep)
        assert keep.notes[0].endswith("does not fit the network of this code"), name
        assert keep.notes[1:] == ["resumes after epoch 2 of 5"]
        assert states(folder) == ["epoch-000002"], "it is said once"
    for odd in ({"epoch": 3}, facts | {"new": 1}, facts | {"seconds": "3"}, []):
        folder = tmp_path / "odd"
        shutil.rmtree(folder, ignore_errors=True)
        save_folder(folder / "epoch-000003", {TENSORS: save(tensors)}, odd)
        keep = Resume(folder, every_s=60)
        with pytest.raises(Stop):
            train(recipe, few, CPU, on_step=_stop, resume=keep)
        assert keep.notes[-1] == "no usable state remains: starts from epoch 1 again", odd


def _stop(*at: int) -> None:
    raise Stop


def test_state_of_another_recipe_or_data_is_refused_and_kept(
    kept: Path, recipe: Recipe, few: TrainingData, tmp_path: Path
) -> None:
    folder = tmp_path / "key"
    shutil.copytree(kept, folder)
    cases = {
        "recipe": (recipe.changed({"training.seed": 1}), few),
        "data": (recipe, replace(few, digest="ab" * 32)),
        "split": (recipe, replace(few, split_digest="cd" * 32)),
    }
    for name, (other, data) in cases.items():
        with pytest.raises(UserError) as error:
            train(other, data, CPU, resume=Resume(folder))
        assert len(error.value.lines) == 1
        assert f"the state of another training ({name} " in error.value.lines[0]
        assert "move the folder away" in error.value.lines[0]
    assert states(folder) == ["epoch-000002", "epoch-000003"]


@pytest.mark.parametrize(("before", "after"), [("graphed", "eager"), ("eager", "compiled")])
def test_training_resumes_however_its_steps_are_executed(
    before: str, after: str, recipe: Recipe, few: TrainingData, tmp_path: Path
) -> None:
    """As on a CPU what a GPU began with a graph."""
    there, here = (recipe.changed({"training.execution": execution}) for execution in (before, after))
    built = _Learner(there, few, CPU)
    left = Resume(tmp_path, every_s=0)
    left.restore(there, few, built.parts)
    left.save_if_due(built.parts, [{"val/loss": 1.0}], 2.0)
    found = Resume(tmp_path)
    found.restore(here, few, _Learner(here, few, CPU).parts)
    assert found.notes == ["resumes after epoch 1 of 5"] and found.history == [{"val/loss": 1.0}]


def test_state_is_saved_when_due_and_never_after_the_last_epoch(
    recipe: Recipe, few: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe, few, CPU, resume=Resume(tmp_path / "often", every_s=0))
    assert states(tmp_path / "often") == ["epoch-000003", "epoch-000004"]
    train(recipe, few, CPU, resume=Resume(tmp_path / "never", every_s=3600))
    assert not (tmp_path / "never").exists()
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("pipeline.training.resume.time", clock)

    def twenty_seconds(report: EpochReport) -> None:
        clock.now += 20

    train(
        recipe.changed({"training.epochs": 7}), few, CPU, twenty_seconds, resume=Resume(tmp_path / "some", every_s=30)
    )
    assert states(tmp_path / "some") == ["epoch-000004", "epoch-000006"]


def test_state_is_saved_after_the_epoch_is_reported(recipe: Recipe, few: TrainingData, tmp_path: Path) -> None:
    def on_epoch(report: EpochReport) -> None:
        if report.epoch == 2:
            assert states(tmp_path) == ["epoch-000001"]
            raise Stop

    with pytest.raises(Stop):
        train(recipe, few, CPU, on_epoch, resume=Resume(tmp_path, every_s=0))
    assert states(tmp_path) == ["epoch-000001"], "an epoch whose report fails is not counted as done"


def test_state_has_the_f1_of_each_class_of_its_last_epoch_alone(
    recipe: Recipe, few: TrainingData, tmp_path: Path
) -> None:
    """With those of each epoch the record of a long training with many classes is longer than what is read."""
    train_until(recipe, few, tmp_path, epoch=4)
    history = read_checkpoint(tmp_path / "epoch-000003")["history"]
    numbers = [sum(name.startswith("val/f1/") for name in metrics) for metrics in history]
    assert numbers == [0, 0, len(few.classes)]


def test_state_that_could_not_be_read_is_not_saved(
    recipe: Recipe, few: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Resume(tmp_path, every_s=0)

    def shrink(report: EpochReport) -> None:
        if report.epoch == 3:
            size = (tmp_path / "epoch-000002" / RECORD).stat().st_size
            monkeypatch.setattr(checkpoints, "MAX_RECORD", size)

    train(recipe, few, CPU, shrink, resume=keep)
    assert states(tmp_path) == ["epoch-000001", "epoch-000002"], "what can be read stays"
    (note,) = keep.notes
    assert "the state after epoch 3 could not be saved" in note and "checkpoint.json would have" in note
    again = Resume(tmp_path, every_s=0)
    train(recipe, few, CPU, resume=again)
    assert again.notes[0] == f"resumes after epoch 2 of {EPOCHS}"


def test_full_disk_loses_a_state_but_not_the_training(recipe: Recipe, few: TrainingData, tmp_path: Path) -> None:
    folder, limits = tmp_path / "key", resource.getrlimit(resource.RLIMIT_FSIZE)
    keep = Resume(folder, every_s=0)

    def fill(report: EpochReport) -> None:
        full = report.epoch in (2, 3)  # no file may be longer than 1,000 bytes, as if the disk had no more
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if full else limits[0], limits[1]))
        if report.epoch == 4:
            assert states(folder) == ["epoch-000001"], "the old state stays, and nothing half written"

    try:
        result = train(recipe, few, CPU, fill, resume=keep)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert keep.notes == ["the state after epoch 2 could not be saved: [Errno 27] File too large"]
    assert states(folder) == ["epoch-000001", "epoch-000004"]
    assert_equal_results(result, train(recipe, few, CPU))


def test_other_number_of_threads_is_noted(kept: Path, recipe: Recipe, few: TrainingData, tmp_path: Path) -> None:
    newest = kept / "epoch-000003"
    facts = read_checkpoint(newest) | {"threads": 7}
    save_folder(tmp_path / "epoch-000003", {TENSORS: (newest / TENSORS).read_bytes()}, facts)
    keep = Resume(tmp_path)
    with pytest.raises(Stop):
        train(recipe, few, CPU, on_step=_stop, resume=keep)
    assert len(keep.notes) == 1
    assert "threads = 7" in keep.notes[0]
    assert keep.notes[0].endswith("the last bits may differ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("execution", ["eager", "graphed"])
def test_resume_on_a_gpu(execution: str, recipe: Recipe, small_recipe: Recipe, tmp_path: Path) -> None:
    from pipeline.data.datasets import load
    from pipeline.data.prepare import prepare

    gpu = torch.device("cuda")
    data = prepare(load(Data(dataset="digits", image_size=8), tmp_path), small_recipe.data, gpu)
    recipe = recipe.changed({"training.deterministic": True, "training.execution": execution, "optimizer.name": "adam"})
    recipe = recipe.changed(ADAPTIVE)
    uninterrupted = train(recipe, data, gpu)
    with pytest.raises(Stop):
        train(recipe, data, gpu, _stop_in_the_third, resume=Resume(tmp_path / "key", every_s=0))
    keep = Resume(tmp_path / "key", every_s=0)
    result = train(recipe, data, gpu, resume=keep)
    assert keep.notes == ["resumes after epoch 2 of 5"]
    if execution == "eager":
        assert_equal_results(result, uninterrupted)
    else:  # a capture may choose other kernels than the steps of its warm-up
        torch.testing.assert_close(result.validation_logits, uninterrupted.validation_logits, rtol=0.05, atol=0.05)


def _stop_in_the_third(report: EpochReport) -> None:
    if report.epoch == 3:
        raise Stop
