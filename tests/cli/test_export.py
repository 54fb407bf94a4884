"""The command `export`."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import Trained, registered, run_forked, run_pipeline

from cli.helpers import assert_refused, write_digits
from pipeline.registry.package import Package
from pipeline.registry.registered_model import TOKEN_TAG
from pipeline.tracking.models import digests, find_model
from pipeline.tracking.tracker import MlflowTracker


def test_export_writes_a_model_and_its_8_bit_form(trained: Trained, tmp_path: Path) -> None:
    (digit,) = write_digits(tmp_path, 1)
    out = tmp_path / "exported"
    done = run_pipeline("export", trained.finished, "--output", str(out), "--int8", cwd=trained.home.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"model: trial 0 of tiny-v1-digits, run {trained.finished}\n")
    assert re.search(
        r"differ by \de-\d+ in probability at most \(allowed: 0.0001\) on the 144 images of the validation split, in "
        r"batches of 1, 2, 7, 128 and 500",
        done.stdout,
    )
    for row in ("accuracy, validation split", "macro-F1", "size, MB", "one image, 2 threads, ms"):
        assert re.search(rf"^ *{row} +\d+\.\d+%? +\d+\.\d+%? *$", done.stdout, re.MULTILINE), done.stdout
    files = {file.name for file in out.iterdir()}
    assert {"model.onnx", "model.int8.onnx", "weights.safetensors", "recipe.json", "card.md", "MLmodel"} <= files
    model = onnxruntime.InferenceSession(out / "model.int8.onnx")  # as the guide has it
    (probabilities,) = model.run(["probabilities"], {"images": np.zeros((2, 8, 8, 3), np.uint8)})
    assert probabilities.shape == (2, 10)
    assert json.loads(model.get_modelmeta().custom_metadata_map["classes"]) == list("0123456789")
    plain = run_forked("export", trained.finished, "--output", str(out), cwd=trained.home.parent)
    assert "model.int8.onnx of the export before is gone; " in plain.stdout, plain.stderr
    again = run_forked("predict", str(digit), "--model", str(out), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"model: {out}\n{digit}: ")


def test_export_int8_refuses_other_data_before_it_writes(trained: Trained, tmp_path: Path) -> None:
    with find_model(trained.home, None, trained.finished) as model:
        shutil.copytree(model.folder, tmp_path / "model")
    record = json.loads((tmp_path / "model" / "checkpoint.json").read_text())
    record["facts"]["data_digest"] = "other pixels"
    body = {key: record[key] for key in ("format", "facts", "sha256")}
    record["digest"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (tmp_path / "model" / "checkpoint.json").write_text(json.dumps(record))
    done = run_forked("export", "model", "--int8", "--output", "out", cwd=tmp_path)
    assert done.returncode == 3
    first, second, third = done.stderr.splitlines()
    assert first.startswith("error: `--int8`: needs the data set that the model was trained on")
    assert re.match(f"  the model of run {trained.finished}: its data set, digest other pixel", second)
    assert "holds other images" in third
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_export_of_a_promoted_run_is_the_registered_package(trained: Trained, packed: Package, tmp_path: Path) -> None:
    """Its card knows the evaluation, which the run's checkpoint doesn't."""
    with registered(trained, packed) as version:
        client = MlflowTracker(trained.home).client
        client.set_model_version_tag("image-classifier", version, TOKEN_TAG, "token")
        words = ["export", trained.finished, "--output", str(tmp_path / "out")]
        done = run_forked(*words, cwd=trained.home.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model: image-classifier version 1, trial 0 of tiny-v1-digits")
    assert "not evaluated on the test split" not in (tmp_path / "out" / "card.md").read_text()
    assert digests(tmp_path / "out")["evidence.json"] == packed.sha256["evidence.json"]
    assert digests(tmp_path / "out")["model.onnx"] == packed.sha256["model.onnx"]


def test_exported_folder_is_exported_where_there_is_no_store(packed: Package, tmp_path: Path) -> None:
    done = run_forked("export", str(packed.folder), "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no store is made"
    for name in ("card.md", "evidence.json"):
        assert digests(tmp_path / "out")[name] == packed.sha256[name]


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["export"], ["no finished run yet"]),
        (["export", "--output", "/dev/null/sub"], ["/dev/null/sub: no folder can be made there"]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
