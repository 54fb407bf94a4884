"""Weights to start from."""

import hashlib
from pathlib import Path

from recipe_cases import RECIPE, lines_of

from pipeline.recipe import parse_recipe


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
