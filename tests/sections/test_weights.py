"""Weights to start from."""

import hashlib
import os
from pathlib import Path

from recipe_cases import RECIPE, lines_of

from pipeline.recipe import Recipe, parse_recipe


def test_teacher_is_kept_with_the_digest_of_its_weights(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    recipe = RECIPE.changed({"loss.teacher": str(tmp_path)})
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert recipe.loss.teacher == f"{tmp_path}#sha256={sha256}"
    assert recipe.loss.teacher_folder == (str(tmp_path), sha256)
    assert recipe.changed({"loss.name": "focal"}).loss.teacher == recipe.loss.teacher
    (tmp_path / "weights.safetensors").write_bytes(b"WEIGHTS")  # of the same size
    os.utime(tmp_path / "weights.safetensors", ns=(0, 0))
    assert recipe.changed({"loss.teacher": str(tmp_path)}).digest() != recipe.digest()
    (tmp_path / "weights.safetensors").unlink()
    assert parse_recipe(recipe.to_json()) == recipe
    assert lines_of({"loss.teacher": "0123"}) == [
        "loss.teacher = 0123: should be none, a model's folder (there is no such one with weights.safetensors), or on the "
        "command line a run's id or models:/NAME@ALIAS"
    ]


def test_recipe_is_the_same_wherever_its_files_lie() -> None:
    def at(place: str, sha256: str = "0" * 64) -> Recipe:
        pinned = f"{place}/weights#sha256={sha256}"
        return RECIPE.changed({"transfer.weights": pinned, "loss.teacher": pinned})

    assert at("/here").digest() == at("/there").digest() != at("/here", "1" * 64).digest()


def test_weights_file_is_kept_with_its_digest(tmp_path: Path) -> None:
    """So the recipe of equal bytes is equal, and a stored one needs no file."""
    file = tmp_path / "own.pth"
    file.write_bytes(b"weights")
    pinned = f"{file}#sha256={hashlib.sha256(b'weights').hexdigest()}"
    recipe = RECIPE.changed({"model.network": "timm", "model.weights": str(file)})
    assert recipe.flat()["model.weights"] == pinned
    file.unlink()
    assert parse_recipe(recipe.to_json()) == recipe
    assert lines_of({"model.network": "timm", "model.weights": "defalt"}) == [
        "model.weights = defalt: should be none, default, efficientnet-lite0 or a file (did you mean default?); "
        "there is no such file"
    ]
    assert "should match pattern" in lines_of({"model.network": "timm", "model.backbone": "hf-hub:a/b"})[0]
