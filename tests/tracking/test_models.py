"""Which model is meant, found in a real MLflow store, and its files, verified."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from conftest import Trained, registered

from pipeline.cli.options import StudyOptions, resolve
from pipeline.data.prepare import TrainingData
from pipeline.errors import DataError, UserError
from pipeline.recipe import Recipe
from pipeline.registry.package import Package
from pipeline.tracking import queries
from pipeline.tracking.models import digests, find_model, keep_model
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker, RunRequest
from pipeline.training.checkpoints import RECORD, amend, read_checkpoint


def refusal(home: Path, wanted: str | None) -> str:
    with pytest.raises(UserError) as caught, find_model(home, None, wanted):
        pass
    return caught.value.lines[0]


def test_run_is_found_by_id_and_its_files_go_with_the_block(trained: Trained) -> None:
    with find_model(trained.home, None, trained.finished) as model:
        assert model.label == f"trial 0 of tiny-v1-digits, run {trained.finished}"
        assert read_checkpoint(model.folder)["run_id"] == trained.finished
    assert not model.folder.exists()


def test_model_is_kept_in_a_folder_of_its_run(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is a checkpoint, made once; so a teacher stays when its run or alias goes."""
    trained.copy(home := tmp_path / "mlruns")
    folder = keep_model(home, None, trained.finished)
    sha256 = digests(folder)["weights.safetensors"]
    assert folder == home / "teachers" / f"{trained.finished}-{sha256[:8]}"
    assert read_checkpoint(folder)["run_id"] == trained.finished
    before = (folder / RECORD).stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    search = resolve("baseline", StudyOptions(), "digits", [f"loss.teacher={trained.finished}"])
    assert search.base.loss.teacher_folder == (str(folder), sha256)
    assert (folder / RECORD).stat().st_mtime_ns == before


def test_run_without_a_model_is_refused_with_its_state(trained: Trained) -> None:
    assert refusal(trained.home, trained.pruned) == (
        f"trial 1 of tiny-v1-digits, run {trained.pruned}: pruned, without a model; only a finished run has one"
    )
    parent = queries.studies(MlflowTracker(trained.home))[0].parent
    assert "a study, not one of its trials" in refusal(trained.home, parent)
    assert refusal(trained.home, "0" * 32).startswith(f"{'0' * 32}: no such run")
    assert refusal(trained.home, "best").startswith("model best: neither a folder, nor a run's id")
    assert refusal(trained.home, "best").endswith("registered: none yet; `ui` shows all runs")
    assert "no champion; `promote" in refusal(trained.home, "models:/image-classifier@champion")
    for name in ("models:/image-classifier@other", "models:/x/3", "models:/x", "models:/a/b@c", "models:/"):
        assert refusal(trained.home, name).startswith(f"model {name}: no such registered model")


def test_unknown_recipe_is_refused_before_weights_are_read(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.copy(home := tmp_path / "mlruns")
    client = MlflowTracker(home).client
    folder = Path(client.get_run(trained.finished).info.artifact_uri.removeprefix("file://"))
    recipe = read_checkpoint(folder)["recipe"]
    amend(folder, {"recipe": recipe | {"model": {"network": "vit"}}})
    downloaded, download = [], type(client).download_artifacts
    monkeypatch.setattr(
        type(client), "download_artifacts", lambda *words: downloaded.append(words[2]) or download(*words)
    )
    with pytest.raises(UserError) as caught, find_model(home, None, trained.finished):
        pass
    assert caught.value.lines[0].endswith(
        "its recipe can't be read by this code; use the commit that it was trained with"
    )
    assert "model.network = vit: not one of attention," in caught.value.lines[1]
    assert downloaded == [RECORD]


def test_missing_store_is_refused_and_not_created(tmp_path: Path) -> None:
    assert refusal(tmp_path / "mlruns", None).startswith("no finished run yet; `study")
    assert not (tmp_path / "mlruns").exists()


def test_store_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    tracker = MlflowTracker(tmp_path)
    tracker.open_study("s", "?", "val/accuracy", []).end(State.FINISHED)
    assert tracker.flush(30)
    assert refusal(tmp_path, None).startswith("no finished run yet")


def scored(
    tracker: MlflowTracker, study: str, recipe: Recipe, data: TrainingData, score: float, parent: str | None = None
) -> str:
    """A finished run with this score, in a study of its own."""
    parent_run = tracker.open_study(study, "?", "val/accuracy", [])
    with tracker.run(
        RunRequest(
            name="trial 0",
            recipe=recipe,
            data=data,
            parent_run=parent_run.id,
            tags=RunTags.parse({"role": "trial", "study": study, "trial": "0"}),
        )
    ) as run:
        run.log_metrics({"val/accuracy": score}, 1)
        run.end(State.FINISHED)
    parent_run.end(State.FINISHED)
    return tracker.id_of(run.key)


def test_default_is_the_best_run_on_the_last_studys_data(
    tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    tracker = MlflowTracker(tmp_path)
    elsewhere = dataclasses.replace(digits, digest="other pixels")
    scored(tracker, "a-v1-other", small_recipe, elsewhere, 0.99)
    best = scored(tracker, "b-v1-digits", small_recipe, digits, 0.8)
    scored(tracker, "c-v1-digits", small_recipe, digits, 0.7)
    # These runs have no weights, so the line that says so names the one that was chosen.
    assert refusal(tmp_path, None).startswith(
        f"the best finished run (no champion), trial 0 of b-v1-digits, run {best}, val/accuracy 0.8000: finished,"
    )
    scored(tracker, "d-v1-digits", small_recipe, dataclasses.replace(digits, split_digest="another split"), 0.95)
    assert "val/accuracy 0.9500" in refusal(tmp_path, None)
    scored(tracker, "c-v1-digits", small_recipe, digits, 0.6)
    assert "val/accuracy 0.8000" in refusal(tmp_path, None)
    last = scored(tracker, "a-v1-other", small_recipe, elsewhere, 0.5)
    assert "val/accuracy 0.9900" in refusal(tmp_path, None), last


def test_champions_of_other_names_and_missing_versions_are_told(trained: Trained, tmp_path: Path) -> None:
    trained.copy(home := tmp_path / "mlruns")
    client = MlflowTracker(home).client
    client.create_registered_model("digits")
    client.create_model_version("digits", "runs:/x", trained.finished)
    client.set_registered_model_alias("digits", "champion", "1")
    with find_model(home, None, None) as model:
        why = "no champion of image-classifier; registered: models:/digits@champion"
        assert model.label.startswith(f"the best finished run ({why}), trial 0 of tiny-v1-digits")
    for name in ("models:/digits/7", "models:/digits@other"):
        assert refusal(home, name).startswith(
            f"model {name}: digits has no such version or alias; its versions: 1; regi"
        )
    assert refusal(home, "models:/other/7").startswith("model models:/other/7: no such registered model; registered: ")
    assert refusal(home, "models:/image-classifier@champion").endswith(
        "no champion; `promote NAME` chooses one; registered: models:/digits@champion; `ui` shows all runs"
    )


def test_champion_comes_before_the_best_run(trained: Trained, packed: Package) -> None:
    with find_model(trained.home, None, None) as model:
        assert model.label.startswith("the best finished run (no champion), trial 0 of tiny-v1-digits")
    with registered(trained, packed) as version:
        name = f"image-classifier version {version}, trial 0 of tiny-v1-digits, run {trained.finished}"
        for wanted, what in {
            None: f"the champion, {name}",
            "models:/image-classifier@champion": name,
            f"models:/image-classifier/{version}": name,
        }.items():
            with find_model(trained.home, None, wanted) as model:
                assert model.label == what
                assert read_checkpoint(model.folder)["run_id"] == trained.finished
                assert set(packed.sha256) <= set(digests(model.folder)), "its own files, not the run's"
                assert model.folder != packed.folder
        refused = refusal(trained.home, f"models:/image-classifier/{int(version) + 1}")
        assert "image-classifier has no such version or alias; its versions: " in refused
        assert refused.endswith("; registered: models:/image-classifier@champion; `ui` shows all runs")


def damaged(packed: Package, folder: Path, name: str) -> Package:
    """A copy with one bit of one file changed, the file gone (`-name`), or one more (`+name`)."""
    shutil.copytree(packed.folder, folder)
    if name.startswith("-"):
        (folder / name[1:]).unlink()
    elif name.startswith("+"):
        (folder / name[1:]).touch()
    else:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    return dataclasses.replace(packed, folder=folder)


@pytest.mark.parametrize(
    "name", ["model.onnx", "MLmodel", "weights.safetensors", "card.md", "-checkpoint.json", "+more.py"]
)
def test_version_with_changed_files_is_refused(name: str, trained: Trained, packed: Package, tmp_path: Path) -> None:
    with registered(trained, damaged(packed, tmp_path / "model", name)):
        for wanted in (None, "models:/image-classifier@champion"):
            with pytest.raises(DataError) as caught, find_model(trained.home, None, wanted):
                pass
            first, *others = caught.value.lines
            assert "its files are not those that were registered" in first
            fault = {"-": "missing", "+": "not registered"}.get(name[0], "its SHA-256 differs")
            assert others == [f"  {name.strip('+-')}: {fault}"]


def test_version_without_digests_is_refused(trained: Trained, packed: Package) -> None:
    with registered(trained, dataclasses.replace(packed, sha256={})):
        for wanted in (None, "models:/image-classifier@champion"):
            with pytest.raises(DataError, match=r"has no tags sha256\.<file> to verify its files by"):
                find_model(trained.home, None, wanted).__enter__()


def test_version_outlives_its_run_but_not_its_files(trained: Trained, packed: Package, tmp_path: Path) -> None:
    elsewhere = dataclasses.replace(packed, folder=tmp_path / "nowhere")
    with registered(trained, elsewhere):
        assert "its files can't be read" in refusal(trained.home, None)
    nobody = dataclasses.replace(trained, finished="0" * 32)
    with registered(nobody, packed), find_model(trained.home, None, None) as model:
        assert model.label == "the champion, image-classifier version 1, of a run that was removed"


def test_run_whose_files_are_missing_is_refused(tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> None:
    run = scored(MlflowTracker(tmp_path), "a-v1-digits", small_recipe, digits, 0.5)
    assert "finished, but its model is not at " in refusal(tmp_path, run)
