"""Which study a command goes on with: told by name, version and images, wherever they lie."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.search.storage import RetryingStorage, find_study, open_storage, open_study, resolved
from pipeline.search.study import Search, Study


def space(trial: Any) -> None:
    trial.suggest_float("optimizer.lr", 0.01, 1, log=True)


class Shop:
    """A store, and studies of `lab` in it."""

    def __init__(self, home: Path, recipe: Recipe, digits: TrainingData):
        self.home, self.recipe, self.digits = home, recipe, digits
        self.storage: RetryingStorage = open_storage(home)

    def search(self, folder: str, version: int = 1) -> Search:
        base = self.recipe.changed({"data.dataset": folder})
        study = Study(question="?", base=base, space=space, objective="val/accuracy", trials=1)
        return Search("lab", study, base, version=version, trials=1, timeout_s=None)

    def data(self, folder: str, digest: str) -> TrainingData:
        return replace(
            self.digits, name=f"{Path(folder).name}-{digest[:6]}", digest=digest, source=str(self.home / folder)
        )

    def key(self, folder: str, digest: str, version: int = 1) -> str:
        return resolved(self.search(folder, version), self.data(folder, digest), self.storage).stored_key or ""

    def open(self, folder: str, digest: str, version: int = 1) -> Any:
        return open_study(self.search(folder, version), self.data(folder, digest), self.storage, self.home)


@pytest.fixture
def shop(tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> Shop:
    return Shop(tmp_path, small_recipe, digits)


ONE, TWO = "1" * 64, "2" * 64


def test_folders_of_one_name_have_studies_of_their_own(shop: Shop) -> None:
    shop.open("a/data", ONE)
    assert shop.open("b/data", TWO).study_name == "lab-v1-data-222222"
    assert shop.open("a/data", ONE).study_name == "lab-v1-data-111111"


def test_a_folder_and_a_data_set_of_its_name_have_studies_of_their_own(shop: Shop) -> None:
    open_study(shop.search("digits"), shop.digits, shop.storage, shop.home)
    assert shop.open("digits", ONE).study_name == "lab-v1-digits-111111"
    assert resolved(shop.search("digits"), shop.digits, shop.storage).stored_key == "lab-v1-digits"


def test_a_moved_and_renamed_folder_goes_on_with_key_and_recipe_and_new_place(shop: Shop) -> None:
    shop.open("a/data", ONE)
    study = shop.open("c/pets", ONE)
    assert study.study_name == "lab-v1-data-111111"
    assert study.user_attrs["places"] == [str(shop.home / "c/pets"), str(shop.home / "a/data")]
    search = resolved(shop.search("c/pets"), shop.data("c/pets", ONE), shop.storage)
    assert (search.base.data.dataset, search.lies_at) == ("a/data", "c/pets"), (
        "the same recipe, read from another place"
    )
    assert find_study(shop.search("c/pets"), shop.data("c/pets", ONE), shop.storage)


def test_other_images_in_the_same_folder_are_refused_and_a_version_is_the_way_out(shop: Shop) -> None:
    shop.open("a/data", ONE)
    with pytest.raises(UserError, match=r"lab-v1-data-111111 has trials that(.|\n)*VERSION=2"):
        shop.open("a/data", TWO)
    with pytest.raises(UserError, match="VERSION=2"):
        find_study(shop.search("a/data"), shop.data("a/data", TWO), shop.storage)
    assert shop.open("a/data", TWO, version=2).study_name == "lab-v2-data-222222"
    assert shop.key("a/data", ONE) == "lab-v1-data-111111", "the former images are back"


def test_other_images_in_another_folder_are_another_study_and_the_first_is_named(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    shop.open("a/data", ONE)
    assert shop.key("b/data", TWO) == "lab-v1-data-222222"
    assert "a new study lab-v1-data-222222; others of that name have other images: lab-v1-data-111111" in caplog.text


def test_a_study_from_before_keys_had_digits_goes_on_and_is_guarded(shop: Shop) -> None:
    search, data = shop.search("a/data"), shop.data("a/data", ONE)
    open_study(search, replace(data, name="data"), shop.storage, shop.home)
    with shop.storage.engine.begin() as connection:
        connection.execute(text("delete from study_user_attributes where key in ('places', 'dataset')"))
    assert shop.key("b/data", TWO) == "lab-v1-data", "is refused there, as it may have been this folder's"
    assert shop.open("a/data", ONE).study_name == "lab-v1-data"
    assert shop.key("b/data", TWO) == "lab-v1-data-222222", "now its place is known"


def test_other_studies_and_versions_are_let_alone(shop: Shop) -> None:
    stored = shop.open("a/data", ONE)
    assert json.loads(stored.user_attrs["fingerprint"])["data"] == ONE
    assert shop.key("a/data", ONE, version=2) == "lab-v2-data-111111"
    other = replace(shop.search("a/data"), name="lab-two")
    assert resolved(other, shop.data("a/data", ONE), shop.storage).stored_key == "lab-two-v1-data-111111"
