import itertools
import json
import os
import shutil
import signal
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pipeline.errors import UserError
from pipeline.training import checkpoints
from pipeline.training.checkpoints import load_weights, read_checkpoint, save_checkpoint, save_weights

# A fork of a process with threads of torch: the child only copies small tensors and writes files, then ends.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def convnet(seed=0, width=4):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 5))
    network[1].num_batches_tracked += 2**40 + seed  # more than a float32 holds
    network[1].running_mean.normal_()
    return network.to(memory_format=torch.channels_last)


def same(one, other):
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def loaded(path):
    network = convnet(seed=99)
    load_weights(path, network)
    return network


def test_weights_load_bit_for_bit_in_the_networks_memory_format(tmp_path):
    network = convnet(1)
    with torch.no_grad():
        network[0].weight[0, :, 0, 0] = torch.tensor([float("nan"), -0.0, 1e-42])
    path = tmp_path / "w.safetensors"
    save_weights(path, network, {})
    for other in (convnet(2), convnet(2).to(memory_format=torch.contiguous_format)):
        strides = other[0].weight.stride()
        load_weights(path, other)
        assert other[0].weight.stride() == strides
        for name, tensor in network.state_dict().items():
            there = other.state_dict()[name]
            assert there.dtype == tensor.dtype
            assert there.contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes(), name


def test_file_holds_float32_and_keeps_integers(tmp_path):
    path = tmp_path / "w.safetensors"
    network = convnet(1)
    for dtype in (torch.bfloat16, torch.float64):
        save_weights(path, network.to(dtype), {})
        with safe_open(path, "pt") as file:
            dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        assert dtypes.pop("1.num_batches_tracked") == torch.int64
        assert set(dtypes.values()) == {torch.float32}


def test_tied_weights_are_saved_and_come_back(tmp_path):
    network, other = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    network[1].weight = network[0].weight
    other[1].weight = other[0].weight
    save_weights(tmp_path / "w.safetensors", network, {})
    load_weights(tmp_path / "w.safetensors", other)
    assert same(network, other)


def test_equal_weights_and_metadata_give_equal_bytes(tmp_path):
    metadata = {f"key {number}": f"välue {number}" for number in range(20)}
    contents = set()
    for round_ in range(5):
        path = tmp_path / f"{round_}.safetensors"
        save_weights(path, convnet(1), dict(sorted(metadata.items(), reverse=round_ % 2 == 0)))
        contents.add(path.read_bytes())
        with safe_open(path, "pt") as file:
            assert file.metadata() == metadata
    assert len(contents) == 1
    assert (8 + int.from_bytes(contents.pop()[:8], "little")) % 8 == 0, "the tensors must stay aligned"


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (convnet(width=6), "0.weight has shape (4, 3, 3, 3) in the file and shape (6, 3, 3, 3) in the network"),
        (
            nn.Sequential(*convnet()[:3], nn.Linear(4, 9)),
            "3.weight has shape (5, 4) in the file and shape (9, 4) in the network",
        ),
        (
            nn.Sequential(*convnet(), nn.Linear(5, 5)),
            "4.weight has no entry in the file and shape (5, 5) in the network",
        ),
        (convnet()[:3], "3.bias has shape (5,) in the file and no entry in the network"),
    ],
)
def test_first_tensor_that_differs_is_named(tmp_path, network, message):
    path = tmp_path / "w.safetensors"
    save_weights(path, convnet(1), {})
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(path, network)
    assert error.value.lines == [f"{path}: {message}"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_missing_or_truncated_weights_are_a_user_error(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match=r"w\.safetensors: can't be read as weights"):
        load_weights(path, convnet())
    save_weights(path, convnet(), {})
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"w\.safetensors: can't be read as weights"):
            load_weights(path, convnet())


FACTS = {"epoch": 3, "recipe": {"widths": (4, 8)}, 7: None, 10: 0.1, "loss": float("inf"), "name": "Größe"}


def test_checkpoint_holds_averaged_and_plain_weights_and_facts(tmp_path):
    folder = tmp_path / "deep" / "er" / "best.1"
    save_checkpoint(folder, convnet(1), convnet(2), FACTS)
    assert read_checkpoint(folder) == json.loads(json.dumps(FACTS))
    assert same(loaded(folder / "weights.safetensors"), convnet(2))
    assert same(loaded(folder / "weights_plain.safetensors"), convnet(1))
    for name, kind in (("weights", "averaged"), ("weights_plain", "plain")):
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            assert file.metadata() == {"weights": kind}
    assert {path.name for path in folder.iterdir()} == {
        "weights.safetensors",
        "weights_plain.safetensors",
        "checkpoint.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["best.1"]


def test_checkpoint_without_averages_replaces_one_with_them(tmp_path):
    save_checkpoint(tmp_path / "last", convnet(1), convnet(2), {"epoch": 1})
    save_checkpoint(tmp_path / "last", convnet(3), None, {"epoch": 2})
    assert read_checkpoint(tmp_path / "last") == {"epoch": 2}
    assert same(loaded(tmp_path / "last" / "weights.safetensors"), convnet(3))
    assert {path.name for path in (tmp_path / "last").iterdir()} == {"weights.safetensors", "checkpoint.json"}


def test_folder_that_is_no_checkpoint_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    save_checkpoint(tmp_path / "photos", convnet(), None, {})  # an empty folder may become one
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("years of work")
    (tmp_path / "file").write_text("more")
    for name in ("thesis", "file"):
        with pytest.raises(UserError, match=f"{name}: holds something that is no checkpoint"):
            save_checkpoint(tmp_path / name, convnet(), None, {})
    assert (tmp_path / "thesis" / "text").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "more"


def test_a_missing_checkpoint_is_named(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nothing", "file"):
        with pytest.raises(UserError, match=f"{name}: no checkpoint here"):
            read_checkpoint(tmp_path / name)


def test_every_flipped_byte_is_detected_in_its_file(tmp_path):
    folder = tmp_path / "c"
    save_checkpoint(folder, convnet(1), convnet(2), FACTS)
    for name in ("weights.safetensors", "weights_plain.safetensors", "checkpoint.json"):
        path = folder / name
        content = path.read_bytes()
        for position in range(0, len(content), 1 if name == "checkpoint.json" else 97):
            if content[position : position + 1].isspace():
                continue  # blanks between JSON's tokens carry nothing
            damaged = bytearray(content)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(UserError) as error:
                read_checkpoint(folder)
            assert [line.partition(": ")[0] for line in error.value.lines] == [str(path)], position
        path.write_bytes(content)
    assert read_checkpoint(folder)["epoch"] == 3


def test_each_damaged_or_missing_file_is_named(tmp_path):
    folder = tmp_path / "c"
    save_checkpoint(folder, convnet(1), convnet(2), {})
    (folder / "weights.safetensors").unlink()
    (folder / "weights_plain.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as error:
        read_checkpoint(folder)
    assert error.value.lines == [
        f"{folder / 'weights.safetensors'}: missing",
        f"{folder / 'weights_plain.safetensors'}: damaged, its digest differs",
    ]


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"format": 2}'])
def test_record_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "checkpoint.json").write_text(content)
    with pytest.raises(UserError, match=r"checkpoint\.json: not of format 1"):
        read_checkpoint(tmp_path)


def save_and_be_killed(folder, number, at):
    return killed_at(at, lambda: save_checkpoint(folder, convnet(number), convnet(-number), {"number": number}))


def killed_at(at, save):
    """Call `save` in a process that SIGKILL ends before its `at`-th act on files; was it killed?

    An act is an open, a rename, a removal, a new folder, an fsync. A file that would be synced is cut in half first.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child must end by a kill or well"
        return os.WIFSIGNALED(status)
    try:
        acts, fsync = itertools.count(1), os.fsync

        def act(descriptor=None):
            if next(acts) == at:
                if descriptor is not None and stat.S_ISREG(os.fstat(descriptor).st_mode):
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        def on_event(event, _):
            if event in {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}:
                act()

        def fsync_unless_killed(descriptor):
            act(descriptor)
            fsync(descriptor)

        os.fsync = fsync_unless_killed
        sys.addaudithook(on_event)
        save()
        os._exit(0)
    except BaseException:
        os._exit(1)


def number_of(folder):
    """Which checkpoint lies there, whole and with its own weights."""
    number = read_checkpoint(folder)["number"]
    assert same(loaded(folder / "weights.safetensors"), convnet(-number))
    assert same(loaded(folder / "weights_plain.safetensors"), convnet(number))
    return number


def visible(folder):
    return [path.name for path in folder.parent.iterdir() if not path.name.startswith(".")]


def test_kill_during_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path):
    found = []
    for at in itertools.count(1):
        folder = tmp_path / str(at) / "best"
        save_checkpoint(folder, convnet(1), convnet(-1), {"number": 1})
        killed = save_and_be_killed(folder, 2, at)
        found.append(number_of(folder))
        assert visible(folder) == ["best"]
        aside = folder.with_name(".best.old")
        if (aside / "checkpoint.json").exists():
            assert number_of(aside) == 1, "what looks like a checkpoint is one"
        if not killed:
            break
        save_checkpoint(folder, convnet(3), convnet(-3), {"number": 3})
        assert number_of(folder) == 3
        assert [path.name for path in folder.parent.iterdir()] == ["best"], "leftovers go with the next save"
    assert len(found) > 15, "every act must have been cut"
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_kill_during_the_first_save_leaves_all_or_nothing(tmp_path):
    found = []
    for at in itertools.count(1):
        folder = tmp_path / str(at) / "best"
        folder.parent.mkdir()
        killed = save_and_be_killed(folder, 1, at)
        if visible(folder):
            found.append(number_of(folder))
        else:
            with pytest.raises(UserError, match="no checkpoint here"):
                read_checkpoint(folder)
            found.append(0)
        if not killed:
            break
    assert len(found) > 8
    assert found == sorted(found)
    assert set(found) == {0, 1}


def test_repeatedly_killed_writers_never_lose_a_checkpoint(tmp_path):
    folder = tmp_path / "best"
    save_checkpoint(folder, convnet(1), convnet(-1), {"number": 1})
    last = 1
    for number in range(2, 32):
        killed = save_and_be_killed(folder, number, at=1 + number * 7 % 29)
        if number % 3:
            continue  # most are read by no one before the next writer comes
        now = number_of(folder)
        assert last <= now <= number
        assert killed or now == number
        last = now
    assert last > 1


def test_reader_that_restores_the_old_one_does_not_stop_a_writer(tmp_path, monkeypatch):
    folder = tmp_path / "best"
    save_checkpoint(folder, convnet(1), None, {"number": 1})
    replace, read = os.replace, []

    def replace_and_read(source, target):
        replace(source, target)
        if not folder.exists() and not read:
            read.append(read_checkpoint(folder)["number"])

    monkeypatch.setattr(checkpoints.os, "replace", replace_and_read)
    save_checkpoint(folder, convnet(2), None, {"number": 2})
    assert read == [1]
    assert read_checkpoint(folder) == {"number": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_reader_reads_the_new_one_of_a_finishing_writer(tmp_path, monkeypatch):
    folder, aside, new = (tmp_path / name for name in ("best", ".best.old", ".best.new"))
    save_checkpoint(aside, convnet(1), None, {"number": 1})
    save_checkpoint(new, convnet(2), None, {"number": 2})
    replace = os.replace

    def replace_too_late(source, target):
        replace(new, folder)
        shutil.rmtree(aside)
        replace(source, target)

    monkeypatch.setattr(checkpoints.os, "replace", replace_too_late)
    assert read_checkpoint(folder) == {"number": 2}


def test_files_are_synced_before_the_rename_and_removal(tmp_path, monkeypatch):
    folder = tmp_path / "best"
    save_checkpoint(folder, convnet(1), convnet(-1), {})
    log, fsync, replace, rmtree = [], os.fsync, os.replace, shutil.rmtree

    def log_fsync(descriptor):
        log.append(("fsync", os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)))
        fsync(descriptor)

    def log_replace(source, target):
        replace(source, target)
        log.append(("rename", source.name, target.name))

    def log_rmtree(path, **options):
        if path.exists():
            log.append(("remove", path.name))
        rmtree(path, **options)

    monkeypatch.setattr(checkpoints.os, "fsync", log_fsync)
    monkeypatch.setattr(checkpoints.os, "replace", log_replace)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", log_rmtree)
    save_checkpoint(folder, convnet(2), convnet(-2), {})
    assert log == [
        ("fsync", ".best.new/weights.safetensors"),
        ("fsync", ".best.new/weights_plain.safetensors"),
        ("fsync", ".best.new/checkpoint.json"),
        ("fsync", ".best.new"),
        ("fsync", "."),
        ("rename", "best", ".best.old"),
        ("rename", ".best.new", "best"),
        ("fsync", "."),
        ("remove", ".best.old"),
    ]


def test_empty_folder_does_not_hide_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path / ".best.old", convnet(1), None, {"number": 1})
    (tmp_path / "best").mkdir()
    assert read_checkpoint(tmp_path / "best") == {"number": 1}


def test_remains_of_an_old_checkpoint_do_not_come_back(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "best", convnet(1), None, {})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)  # as if killed there
        save_checkpoint(tmp_path / "best", convnet(2), None, {})
    assert (tmp_path / ".best.old" / "weights.safetensors").exists()
    shutil.rmtree(tmp_path / "best")
    with pytest.raises(UserError, match="best: no checkpoint here"):
        read_checkpoint(tmp_path / "best")
    save_checkpoint(tmp_path / "best", convnet(2), None, {})
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_current_folder_is_read_as_any_other(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "model", nn.Linear(2, 3), None, {"a": 1})
    monkeypatch.chdir(tmp_path / "model")
    assert read_checkpoint(Path(".")) == {"a": 1}
    with pytest.raises(UserError, match="no checkpoint here"):
        read_checkpoint(Path("/"))
