"""A package is an MLflow model that runs no code of its own, written completely or not at all."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import Trained

from pipeline.data.prepare import TrainingData
from pipeline.errors import PromotionRefused, UserError
from pipeline.inference.classifier import Classifier
from pipeline.recipe import parse_recipe
from pipeline.registry.export import TOLERANCE, as_pixels
from pipeline.registry.package import Package, package, package_place
from pipeline.tracking.models import digests, find_model
from pipeline.tracking.tracker import MlflowTracker

FILES = {
    *("MLmodel", "model.onnx", "requirements.txt", "conda.yaml", "python_env.yaml"),
    *("weights.safetensors", "weights_plain.safetensors", "checkpoint.json", "recipe.json", "card.md", "evidence.json"),
}


def test_package_is_the_folder_without_code(packed: Package) -> None:
    assert set(packed.sha256) == FILES
    assert packed.sha256 == digests(packed.folder)
    assert packed.bytes == (packed.folder / "model.onnx").stat().st_size
    assert packed.latency_ms > 0
    required = (packed.folder / "requirements.txt").read_text().splitlines()
    assert [line.split("==")[0] for line in required] == ["mlflow", "onnx", "onnxruntime", "numpy"]
    metadata = json.loads((packed.folder / "checkpoint.json").read_text())["facts"]
    assert parse_recipe((packed.folder / "recipe.json").read_text()).digest() == metadata["recipe_digest"]


def test_mlflow_loads_it_with_onnxruntime_and_it_predicts(packed: Package, digits: TrainingData) -> None:
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(str(packed.folder))
    assert set(model.metadata.flavors) == {"onnx", "python_function"}
    assert model.metadata.flavors["python_function"]["loader_module"] == "mlflow.onnx"
    assert not any(flavor.get("code") for flavor in model.metadata.flavors.values())
    images = digits.validation.images[:9]
    probabilities = model.predict(as_pixels(images))["probabilities"]
    torchs = Classifier.load(packed.folder, torch.device("cpu"))
    np.testing.assert_allclose(probabilities, torchs.probabilities(images), atol=TOLERANCE)
    for wrong in (as_pixels(images).astype(np.float32), as_pixels(images)[:, :5]):
        with pytest.raises(Exception, match="schema"):
            model.predict(wrong)


def test_only_an_earlier_package_is_replaced(
    packed: Package, trained: Trained, digits: TrainingData, tmp_path: Path
) -> None:
    tracker = MlflowTracker(trained.home)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    with find_model(trained.home, None, trained.finished) as model:
        with pytest.raises(UserError, match=r"mine: holds thesis\.txt, which is of no exported model"):
            package(tracker, trained.finished, model.folder, mine)
        assert [file.name for file in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
        with pytest.raises(UserError, match=f"run {'0' * 32}: the numbers of its card can't be read"):
            package(tracker, "0" * 32, model.folder, tmp_path / "new")
        assert [file.name for file in tmp_path.iterdir()] == ["mine"], "complete or not at all"

        (mine / "thesis.txt").rename(mine / "checkpoint.json")
        (mine / "model.int8.onnx").touch()
        exported = tmp_path / "exported.onnx"
        changed = onnx.load(packed.folder / "model.onnx")
        changed.doc_string = "as it was evaluated"
        exported.write_bytes(changed.SerializeToString())
        images = digits.validation.images
        made = package(tracker, trained.finished, model.folder, mine, onnx_file=exported, images=images)
        assert (mine / "model.onnx").read_bytes() == exported.read_bytes(), "byte for byte"
        assert made.difference is not None and made.difference <= TOLERANCE
        largest = max(changed.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        largest.raw_data = bytes(len(largest.raw_data))
        exported.write_bytes(changed.SerializeToString())
        with pytest.raises(PromotionRefused, match="differs from torch"):
            package(tracker, trained.finished, model.folder, mine, onnx_file=exported, images=images)
        assert made.sha256 == digests(mine), "the earlier one stays"
        exported.unlink()
    assert set(made.sha256) == FILES - {"evidence.json"} == {file.name for file in mine.iterdir()}
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    assert made.sha256["weights.safetensors"] == packed.sha256["weights.safetensors"]
    assert "not evaluated on the test split" in made.card


@pytest.mark.parametrize("own", ["thesis.txt", "notes/"])
def test_folder_with_anything_of_a_person_is_not_replaced(own: str, packed: Package, tmp_path: Path) -> None:
    shutil.copytree(packed.folder, tmp_path / "mine")
    assert package_place(tmp_path / "mine") == tmp_path / "mine"
    (tmp_path / "mine" / own).mkdir() if own.endswith("/") else (tmp_path / "mine" / own).touch()
    with pytest.raises(UserError, match=rf"mine: holds {own.rstrip('/')}, which is of no exported model"):
        package_place(tmp_path / "mine")


def test_link_to_a_folder_stays_a_link(packed: Package, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    onnx_file = packed.folder / "model.onnx"
    package(MlflowTracker(trained.home), trained.finished, packed.folder, tmp_path / "link", onnx_file=onnx_file)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "model.onnx").exists()


def test_place_where_no_folder_can_be_made_is_named(packed: Package, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to("file/sub")
    for name in ("file", "file/sub", "gone"):
        with pytest.raises(UserError, match=f"{name}: no folder can be made there; name one in a folder of yours"):
            package_place(tmp_path / name)
    with pytest.raises(UserError, match=r"^/proc/x/y: (can't be written|no folder can be made there)"):
        package(MlflowTracker(trained.home), trained.finished, packed.folder, Path("/proc/x/y"))
