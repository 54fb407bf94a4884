"""What the tests of promotions share: a store with candidates, and an observer that records."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Trained

from pipeline.inference.classifier import Classifier
from pipeline.registry import export
from pipeline.registry.gate import GateRecord, Rules, Verdict
from pipeline.registry.ledger import Ledger
from pipeline.registry.registered_model import Registry
from pipeline.tracking.tracker import MlflowTracker

DATA = Path("data")
RULES = Rules(class_margin=100, ece_margin=100, latency_factor=1000)  # a clock decides nothing in a test


@dataclass
class RecordingObserver:
    """Keeps the lines and verdicts."""

    lines: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def note(self, line: str) -> None:
        self.lines.append(line)

    def decided(self, verdict: Verdict, challenger: str, opponent: str) -> None:
        self.verdicts.append(verdict)


@dataclass(frozen=True)
class Store:
    """One study: the control worst, then a good run, the best, and one like it, which has a package."""

    home: Path
    control: str
    good: str
    best: str
    rival: str
    packed: Path

    def registry(self, home: Path, model: str) -> Registry:
        """With a ledger of its own, so that tests share MLflow's store and nothing else."""
        return Registry(MlflowTracker(self.home), Ledger(home), model)


def copy_of(candidates: Store, name: str, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store with the same runs in a folder of its own."""
    home = tmp_path_factory.mktemp(name) / "mlruns"
    Trained(candidates.home, candidates.best, "").copy(home)
    return replace(candidates, home=home)


def export_once(exports: dict[str, bytes]) -> None:
    """Let each run's model be exported once in this process; `exports` is run -> its ONNX file, and grows."""
    export_onnx = export.export_onnx

    def cached(classifier: Classifier, path: Path) -> None:
        run = classifier.metadata.run_id
        if run not in exports:
            export_onnx(classifier, path)
            exports[run] = path.read_bytes()
        path.write_bytes(exports[run])

    export.export_onnx = cached


def record(**fields: Any) -> dict[str, Any]:
    """The details of a verdict that no evaluation made."""
    made = GateRecord(
        opponent="champion",
        opponent_run=None,
        verdict=Verdict(results=()),
        rules=RULES,
        recipe_digest="",
        images=0,
        correct={},
        onnx_sha256="",
        predictions_sha256={},
    )
    return made.model_copy(update=fields).model_dump(mode="json")


def kinds(registry: Registry) -> list[str]:
    return [event.kind for event in registry.ledger.events(registry.model)]
