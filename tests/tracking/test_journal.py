"""A journal on disk: complete records, one process at a time, full disks."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tracking_stores import KEY, records

from pipeline.errors import UserError
from pipeline.tracking.journal import FOLDER, RECORDS, Busy, Journal, is_busy, journals

START = {"kind": "start", "address": "mlflow.db"}


def test_torn_last_line_is_cut_off_and_the_rest_resumed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / KEY)
    journal.append(START)
    journal.append_metrics({"val/loss": 0.1 + 0.2}, 1, durable=True)
    journal.release()
    complete = (tmp_path / KEY / RECORDS).read_bytes()
    for cut in (1, 20, len(complete.splitlines()[1])):
        (tmp_path / KEY / RECORDS).write_bytes(complete + complete.splitlines()[1][:cut])
        again = Journal(tmp_path / KEY)
        assert (tmp_path / KEY / RECORDS).read_bytes() == complete
        assert not again.is_new
        again.append_metrics({"val/loss": 0.2}, 2, durable=True)
        again.release()
        assert [record.get("values") for record in records(tmp_path / KEY)] == [
            None,
            {"val/loss": 0.1 + 0.2},
            {"val/loss": 0.2},
        ]


def test_repeated_step_keeps_its_first_value(tmp_path: Path) -> None:
    journal = Journal(tmp_path / KEY)
    journal.append(START)
    journal.append_metrics({"val/loss": 0.5}, 1, durable=False)
    journal.append_metrics({"val/loss": 0.4}, 1, durable=False)
    journal.release()
    again = Journal(tmp_path / KEY)
    again.append_metrics({"val/loss": 0.3, "val/f1": 0.2}, 1, durable=False)
    again.append_metrics({"val/loss": 0.2}, 2, durable=False)
    assert [record["values"] for record in records(tmp_path / KEY)[1:]] == [
        {"val/loss": 0.5},
        {"val/f1": 0.2},
        {"val/loss": 0.2},
    ]


@pytest.mark.parametrize("damaged", [b"", b'{"val/loss": ', b"\xff", b"1"])
def test_steps_before_that_are_damaged_are_asked_for_again(damaged: bytes, tmp_path: Path) -> None:
    journal = Journal(tmp_path / KEY)
    assert journal.steps_before is None
    journal.steps_before = {"val/loss": 3}
    assert journal.steps_before == {"val/loss": 3}
    [file] = [path for path in journal.folder.iterdir() if b"val/loss" in path.read_bytes()]
    file.write_bytes(damaged)
    assert journal.steps_before is None
    journal.release()


def test_damaged_line_is_refused_by_place_and_unlocked(tmp_path: Path) -> None:
    (tmp_path / KEY).mkdir()
    (tmp_path / KEY / RECORDS).write_bytes(b'{"kind": "start"}\n{"ki\xffnd"\n')
    with pytest.raises(UserError, match="damaged before byte"):
        Journal(tmp_path / KEY)
    assert not is_busy(tmp_path / KEY)


def test_one_process_at_a_time_has_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / KEY)
    assert is_busy(tmp_path / KEY)
    with pytest.raises(Busy):
        Journal(tmp_path / KEY)
    threading.Timer(0.3, journal.remove).start()
    successor = Journal(tmp_path / KEY, timeout_s=10)
    assert successor.is_new and is_busy(tmp_path / KEY), "not the folder that went, but a new one"
    successor.release()
    assert not is_busy(tmp_path / KEY)


def small_disk(size: str) -> list[str]:
    """A command before a script that gives it a disk of this size at /mnt, of its own; skipped where that can't be."""
    command = [
        "unshare",
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        f'mount -t tmpfs -o size={size} none /mnt && exec "$@"',
    ]
    try:
        if subprocess.run([*command, "sh", "true"], capture_output=True, timeout=10).returncode == 0:
            return [*command, "sh"]
    except (OSError, subprocess.TimeoutExpired):
        pass
    pytest.skip("no small disk: needs unshare and user namespaces")


def test_full_disk_leaves_the_journal_intact(tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.mkdir()
    (source / "file").write_bytes(bytes(200_000))
    script = f"""
from pathlib import Path
from pipeline.tracking.journal import DiskFault, Journal, RECORDS
journal = Journal(Path("/mnt/journal/key"))
journal.append({{"kind": "start"}})
large = {{"kind": "metrics", "step": 1, "values": {{"x" * 200_000: 1.0}}}}
for write in (lambda: journal.append(large, durable=True), lambda: journal.append_files(Path({str(source)!r}))):
    before = Path("/mnt/journal/key", RECORDS).read_bytes()
    try:
        write()
    except DiskFault as error:
        assert len(error.lines) == 1 and "No space left" in error.lines[0] and "command resumes" in error.lines[0], error
        print("told")
    assert Path("/mnt/journal/key", RECORDS).read_bytes() == before
assert not list(Path("/mnt/journal/key").glob("files/*"))
journal.append({{"kind": "end"}}, durable=True)
"""
    process = subprocess.run(
        [*small_disk("64k"), sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert process.stdout.split() == ["told", "told"], process.stderr
    assert process.returncode == 0, process.stderr


def test_files_are_kept_when_their_folder_is_removed(tmp_path: Path) -> None:
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "a.txt").write_text("one")
    journal = Journal(tmp_path / KEY)
    journal.append_files(tmp_path / "out")
    journal.append_files(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    names = [record["folder"] for record in records(tmp_path / KEY)]
    assert names == ["1", "2"]
    staged = journal.staged("1")
    assert staged and (staged / "deep" / "a.txt").read_text() == "one"
    journal.remove_staged(staged)
    assert journal.staged("1") is None and journal.staged("2")


def test_a_journal_that_goes_while_they_are_listed_is_none(tmp_path: Path) -> None:
    """Another process removes a journal that it has sent, at any moment."""
    stays = tmp_path / FOLDER / "stays"
    stays.mkdir(parents=True)
    (stays / RECORDS).touch()
    (tmp_path / FOLDER / "a file").touch()
    stop = threading.Event()

    def come_and_go() -> None:
        for number in range(100_000):
            folder = tmp_path / FOLDER / str(number)
            folder.mkdir()
            (folder / RECORDS).touch()
            shutil.rmtree(folder)
            if stop.is_set():
                return

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        assert all(stays in journals(tmp_path) for _ in range(2000))
    finally:
        stop.set()
        other.join()
