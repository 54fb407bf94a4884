"""A packed model is whole, says what it is, and is checked before it is used."""

import pytest
from conftest import Trained

from pipeline.registry.package import Package, package
from pipeline.tracking.models import digests, find_model
from pipeline.tracking.runs import MlflowTracker


@pytest.fixture(scope="module")
def packed(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Package:
    evidence = {"passed": True, "findings": [{"rule": "better", "number": "p = 0.01"}]}
    with find_model(trained.home, None, trained.finished) as model:
        folder = tmp_path_factory.mktemp("packed") / "model"
        return package(MlflowTracker(trained.home), trained.finished, model.folder, folder, evidence)


def test_the_package_is_the_folder(packed: Package) -> None:
    assert packed.sha256 == digests(packed.folder)
    assert packed.bytes == (packed.folder / "model.onnx").stat().st_size
    assert packed.latency_ms > 0
    assert packed.card == (packed.folder / "card.md").read_text()
