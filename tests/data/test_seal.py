"""A test split is drawn once, fixed by a file, and stays what it was whatever happens to the data set."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from data_cases import NO_DATA_DIR, about, add_image

from pipeline.data.datasets import Listed, listed, load
from pipeline.data.prepare import prepare
from pipeline.errors import DataError, UserError
from pipeline.recipe import Recipe
from pipeline.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "mlruns"


def pets(root: Path, count: int = 20) -> Path:
    for number in range(count):
        for shade, name in enumerate(("cat", "dog")):
            add_image(root / name / f"{number:02}.png", 10 * number + 5 * shade)
    return root


def drawn(root: Path, home: Path, fraction: float = 0.1) -> Listed:
    return listed(about(root, test_fraction=fraction), home)


def manifest(root: Path, rows: list[str], header: str = "path,label,group") -> Path:
    (root / "photos.csv").write_text("\n".join([header, *rows]))
    return root / "photos.csv"


def test_seal_is_stratified_and_leaves_the_rest_to_train(tmp_path: Path, home: Path) -> None:
    found = drawn(pets(tmp_path / "pets"), home)
    assert found.listing.sealed_part.labels.tolist() == [0, 0, 1, 1]
    data = load(about(tmp_path / "pets", test_fraction=0.1), NO_DATA_DIR, home)
    assert len(data.train.labels) == 36 and not (home / "splits").exists(), "only a study fixes it"
    assert found.lines() == [
        "test split of pets: 4 of 40 images are sealed; only `promote` decides by them",
    ]


def test_fixed_seal_outlives_growth_and_a_move(tmp_path: Path, home: Path) -> None:
    root = pets(tmp_path / "pets")
    first = drawn(root, home)
    first.fix(home)
    (file,) = (home / "splits").glob("*.json")
    assert json.loads(file.read_text())["paths"] == sorted(first.listing.sealed_part.names)
    shutil.move(root, tmp_path / "moved")
    moved = drawn(tmp_path / "moved", home)
    assert moved.listing.sealed_part.names == first.listing.sealed_part.names
    moved.fix(home)
    pets(tmp_path / "moved", 40)
    add_image(tmp_path / "moved" / "cow" / "1.png")
    add_image(tmp_path / "moved" / "cow" / "2.png")
    grown = drawn(tmp_path / "moved", home)
    assert grown.listing.sealed_part.names == first.listing.sealed_part.names and len(grown.listing.usable.names) == 78
    assert grown.lines()[1] == "it has no images of cow, about which promotion will say nothing"
    assert drawn(pets(root, 41), home).listing.sealed_part.names == first.listing.sealed_part.names, "known by paths"
    for file in root.rglob("*.png"):
        file.rename(file.with_stem(f"new{file.stem}"))
    others = drawn(root, home).listing.sealed_part.names
    assert others and all("new" in name for name in others), "other images, in that place"
    shutil.rmtree(root)
    pets(root, 40)
    assert drawn(root, tmp_path / "other").listing.sealed_part.names != first.listing.sealed_part.names


def test_a_link_to_the_data_set_is_that_data_set(tmp_path: Path, home: Path) -> None:
    root = pets(tmp_path / "pets")
    (tmp_path / "link").symlink_to(root)
    first = drawn(tmp_path / "link", home)
    first.fix(home)
    pets(root, 40)
    for place in (root, tmp_path / "link"):
        found = drawn(place, home)
        found.fix(home)
        assert found.listing.sealed_part.names == first.listing.sealed_part.names
    assert len(list((home / "splits").glob("*.json"))) == 1


def test_other_share_of_a_fixed_seal_is_refused_and_none_is_none(tmp_path: Path, home: Path) -> None:
    root = pets(tmp_path / "pets")
    drawn(root, home, 0.2).fix(home)
    with pytest.raises(
        UserError, match=r"^data.test_fraction = 0.1: .* drawn with 0.2 and is sealed; `--test-fraction 0.2`"
    ):
        drawn(root, home)
    assert not drawn(root, home, 0).listing.has("test")


def test_two_commands_do_not_seal_twice(tmp_path: Path, home: Path) -> None:
    root = pets(tmp_path / "pets")
    first, second = drawn(root, home, 0.1), drawn(root, home, 0.2)
    first.fix(home)
    first.fix(home)
    with pytest.raises(DataError, match="another command has sealed another test split of it; start again"):
        second.fix(home)
    assert len(list((home / "splits").glob("*.json"))) == 1


def test_seal_of_which_few_images_are_left_is_not_used(tmp_path: Path, home: Path) -> None:
    root = pets(tmp_path / "pets")
    first = drawn(root, home)
    first.fix(home)
    sealed = [root / name for name in first.listing.sealed_part.names]
    for file in sealed[:2]:
        file.unlink()
    assert len(drawn(root, home).listing.sealed_part.names) == 2, "half of them"
    sealed[2].unlink()
    with pytest.raises(
        DataError, match=r"only 1 of the 4 images are left that .*/pets-\w+.json has sealed: .*; if it is"
    ):
        drawn(root, home)


def test_damaged_seal_is_not_drawn_anew(tmp_path: Path, home: Path) -> None:
    root = pets(tmp_path / "pets")
    drawn(root, home).fix(home)
    (file,) = (home / "splits").glob("*.json")
    file.write_text('{"place": ')
    with pytest.raises(DataError, match=r"which fixes a test split, can't be read .* restore it"):
        drawn(root, home)


def test_damaged_seal_of_another_name_stops_no_other_data_set(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = drawn(pets(tmp_path / "pets"), home)
    first.fix(home)
    (home / "splits" / "birds-01234567.json").write_text('{"place": ')
    assert drawn(tmp_path / "pets", home).seal == first.seal and not caplog.records
    assert drawn(pets(tmp_path / "more", 30), home).seal is not None
    assert "birds-01234567.json: which fixes a test split, can't be read" in caplog.text
    assert "it may be of another data set" in caplog.text
    (home / "splits" / "pets-01234567.json").write_text('{"place": ')
    assert drawn(tmp_path / "pets", home).seal == first.seal, "this one fits"
    with pytest.raises(DataError, match=r"birds-01234567.json: .* restore it"):
        drawn(pets(tmp_path / "Birds", 40), home)


def test_given_test_split_is_never_replaced(tmp_path: Path, home: Path) -> None:
    root = pets(tmp_path / "pets" / "train").parent
    add_image(root / "test" / "cat" / "1.png")
    assert drawn(root, home).seal is None
    assert drawn(root, home).listing.sealed_part.names == ["test/cat/1.png"]


def test_too_few_images_are_refused_with_the_way_out(tmp_path: Path, home: Path) -> None:
    with pytest.raises(UserError, match=r"^data.test_fraction = 0.1: gives 1 of 10 images, .*; `--test-fraction 0`"):
        drawn(pets(tmp_path / "pets", 5), home)
    root = pets(tmp_path / "rare")
    for number in range(2):
        add_image(root / "cow" / f"{number}.png")
    rule = "rare, class cow: has 2 images; training, validation and test need one each; `--test-fraction 0`"
    with pytest.raises(UserError, match=rule):
        drawn(root, home)


def test_images_of_a_sealed_group_stay_sealed(tmp_path: Path, home: Path) -> None:
    root = pets(tmp_path / "pets")
    rows = [f"{name}/{number:02}.png,{name},p{number // 2}" for number in range(20) for name in ("cat", "dog")]
    first = drawn(manifest(root, rows), home)
    first.fix(home)
    (group,) = set(first.listing.sealed_part.groups)
    assert len(first.listing.sealed_part.names) == 4 and group not in first.listing.usable.groups
    add_image(root / "new.png")
    add_image(root / "old.png")
    grown = drawn(manifest(root, [*rows, f"new.png,cat,{group}", "old.png,cat,p99"]), home)
    assert set(grown.listing.sealed_part.names) == {*first.listing.sealed_part.names, "new.png"}


def test_groups_that_come_later_are_never_divided(tmp_path: Path, home: Path) -> None:
    root = pets(tmp_path / "pets")
    rows = [f"{name}/{number:02}.png,{name}" for number in range(20) for name in ("cat", "dog")]
    drawn(manifest(root, rows, "path,label"), home).fix(home)
    with pytest.raises(
        DataError, match=r"^photos.csv, group p\d: is in train and test; .* sealed without these groups"
    ):
        drawn(manifest(root, [f"{row},p{number // 10}" for number, row in enumerate(rows)]), home)


def rows_of(numbers: Iterable[int], group: int = 0) -> list[str]:
    return [
        f"{name}/{number:02}.png,{name}" + (f",p{number // group}" if group else "")
        for number in numbers
        for name in ("cat", "dog")
    ]


def files_of(found: Listed, is_sealed: bool = True) -> set[Path]:
    part = found.listing.sealed_part if is_sealed else found.listing.usable
    return {found.listing.root / name for name in part.names}


def test_cleaned_manifest_keeps_the_sealed_images_sealed(tmp_path: Path, home: Path) -> None:
    root = pets(tmp_path / "pets", 100)
    first = drawn(manifest(root, rows_of(range(100)), "path,label"), home)
    first.fix(home)
    (file,) = (home / "splits").glob("*.json")
    clean = root / "clean.csv"
    for kept in (range(20, 100), range(70, 100)):
        clean.write_text("\n".join(["path,label", *rows_of(kept)]))
        found = drawn(clean, home)
        assert files_of(found) == files_of(first) & {root / row.partition(",")[0] for row in rows_of(kept)}
        assert found.lines()[1] == (
            f"these include the images of it that were sealed before, by mlruns/splits/{file.name}"
        )
    found.fix(home)
    assert drawn(clean, home).seal == found.seal, "it has a seal of its own then"
    assert drawn(root / "photos.csv", home).seal == first.seal


def test_folder_and_manifests_of_its_images_share_what_is_sealed(tmp_path: Path, home: Path) -> None:
    """Within the folder or beside it, and for another task; groups that the seal would divide are refused."""
    root = pets(tmp_path / "pets", 100)
    first = drawn(root, home)
    first.fix(home)
    beside = tmp_path / "photos.csv"
    beside.write_text("\n".join(["path,label", *(f"pets/{row}" for row in rows_of(range(5, 100)))]))
    assert files_of(drawn(beside, home)) < files_of(first)
    task = root / "task.csv"
    names = [row.partition(",")[0] for row in rows_of(range(100))]
    task.write_text("\n".join(["path,label", *(f"{name},{number % 3}" for number, name in enumerate(names))]))
    assert files_of(drawn(task, home)) == files_of(first)
    by_group = manifest(root, rows_of(range(5, 100), 10))
    with pytest.raises(DataError, match=r"group p\d: is in .* remove pets-\w+.json in mlruns/splits"):
        drawn(by_group, home)
    other = pets(tmp_path / "other", 90)
    assert drawn(other, home).seal.shared == (), "another folder's images are others, whatever they are called"


def test_few_sealed_images_stay_sealed_and_others_are_drawn(tmp_path: Path, home: Path) -> None:
    """As of a small manifest that a person tries first."""
    root = pets(tmp_path / "pets", 100)
    small = drawn(manifest(root, rows_of(range(20)), "path,label"), home)
    small.fix(home)
    complete = drawn(root, home)
    assert files_of(small) < files_of(complete) and len(files_of(complete)) == 4 + 20
    assert not files_of(complete) & files_of(complete, is_sealed=False)
    rest = root / "rest.csv"
    rest.write_text("\n".join(["path,label", *rows_of(range(20, 100))]))
    assert drawn(rest, home).seal.shared == ()


def test_new_images_of_a_sealed_group_are_sealed_under_another_name_too(tmp_path: Path, home: Path) -> None:
    root = pets(tmp_path / "pets")
    first = drawn(manifest(root, rows_of(range(20), 2)), home)
    first.fix(home)
    add_image(root / "new.png")
    second = root / "second.csv"
    (group,) = first.seal.groups
    second.write_text("\n".join(["path,label,group", *rows_of(range(20), 2), f"new.png,cat,{group}"]))
    assert files_of(drawn(second, home)) == files_of(first) | {root / "new.png"}


def test_class_whose_images_are_all_sealed_is_refused(tmp_path: Path, home: Path) -> None:
    root = pets(tmp_path / "pets")
    first = drawn(root, home)
    first.fix(home)
    task = root / "task.csv"
    rows = [row.partition(",")[0] for row in rows_of(range(20))]
    task.write_text(
        "\n".join(["path,label", *(f"{row},{'rare' if root / row in files_of(first) else row[:3]}" for row in rows)])
    )
    with pytest.raises(DataError, match=r"^task.csv, class rare: all its images are sealed; add some, or remove pets-"):
        drawn(task, home)


@pytest.mark.parametrize("given", [True, False])
def test_sealed_labels_change_no_score(given: bool, tmp_path: Path, home: Path, small_recipe: Recipe) -> None:
    root = pets(tmp_path / "pets")
    splits = ["test" if number % 5 == 0 else "train" for number in range(20)]

    def scores(is_permuted: bool) -> list[object]:
        rows = [
            f"{name}/{number:02}.png,{other if is_permuted and is_sealed(name, number) else name}"
            + (f",{splits[number]}" if given else "")
            for number in range(20)
            for name, other in (("cat", "dog"), ("dog", "cat"))
        ]
        place = manifest(root, rows, "path,label,split" if given else "path,label")
        found = drawn(place, home)
        found.fix(home)
        sealed_names.update(found.listing.sealed_part.names)
        permuted = [found.listing.classes[label] for label in found.listing.sealed_part.labels]
        assert is_permuted == (permuted != [Path(name).parent.name for name in found.listing.sealed_part.names])
        recipe = small_recipe.changed({"data.dataset": str(place), "training.batch_size": 8})
        data = prepare(load(recipe.data, NO_DATA_DIR, home), recipe.data, CPU)
        result = train(recipe, data, CPU)
        measured = [
            {name: value for name, value in report.metrics.items() if name.startswith(("train/", "val/"))}
            for report in result.history
        ]
        return [data.digest, data.split_digest, measured, result.validation_logits.tolist()]

    sealed_names: set[str] = set()

    def is_sealed(name: str, number: int) -> bool:
        return f"{name}/{number:02}.png" in sealed_names

    assert scores(False) == scores(True)
    assert len(sealed_names) == (8 if given else 4)
