"""A study's definition, and how it is found."""

from pathlib import Path
from typing import Any

import pytest
from optuna.samplers import TPESampler
from PIL import Image

from pipeline.data.folder import read_folder
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.search import study as study_module
from pipeline.search.study import Study, available, load_study


def space(trial: Any) -> None:
    pass


def test_fields_of_a_study_are_checked_at_once(small_recipe: Recipe) -> None:
    with pytest.raises(UserError) as caught:
        Study(
            question="?",
            base={},  # type: ignore[arg-type]
            space=3,  # type: ignore[arg-type]
            objective="val/acc",  # type: ignore[arg-type]
            trials=0,
            patience=0,
            sampler=TPESampler,  # type: ignore[arg-type]
            pruner="median",  # type: ignore[arg-type]
            constraints={"model/params": 5, "model/latency_ms": 0},
        )
    names = [
        *("base", "space", "objective", "trials", "patience", "sampler", "pruner"),
        "constraints: model/latency_ms",
    ]
    assert [line.split(" = ")[0] for line in caught.value.lines if " = " in line] == names
    assert "constraints: model/params: can't be bounded (did you mean model/parameters?)" in "\n".join(
        caught.value.lines
    )


@pytest.mark.parametrize("name", ["", "A", "../x", "a b", "a'b", "-a", "é", "a/b", "a.py", "$(x)", "a\nb", "_x"])
def test_name_outside_the_alphabet_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="must be lower-case letters") as caught:
        load_study(name)
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize("name", ["attention-v2", "a-v1-b"])
def test_name_that_would_make_keys_ambiguous_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"is a whole key, .*; `study a\w* --version \d` resumes it, with"):
        load_study(name)


def test_unknown_study_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError) as caught:
        load_study("atention")
    assert caught.value.lines[0] == "no study atention (did you mean attention?)"
    assert caught.value.lines[1].startswith("  studies: ")
    assert "attention" in available()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("STUDY = ", "line 1: SyntaxError"),
        ("x = 1\ny = x / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("STUDY = 3\n", "STUDY is a int: must be a pipeline.search.study.Study"),
        ("pass\n", "broken.py: defines no STUDY; end it with `STUDY = Study(...)`"),
        ("import nothing_of_that_name\n", "line 1: ModuleNotFoundError"),
        (
            "from pipeline.recipe import parse_recipe\nBASE = parse_recipe({'optimizer': {'name': 'sgd', 'lr': -1}})\n",
            "optimizer.lr = -1: should be greater than 0",
        ),
    ],
)
def test_broken_study_is_refused_with_file_and_line(
    text: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.setattr(study_module, "FOLDER", tmp_path)
    with pytest.raises(UserError) as caught:
        load_study("broken")
    assert any("broken.py" in got and line in got for got in caught.value.lines), caught.value.lines


@pytest.mark.parametrize(
    ("size", "network", "chosen"),
    [
        ((100, 99), "plain", (64, "squash")),
        ((40, 30), "plain", (32, "crop")),
        ((100, 75), "plain", (64, "crop")),
        ((100, 300), "timm", (96, "pad")),
    ],
)
def test_base_suits_a_folder_by_a_look_at_its_images(
    size: tuple[int, int], network: str, chosen: tuple[int, str], small_recipe: Recipe, tmp_path: Path
) -> None:
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "train" / f"{name}.png")
    base = small_recipe.changed({"model.network": network, "data.image_size": 96 if network == "timm" else 32})
    study = Study(question="?", base=base, space=space, objective="val/accuracy", trials=8)
    suited, line = study.suited_to(listing := read_folder(tmp_path), {})
    assert (suited.base.data.image_size, suited.base.data.geometry) == chosen
    assert f"{size[0]} x {size[1]}" in line and f"data.geometry={chosen[1]}" in line
    suited, line = study.suited_to(listing, {"data.image_size": 48})
    assert suited.base.data.image_size == base.data.image_size and "data.image_size" not in line and chosen[1] in line
    assert study.suited_to(listing, {"data.image_size": 48, "data.geometry": "pad"}) == (study, "")
