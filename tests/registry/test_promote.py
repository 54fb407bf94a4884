"""Champions in a real MLflow store: judged, registered, moved, taken back, cut off and repaired."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.registry.gate import Rules, Verdict
from pipeline.registry.ledger import Ledger
from pipeline.registry.promote import Registry, promote
from pipeline.tracking.runs import MlflowTracker, State


@dataclass
class View:
    lines: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def said(self, line: str) -> None:
        self.lines.append(line)

    def judged(self, verdict: Verdict, challenger: str, other: str) -> None:
        self.verdicts.append(verdict)


@dataclass(frozen=True)
class Store:
    """Three runs of one study, each better than the one before."""

    home: Path
    control: str
    good: str
    best: str

    def registry(self, home: Path, model: str) -> Registry:
        """A ledger of its own, so that tests share the store and nothing else."""
        return Registry(MlflowTracker(self.home), Ledger(home), model)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, small_recipe: Recipe, digits: TrainingData) -> Store:
    home = tmp_path_factory.mktemp("store") / "mlruns"
    tracker = MlflowTracker(home)
    parent = tracker.open_study("tiny-v1-digits", "?", "val/accuracy", [])
    runs = []
    base = small_recipe.changed({"augmentation.mixup": 0, "augmentation.cutmix": 0, "optimizer.lr": 0.02})
    for number, epochs in enumerate([1, 3, 20]):
        tags = {"role": "trial", "study": "tiny-v1-digits", "trial": str(number)}
        name = f"trial {number}" + " (control)" * (not number)
        recipe = base.changed({"training.epochs": epochs})
        device = torch.device("cpu")
        runs.append(experiment.run(recipe, digits, device, tracker, name, parent.id, tags))
    parent.end(State.FINISHED)
    print([run.metrics["val/accuracy"] for run in runs], [run.seconds for run in runs])
    return Store(home, *(run.run_id for run in runs))


LOOSE = Rules(class_margin=100, ece_margin=100, latency_factor=1000)


def test_it(store, tmp_path):
    import time

    r = store.registry(tmp_path, "m")
    for run in (store.good, store.control, store.best):
        v = View()
        t = time.time()
        try:
            print(promote(r, run, LOOSE, Path("data"), v), v.lines)
        except UserError as e:
            print(e)
        print(*[str(f) for x in v.verdicts for f in x.findings], sep="\n")
        print(time.time() - t)
    print(*r.ledger.events(), sep="\n")
    assert 0
