"""A run's data set is found by its digest, wherever it lies."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.datasets import load
from pipeline.data.prepare import TrainingData
from pipeline.errors import DataError
from pipeline.recipe import Recipe
from pipeline.sections.data import Data
from pipeline.tracking import queries
from pipeline.tracking.run_data import MAX_PLACES, RunData, find_data, newest_first
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker, RunRequest


def pets(root: Path, shade: int) -> str:
    for name in ("cat", "dog"):
        (root / "train" / name).mkdir(parents=True)
        for image in range(3):
            Image.new("RGB", (8, 8), (shade, 20 * image, 0)).save(root / "train" / name / f"{image}.png")
    return str(root)


@pytest.fixture
def seen(tmp_path: Path) -> RunData:
    """It lay in `first`, then in `second`; both are gone, and it is in `third`."""
    about = Data(dataset=pets(tmp_path / "third", 9), image_size=8, test_fraction=0)
    digest = load(about, tmp_path).digest
    return RunData(
        "run 1",
        about.model_copy(update={"dataset": "pets"}),
        digest,
        [str(tmp_path / "second"), str(tmp_path / "first")],
    )


def test_newest_place_with_the_same_images_is_used(seen: RunData, tmp_path: Path) -> None:
    pets(tmp_path / "second", 10)
    (tmp_path / "third").rename(tmp_path / "first")
    found = find_data(seen, tmp_path)
    assert (found.about.dataset, found.images.digest) == (str(tmp_path / "first"), seen.digest)
    newest = replace(seen, places=[pets(tmp_path / "fourth", 9), *seen.places])
    assert find_data(newest, tmp_path).about.dataset == str(tmp_path / "fourth")


def test_place_in_the_recipe_is_tried_too(seen: RunData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "third").rename(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    assert find_data(replace(seen, places=[]), tmp_path).about.dataset == str(tmp_path / "pets")


def test_failure_names_every_place_and_the_option(seen: RunData, tmp_path: Path) -> None:
    pets(tmp_path / "second", 10)
    with pytest.raises(DataError) as caught:
        find_data(seen, tmp_path)
    first, *lines = caught.value.lines
    here = Path("pets").absolute()
    assert first == (
        f"run 1: its data set, digest {seen.digest[:12]}, is not in {tmp_path}/second or {tmp_path}/first or {here}; "
        "name the folder or manifest where it lies now by `--dataset`"
    )
    assert lines[0].startswith(f"  {tmp_path}/second: holds other images, digest ")
    assert lines[1:] == [f"  {tmp_path}/first: no such folder", f"  {here}: no such folder"]


def test_option_is_the_only_place_and_must_match(seen: RunData, tmp_path: Path) -> None:
    assert find_data(seen, tmp_path, str(tmp_path / "third")).images.digest == seen.digest
    (tmp_path / "third").rename(tmp_path / "first")
    with pytest.raises(DataError, match=f"is not in {tmp_path}/other;(.|\n)*holds other images"):
        find_data(seen, tmp_path, pets(tmp_path / "other", 10))


def test_named_data_set_is_found_by_name_or_data_dir(tmp_path: Path) -> None:
    about, cifar10 = (Data(dataset=name, image_size=8) for name in ("digits", "cifar10"))
    digits = load(about, tmp_path)
    assert find_data(RunData("run 1", about, digits.digest, []), tmp_path).images.name == "digits"
    elsewhere = str(tmp_path / "b" / "cifar-10-batches-py")
    with pytest.raises(DataError, match=rf"is not in {tmp_path}/a or {tmp_path}/b; name its folder by `--data-dir`"):
        find_data(RunData("run 1", cifar10, "0" * 64, [elsewhere]), tmp_path / "a", download=False)


def test_cifar10_is_found_where_the_study_had_it(cifar10_dir: Path, tmp_path: Path) -> None:
    digest = load(Data(dataset="cifar10", image_size=8), cifar10_dir).digest
    seen = RunData("run 1", Data(dataset="cifar10", image_size=8), digest, [str(cifar10_dir / "cifar-10-batches-py")])
    assert find_data(seen, tmp_path, download=False).data_dir == cifar10_dir


def test_run_knows_its_studys_places_and_its_own(tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> None:
    tracker = MlflowTracker(tmp_path / "mlruns")
    parent = tracker.open_study("tiny-v1-pets-3fa9c1", "?", "val/accuracy", [], places=["/second"])
    with tracker.run(
        RunRequest(name="trial 0", recipe=small_recipe, data=replace(digits, source="/first"), parent_run=parent.id)
    ) as run:
        run.end(State.FINISHED)
    assert queries.data_places(tracker, tracker.id_of(run.key)) == ["/second", "/first"]
    assert queries.data_places(tracker, "0" * 32) == []
    parent.end(State.FINISHED)
    tracker.flush(30)
    tracker.set_data_places(str(parent.id), ["/third", "x" * 8_000])
    assert [study.places for study in queries.studies(tracker)] == [("/third",)], "as many as a tag holds"


def test_places_are_kept_newest_first_and_each_once() -> None:
    assert newest_first(["b", "a"], "a") == ["a", "b"]
    assert newest_first(["b", "a"], None) == ["b", "a"]
    assert len(newest_first(list("abcdefghijklm"), "n")) == MAX_PLACES
