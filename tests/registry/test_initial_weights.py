"""The file that a training starts from is the recipe's, or nothing starts; test_compress.py has the way there and back."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import Trained

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.models.build import build_network
from pipeline.recipe import Recipe
from pipeline.registry import initial_weights
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.loop import train

CPU = torch.device("cpu")


def test_initial_weights_that_are_others_are_refused(
    small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    network = build_network(small_recipe.model, 10, 8, seed=0)
    recipe = small_recipe.changed({"transfer.weights": initial_weights.keep(network, tmp_path)})
    narrow = recipe.changed({"model.widths": (4, 7)})
    with pytest.raises(UserError, match=r"shape \(8,.* in the file and shape \(7,.* in the network"):
        train(narrow, digits, CPU)
    path = Path((recipe.transfer.weights_file or ("",))[0])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="the weights that the recipe starts from: damaged"):
        train(recipe, digits, CPU)


def test_only_a_file_of_this_project_is_put_back(small_recipe: Recipe, trained: Trained, tmp_path: Path) -> None:
    """A recipe may be a stranger's, and name any path of this machine."""
    trained.copy(tmp_path / "mlruns")
    tracker, run = MlflowTracker(tmp_path / "mlruns"), trained.finished
    network = build_network(small_recipe.model, 10, 8, seed=0)
    recipe = small_recipe.changed({"transfer.weights": initial_weights.keep(network, tmp_path / "here")})
    kept = Path((recipe.transfer.weights_file or ("",))[0])
    initial_weights.attach(tracker, run, recipe)
    content = kept.read_bytes()
    elsewhere = tmp_path / "profile"
    for path in (kept, elsewhere):
        named = recipe.changed({"transfer.weights": f"{path}#sha256={kept.stem}"})
        kept.unlink(missing_ok=True)
        initial_weights.restore(tracker, run, named)
    assert not elsewhere.exists() and not kept.exists()
    initial_weights.restore(tracker, run, recipe)
    assert kept.read_bytes() == content and list(kept.parent.iterdir()) == [kept]
    other = recipe.changed({"transfer.weights": recipe.transfer.weights.replace(kept.stem, "0" * 64)})
    initial_weights.restore(tracker, run, other)
    assert list(kept.parent.iterdir()) == [kept], "the run holds another one"
    shutil.rmtree(tmp_path / "here")
    (tmp_path / "here").touch()
    with pytest.raises(UserError, match=f"can't be put there: .*weights.safetensors of run {run}"):
        initial_weights.restore(tracker, run, recipe)
