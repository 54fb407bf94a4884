"""A study under faults: started, killed, run on to its end, and everything counted afterwards."""

import contextlib
import json
import sqlite3
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import optuna
import torch
from conftest import TINY_NETWORK as TINY
from fork_server import ForkServer, Process
from optuna.trial import FrozenTrial
from safetensors.torch import load_file

from pipeline.data.datasets import load
from pipeline.data.prepare import TrainingData, prepare
from pipeline.recipe import Recipe, parse_recipe
from pipeline.search.trial_attributes import TrialAttributes, counts_toward_budget
from pipeline.sections.data import Data
from pipeline.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 4


_TRIAL_RUNS = """SELECT r.run_uuid, r.status, k.value FROM runs r
  JOIN tags k ON k.run_uuid = r.run_uuid AND k.key = 'run_key'
  JOIN tags o ON o.run_uuid = r.run_uuid AND o.key = 'role' AND o.value = 'trial' WHERE lifecycle_stage = 'active'"""
_DOUBLE_POINTS = """SELECT run_uuid FROM metrics WHERE key NOT LIKE 'system/%'
  GROUP BY run_uuid, key, step HAVING count(*) > 1"""
_EPOCHS_OF_FINISHED = """SELECT m.run_uuid, count(DISTINCT m.step) FROM metrics m
  JOIN tags s ON s.run_uuid = m.run_uuid AND s.key = 'state' AND s.value = 'finished'
  WHERE m.key = 'val/accuracy' GROUP BY m.run_uuid"""


@dataclass
class Row:
    """A line of the kill matrix."""

    fault: str
    injected: int
    lost: int = 0
    doubled: int = 0
    orphaned: int = 0
    findings: int = 0
    compared: int = 0  # trials that were done again and finished, each trained once more

    @property
    def is_clean(self) -> bool:
        return (self.lost, self.doubled, self.orphaned, self.findings) == (0, 0, 0, 0)


def merged(rows: list[Row]) -> list[Row]:
    """A row for each fault."""
    found: dict[str, Row] = {}
    for row in rows:
        sums = found.setdefault(row.fault, Row(row.fault, 0))
        for name in ("injected", "lost", "doubled", "orphaned", "findings", "compared"):
            setattr(sums, name, getattr(sums, name) + getattr(row, name))
    return sorted(found.values(), key=lambda row: row.fault)


def write_table(rows: list[Row], folder: Path) -> str:
    """The kill matrix as text, also in `chaos.txt` and `chaos.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "| fault | injected | lost | doubled | orphaned | audit findings | compared |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(str(value) for value in asdict(row).values()) + " |" for row in rows]
    (folder / "chaos.txt").write_text("\n".join(lines) + "\n")
    (folder / "chaos.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return "\n".join(lines)


class FaultInjector:
    """A folder with a tiny study of digits, and what is done to it."""

    def __init__(
        self, fork_server: ForkServer, folder: Path, trials: int = 8, workers: int = 2, storage: str | None = None
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.fork_server, self.folder, self.trials, self.workers = fork_server, folder, trials, workers
        self.storage, self.home, self.log = storage, folder / "mlruns", folder / "log"
        self.tracking: str | None = None
        self.database = self.home / "mlflow.db"
        self.dataset, self.options, self.environment = "digits", ["--set", TINY], dict[str, str]()

    def limit(self, **seconds: float) -> None:
        """Other times than fork_server.LIMITS."""
        self.environment["CHAOS_LIMITS"] = json.dumps(seconds)

    def study(self) -> Process:
        """The command of the study."""
        words = ["study", "attention", "--dataset", self.dataset, "--epochs", str(EPOCHS), "--trials", str(self.trials)]
        words += ["--workers", str(self.workers), *self.options]
        words += ["--storage", self.storage] if self.storage else []
        words += ["--tracking-uri", self.tracking] if self.tracking else []
        return self.command(*words)

    def command(self, *words: str) -> Process:
        """Another command in this folder."""
        return self.fork_server.start(words, self.folder, self.log, **self.environment)

    def complete(self, tries: int = 5) -> None:
        """The same command until the study has ended."""
        for _ in range(tries):
            if self.study().code(300) == 0:
                return
        raise AssertionError(f"the study does not end:\n{self.tail()}")

    def tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    @property
    def stored(self) -> list[FrozenTrial]:
        """The trials in Optuna's database."""
        url = self.storage or f"sqlite:///{self.home / 'optuna.db'}"
        storage = optuna.storages.RDBStorage(url.replace("postgresql://", "postgresql+psycopg://"))
        try:
            [name] = optuna.get_all_study_names(storage)
            return optuna.load_study(study_name=name, storage=storage).trials
        finally:
            storage.remove_session()
            storage.engine.dispose()

    def audit(self) -> list[str]:
        """What the command finds: its lines but the last; and it mends nothing."""
        log = self.folder / "audit"
        log.unlink(missing_ok=True)
        words = ["audit", *(["--storage", self.storage] if self.storage else [])]
        words += ["--tracking-uri", self.tracking] if self.tracking else []
        code = self.fork_server.start(words, self.folder, log, **self.environment).code(120)
        said = [line for line in log.read_text().splitlines() if not line.startswith("not checked:")]
        assert said and (code == 0) == said[-1].endswith("nothing found"), log.read_text()
        return said[:-1] if code else []

    def count_losses(self, fault: str, injected: int) -> Row:
        """Count what was lost, doubled and orphaned, without the audit, and what the audit finds."""
        trials = self.stored
        counted = [trial for trial in trials if counts_toward_budget(trial)]
        replaced = Counter(TrialAttributes.of(trial).retry_of for trial in trials)
        again = [trial for trial in trials if TrialAttributes.of(trial).requeued]
        runs = self.rows(_TRIAL_RUNS)
        by_key = Counter(key for _, _, key in runs)
        keys = Counter(str(TrialAttributes.of(trial).run_key) for trial in counted)
        points = self.rows(_DOUBLE_POINTS)
        finished = self.rows(_EPOCHS_OF_FINISHED)
        row = Row(fault, injected)
        row.lost = max(0, self.trials - len(counted)) + sum(not by_key[key] for key in keys)
        row.lost += sum(not replaced[trial.number] for trial in again) + sum(EPOCHS - epochs for _, epochs in finished)
        row.doubled = (
            max(0, len(counted) - self.trials) + sum(by_key.values()) - len(by_key) + sum(keys.values()) - len(keys)
        )
        row.doubled += len(points) + sum(replaced[trial.number] > 1 for trial in again)
        row.orphaned = sum(trial.state.name == "RUNNING" for trial in trials) + sum(key not in keys for key in by_key)
        row.orphaned += sum(status == "RUNNING" for _, status, _ in runs)
        row.orphaned += sum(1 for place in ("journal", "checkpoints") for _ in (self.home / place).glob("*"))
        findings = self.audit()
        row.findings = len(findings)
        if not row.is_clean:
            print(row, *findings, self.tail(), sep="\n")  # noqa: T201
        return row

    def rows(self, query: str) -> list[tuple]:
        """What MLflow's database answers."""
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            return connection.execute(query).fetchall()

    def differing_trials(self, row: Row) -> list[str]:
        """Of the trials that were done again after a fault and finished: those whose score or weights differ, by a bit,
        from those of a training that nothing disturbed.
        """
        files = dict(self.rows("SELECT t.value, r.artifact_uri FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid "
            "AND t.key = 'run_key'"))  # fmt: skip
        retried = [
            trial for trial in self.stored if TrialAttributes.of(trial).retry_of is not None and trial.value is not None
        ]
        others = []
        for trial in [trial for trial in retried if trial.state.name == "COMPLETE"]:
            row.compared += 1
            where = files[TrialAttributes.of(trial).run_key].replace(
                "mlflow-artifacts:", str(self.database.parent / "artifacts")
            )
            folder = Path(where.removeprefix("file://"))
            recipe = parse_recipe(json.loads((folder / "recipe.json").read_text()))
            result = train(recipe, _data(recipe), torch.device("cpu"))
            there = load_file(folder / "weights.safetensors")
            same = all(torch.equal(tensor.contiguous().float() if tensor.is_floating_point() else tensor, there[name])
                for name, tensor in result.network.state_dict().items())  # fmt: skip
            if not same or result.history[-1].metrics["val/accuracy"] != trial.value:
                others.append(
                    f"trial {trial.number}: {trial.value}, undisturbed {result.history[-1].metrics['val/accuracy']}"
                )
        return others


def _data(recipe: Recipe) -> TrainingData:
    return prepare(load(Data(dataset="digits", image_size=8), Path("data")), recipe.data, torch.device("cpu"))
