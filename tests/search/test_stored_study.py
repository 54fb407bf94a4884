"""Which stored study a command resumes: a real database."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from pipeline.data.datasets import listed
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.search.search import Search
from pipeline.search.storage import RetryingStorage, open_storage
from pipeline.search.stored_study import find_study, open_study, resolved
from pipeline.search.study import Study
from pipeline.search.study_attributes import StudyAttributes
from pipeline.sections.data import Data


def space(trial: Any) -> None:
    trial.suggest_float("optimizer.lr", 0.01, 1, log=True)


class StoredStudies:
    """A database, and studies `lab` of different folders in it."""

    def __init__(self, home: Path, recipe: Recipe, digits: TrainingData):
        self.home, self.recipe, self.digits = home, recipe, digits
        self.storage: RetryingStorage = open_storage(home)

    def search(self, folder: str, version: int = 1) -> Search:
        base = self.recipe.changed({"data.dataset": folder})
        study = Study(question="?", base=base, space=space, objective="val/accuracy", trials=1)
        return Search("lab", study, {}, version=version, trials=1, timeout_s=None)

    def data(self, folder: str, digest: str) -> TrainingData:
        return replace(
            self.digits, name=f"{Path(folder).name}-{digest[:6]}", digest=digest, source=str(self.home / folder)
        )

    def key(self, folder: str, digest: str, version: int = 1) -> str:
        return resolved(self.search(folder, version), self.data(folder, digest), self.storage).stored_key or ""

    def open(self, folder: str, digest: str, version: int = 1) -> Any:
        return open_study(self.search(folder, version), self.data(folder, digest), self.storage, self.home)


@pytest.fixture
def studies(tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> StoredStudies:
    return StoredStudies(tmp_path, small_recipe, digits)


ONE, TWO = "1" * 64, "2" * 64


def test_first_start_of_a_study_fixes_its_test_split(studies: StoredStudies) -> None:
    for name in ("cat", "dog"):
        (studies.home / "pets" / name).mkdir(parents=True)
        for number in range(10):
            (studies.home / "pets" / name / f"{number}.png").touch()
    found = listed(Data(dataset=str(studies.home / "pets")), studies.home)
    data = replace(studies.data("pets", ONE), listed=found)
    assert found.seal and not (studies.home / "splits").exists()
    open_study(studies.search("pets"), data, studies.storage, studies.home)
    (file,) = (studies.home / "splits").glob("pets-*.json")
    assert all(path in file.read_text() for path in found.seal.paths)


def test_folders_of_one_name_have_separate_studies(studies: StoredStudies) -> None:
    studies.open("a/data", ONE)
    assert studies.open("b/data", TWO).study_name == "lab-v1-data-222222"
    assert studies.open("a/data", ONE).study_name == "lab-v1-data-111111"


def test_folder_named_as_a_data_set_has_a_separate_study(studies: StoredStudies) -> None:
    open_study(studies.search("digits"), studies.digits, studies.storage, studies.home)
    assert studies.open("digits", ONE).study_name == "lab-v1-digits-111111"
    assert resolved(studies.search("digits"), studies.digits, studies.storage).stored_key == "lab-v1-digits"


def test_moved_folder_keeps_key_and_recipe(studies: StoredStudies) -> None:
    studies.open("a/data", ONE)
    study = studies.open("c/pets", ONE)
    assert study.study_name == "lab-v1-data-111111"
    assert StudyAttributes.of(study).places == [str(studies.home / "c/pets"), str(studies.home / "a/data")]
    search = resolved(studies.search("c/pets"), studies.data("c/pets", ONE), studies.storage)
    assert (search.base.data.dataset, search.dataset_path) == ("a/data", "c/pets"), (
        "the same recipe, read from another place"
    )
    assert find_study(studies.search("c/pets"), studies.data("c/pets", ONE), studies.storage)


def test_other_images_in_the_same_folder_are_refused(studies: StoredStudies) -> None:
    studies.open("a/data", ONE)
    with pytest.raises(UserError, match=r"lab-v1-data-111111: has trials that answer another question; `--version 2`"):
        studies.open("a/data", TWO)
    with pytest.raises(UserError, match="`--version 2`"):
        find_study(studies.search("a/data"), studies.data("a/data", TWO), studies.storage)
    assert studies.open("a/data", TWO, version=2).study_name == "lab-v2-data-222222"
    assert studies.key("a/data", ONE) == "lab-v1-data-111111", "the former images are back"


def test_other_images_in_another_folder_are_a_new_study(
    studies: StoredStudies, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    studies.open("a/data", ONE)
    assert studies.key("b/data", TWO) == "lab-v1-data-222222"
    assert "a new study lab-v1-data-222222; others of that name have other images: lab-v1-data-111111" in caplog.text


def test_study_without_places_is_found_by_the_folders_name(studies: StoredStudies) -> None:
    search, data = studies.search("a/data"), studies.data("a/data", ONE)
    open_study(search, replace(data, name="data"), studies.storage, studies.home)
    with studies.storage.engine.begin() as connection:
        connection.execute(text("delete from study_user_attributes where key in ('places', 'dataset')"))
    assert studies.key("b/data", TWO) == "lab-v1-data", "refused there, as it may have been the study of this folder"
    assert studies.open("a/data", ONE).study_name == "lab-v1-data"
    assert studies.key("b/data", TWO) == "lab-v1-data-222222", "its place is known now"


def test_other_studies_and_versions_are_not_matched(studies: StoredStudies) -> None:
    stored = studies.open("a/data", ONE)
    assert StudyAttributes.of(stored).fingerprint["data"] == ONE
    assert studies.key("a/data", ONE, version=2) == "lab-v2-data-111111"
    other = replace(studies.search("a/data"), name="lab-two")
    assert resolved(other, studies.data("a/data", ONE), studies.storage).stored_key == "lab-two-v1-data-111111"
