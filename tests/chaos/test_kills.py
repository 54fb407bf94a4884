"""SIGKILL, at random moments and at those that hurt most: nothing is lost, doubled or orphaned, whatever dies when."""

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from fork_server import ForkServer
from harness import FaultInjector, Row

# Where a death could tear something apart: a function, who calls it, and about how often a process does.
AIMS = {
    "inside a checkpoint write": [
        ("pipeline.training.checkpoints:_write", "worker", 12),
        ("pipeline.training.checkpoints:_move_into_place", "worker", 6),
        ("pipeline.training.checkpoints:discard_folder", "worker", 6),
        ("pipeline.experiment:shutil.rmtree", "worker", 2),
    ],
    "inside an MLflow call": [
        ("mlflow.tracking.client:MlflowClient.log_batch", "worker", 8),
        ("mlflow.tracking.client:MlflowClient.create_run", "worker", 2),
        ("mlflow.tracking.client:MlflowClient.log_artifacts", "worker", 3),
        ("mlflow.tracking.client:MlflowClient.set_terminated", "worker", 2),
        ("mlflow.tracking.client:MlflowClient.update_run", "command", 1),
    ],
    "inside a tell, a claim or a report": [
        ("optuna.study.study:Study.tell", "worker", 2),
        ("pipeline.search.storage:RetryingStorage.set_trial_state_values", "worker", 2),
        ("pipeline.search.storage:RetryingStorage.claim", "worker", 2),
        ("pipeline.search.storage:RetryingStorage.set_trial_user_attr", "worker", 20),
        ("pipeline.search.storage:RetryingStorage.set_trial_intermediate_value", "worker", 6),
    ],
    "inside a journal write": [
        ("pipeline.tracking.journal:Journal.append", "worker", 12),
        ("pipeline.tracking.journal:Journal.append_files", "worker", 3),
        ("pipeline.tracking.journal:Journal.remove", "worker", 2),
    ],
    "inside the supervisor's own acts": [
        ("pipeline.search.supervisor:release_trials", "command", 20),
        ("pipeline.search.supervisor:mark_failed", "command", 1),
        ("pipeline.search.requeue:requeue", "command", 1),
        ("pipeline.search.run_study:reconcile", "command", 1),
        ("pipeline.tracking.tracker:MlflowTracker.open_study", "command", 1),
        ("pipeline.tracking.store:RunStore.create_run", "command", 1),
        ("pipeline.tracking.recovery:adopt_journals", "command", 1),
    ],
}
RANDOM = ("a worker, at a random moment", "the supervisor, at a random moment")


def campaign(injector: FaultInjector, draw: random.Random, kills: int) -> Counter[str]:
    """Run a study to its end while processes of it are killed; how often each way was."""
    note = injector.folder / "kills"
    note.touch()
    done: Counter[str] = Counter()

    def killed() -> int:
        return done.total() + len(note.read_text().splitlines())

    for _ in range(20 + kills):
        command = injector.study()
        while command.code() is None:
            if killed() >= kills:
                injector.fork_server.disarm()
                assert command.code(300) is not None, injector.tail()
                break
            time.sleep(draw.uniform(0.1, 1.5))
            strike = draw.random()
            if strike < 0.55:
                function, who, most = draw.choice(draw.choice(list(AIMS.values())))
                at = draw.randint(1, most)
                injector.fork_server.arm(who, function, at, draw.choice(["before", "inside", "after"]), note)
                if who == "command" and draw.random() < 0.5:  # else it would wait for a death for long
                    done[RANDOM[1]] += command.code() is None
                    command.signal(signal.SIGKILL)
                continue
            if strike < 0.85:
                for pid in injector.fork_server.workers()[draw.randint(0, 1) :][:1]:
                    with contextlib.suppress(ProcessLookupError):  # it has ended since
                        os.kill(pid, signal.SIGKILL)
                        done[RANDOM[0]] += 1
            elif command.code() is None:
                command.signal(signal.SIGKILL)
                done[RANDOM[1]] += 1
        if command.code() == 0 and killed() >= kills:
            break
        if command.code() == 0:
            injector.trials += 2  # it goes on, as there are kills left
        if command.code() not in (0, -signal.SIGKILL):
            assert command.code() == 2 and "times in a row and no trial ended" in injector.tail(), injector.tail()
    injector.complete()
    ways = {function: way for way, aims in AIMS.items() for function, _, _ in aims}
    done.update(ways[json.loads(line)["function"]] for line in note.read_text().splitlines())
    return done


def kill_and_count(fork_server: ForkServer, folder: Path, seed: int, trials: int, kills: int) -> list[Row]:
    injector = FaultInjector(fork_server, folder, trials)
    done = campaign(injector, random.Random(seed), kills)
    whole = injector.count_losses("", done.total())
    assert not injector.differing_trials(whole), "a retried trial ends as an undisturbed one"
    # Of one study's faults it can't be told which did it: none may have done anything.
    rows = [Row(way, times, whole.lost, whole.doubled, whole.orphaned, whole.findings) for way, times in done.items()]
    return [*rows, Row("all of these", done.total(), compared=whole.compared)]


def test_few_kills_lose_nothing(fork_server: ForkServer, tmp_path: Path) -> None:
    rows = kill_and_count(fork_server, tmp_path / "a", seed=1, trials=3, kills=8)
    assert all(row.is_clean for row in rows), rows


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(7))
def test_kills_lose_nothing(seed: int, fork_server: ForkServer, tmp_path: Path, table: list[Row]) -> None:
    rows = kill_and_count(fork_server, tmp_path / "a", seed=100 + seed, trials=10, kills=30)
    for row in rows:
        row.fault = f"SIGKILL: {row.fault}"
        table.append(row)
    assert all(row.is_clean for row in rows), rows
