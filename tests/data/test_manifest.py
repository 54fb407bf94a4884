"""Manifests: what a row may say, and a line for each thing that can be wrong with it."""

import os
import re
from pathlib import Path

import pandas as pd
import pytest
from data_cases import NO_DATA_DIR, about, add_image, lines_of, make_pets

from pipeline.data.datasets import load
from pipeline.data.manifest import read_manifest
from pipeline.errors import DataError
from pipeline.sections.data import Data

ROWS = ["train/dog/more/0.tiff,dog", "train/cat/1.png,cat", "./train/cat/2.JPG, cat", "train/dog/2.webp,dog"]


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return make_pets(tmp_path / "pets")


def write(root: Path, rows: list[str], header: str = "path,label", name: str = "photos.csv") -> Path:
    (root / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    return root / name


def columns(text: str = "path,label,split,group") -> dict[str, str]:
    return Data(columns=text).column_names


def test_manifest_of_a_folder_is_the_same_data_set(pets: Path) -> None:
    place = write(pets, [*ROWS, "train/dog/1.bmp,dog"])
    assert load(about(place), NO_DATA_DIR).digest == load(about(pets), NO_DATA_DIR).digest
    data = load(about(place), NO_DATA_DIR)
    assert data.name == f"photos-{data.digest[:6]}" and data.source == str(place)


def test_example_of_the_guide_is_a_valid_manifest(tmp_path: Path) -> None:
    guide = Path(__file__).resolve().parents[2] / "pipeline" / "data" / "README.md"
    [header, *rows] = re.findall(r"```\n(path,label,.*?)\n```", guide.read_text(), re.DOTALL)[0].splitlines()
    for colour, row in enumerate(rows):
        add_image(tmp_path / row.partition(",")[0], colour)
    data = load(about(write(tmp_path, rows, header)), NO_DATA_DIR)
    assert (len(data.train.labels), data.classes) == (6, ("cat", "dog")), "to train and validate"


def test_parquet_says_the_same_as_csv(pets: Path) -> None:
    place = write(pets, ROWS)
    table = pd.read_csv(place, skipinitialspace=True).astype({"label": "category"})
    table.set_index("path").to_parquet(pets / "photos.PARQUET")
    listings = [read_manifest(file, columns()) for file in (place, pets / "photos.PARQUET")]
    assert (
        listings[0].names
        == listings[1].names
        == [
            "train/cat/1.png",
            "train/cat/2.JPG",
            "train/dog/2.webp",
            "train/dog/more/0.tiff",
        ]
    )
    assert listings[0].labels.tolist() == listings[1].labels.tolist() == [0, 0, 1, 1]


def test_whole_numbers_that_became_floats_are_whole_again(pets: Path) -> None:
    paths = ["train/dog/more/0.tiff", "train/cat/1.png", "train/cat/2.JPG", "train/dog/2.webp"]
    place = pets / "photos.parquet"

    def label(*labels: float | None) -> Path:
        pd.DataFrame({"path": paths, "label": labels}).to_parquet(place)
        return place

    empty = "photos.parquet, row 3: label is empty; fill it in, or remove the row"
    assert lines_of(DataError, label(4, 3, None, 4)) == [empty]
    assert read_manifest(label(4.0, 3.0, 3.0, 4.0), columns()).classes == ("3", "4")
    assert read_manifest(label(4.5, 3.0, 3.0, 4.5), columns()).classes == ("3.0", "4.5"), "some are fractions"


def test_columns_may_have_other_names(pets: Path) -> None:
    place = write(pets, [f"{row},p{index}" for index, row in enumerate(ROWS)], "file,NA,patient")
    listing = read_manifest(place, columns("path=file, label=NA,group=patient"))
    assert sorted(listing.groups) == ["p0", "p1", "p2", "p3"]
    assert lines_of(DataError, place) == [
        f"{place}: has no column path and label; it has file, NA, patient; "
        "`--columns path=file,label=species` names those that are called otherwise"
    ]


def test_columns_that_are_not_used_are_named(pets: Path) -> None:
    rows = [f"{row},{index},7" for index, row in enumerate(ROWS)]
    listing = read_manifest(write(pets, rows, "path,label,patient,age"), columns())
    assert listing.lines() == ["columns of photos.csv not used: patient, age"]
    listing = read_manifest(write(pets, rows, "path,label,patient,age"), columns("group=patient"))
    assert listing.lines() == ["columns of photos.csv not used: age"]


def test_no_column_is_ignored_for_its_case_or_a_space(pets: Path) -> None:
    """Or else test images would train, and groups would be divided."""
    add_image(pets / "a.png")
    rows = [*(f"{row},train,p{index}" for index, row in enumerate(ROWS)), "a.png,cat,test,p9"]
    listing = read_manifest(write(pets, rows, "path, label, split ,group "), columns())
    assert listing.sealed_part.names == ["a.png"] and listing.groups is not None
    place = write(pets, rows, "path,label,Split,GROUP")
    assert lines_of(DataError, place) == [
        f"{place}, column Split: would not be used: split is read; rename it",
        f"{place}, column GROUP: would not be used: group is read; rename it",
    ]
    assert lines_of(DataError, write(pets, rows, "path,label,split, split")) == [
        f"{place}, column split: is there 2 times; remove or rename the others"
    ]


def test_splits_are_given_in_any_case_and_order(pets: Path) -> None:
    for name in ("a", "b"):
        add_image(pets / f"{name}.png")
    rows = ["a.png,cat,TEST", "b.png,dog,valid", *(f"{row},Train" for row in ROWS)]
    listing = read_manifest(write(pets, rows, "path,label,split"), columns())
    assert listing.splits.tolist() == ["train"] * 4 + ["val", "test"]
    assert listing.usable.names[-1] == "b.png" and listing.sealed_part.names == ["a.png"]


def test_every_bad_row_is_named_at_once(pets: Path) -> None:
    same = pets / "train/dog/more/../more/0.tiff"
    rows = [f"{ROWS[0]},train", f"{same},dog,test", ",dog,train", f"{ROWS[1]},tst", "x.png,,val"]
    assert lines_of(DataError, write(pets, rows, "path,label,split")) == [
        "photos.csv, row 2: train/dog/more/0.tiff stands in row 1, too; remove one of them",
        "photos.csv, row 3: path is empty; fill it in, or remove the row",
        "photos.csv, row 4: split = tst: not one of train, training, val, valid, validation, dev, eval, test, testing "
        "(did you mean test?)",
        "photos.csv, row 5: label is empty; fill it in, or remove the row",
    ]


def test_classes_are_checked_as_a_folders(pets: Path) -> None:
    rows = [*(f"{row},train" for row in ROWS[:3]), "a.png,cow,test"]
    assert [line.partition("; ")[0] for line in lines_of(DataError, write(pets, rows, "path,label,split"))] == [
        "photos.csv, split train, class dog: holds 1 image(s), needs at least 2",
        "photos.csv, split test, class cow: no such class in photos.csv, split train",
    ]
    assert lines_of(DataError, write(pets, ROWS[:1])) == [
        "photos.csv, split train: holds one class, needs at least 2; name more of them in the column label"
    ]


def test_images_stay_inside_the_manifests_folder(pets: Path) -> None:
    add_image(pets.parent / "private.png")
    assert lines_of(DataError, write(pets, [*ROWS, "../private.png,cat"]))[0].startswith(
        f"{pets}/../private.png: leads out of {pets}"
    )
    assert lines_of(DataError, write(pets, [*ROWS, "train/no.png,cat"])) == [
        f"{pets}/train/no.png: no such file",
        "1 of 5 images can't be used; replace or remove them, or `--corrupt skip` leaves them out",
    ]


def test_absolute_paths_may_reach_the_folder_by_another_link(pets: Path) -> None:
    links = [pets.parent / "here", pets.parent / "there"]
    for link in links:
        link.symlink_to(pets)
    expected = read_manifest(write(pets, ROWS), columns()).names
    for root in (pets, links[0]):
        for other in (pets, *links):
            listing = read_manifest(write(root, [f"{other}/{row}" for row in ROWS]), columns())
            assert listing.names == expected and all(map(os.path.isfile, listing.files))


def test_group_in_two_splits_is_refused(pets: Path) -> None:
    rows = [f"{row},{split},p1" for row, split in zip(ROWS, ["train"] * 4, strict=True)]
    add_image(pets / "a.png")
    assert lines_of(DataError, write(pets, [*rows, "a.png,cat,test,p1"], "path,label,split,group")) == [
        "photos.csv, group p1: is in train and test; put it on one side, or leave out one of the columns split and group"
    ]


def test_row_with_more_cells_than_the_header_is_refused(pets: Path) -> None:
    """pandas takes the first cell of every row for an index, and the next for the path."""
    more = "has rows with more cells than its header; remove commas at their ends, and quote values with commas"
    for rows in ([f"{row}," for row in ROWS], [f"{ROWS[0]},", *ROWS[1:]]):
        assert lines_of(DataError, write(pets, rows)) == [f"{pets}/photos.csv: {more}"]
    assert "Expected 2 fields in line 5, saw 3" in lines_of(DataError, write(pets, [*ROWS[:3], f"{ROWS[3]},"]))[0]
    listing = read_manifest(write(pets, [f"{row}," for row in ROWS], "path,label,"), columns())
    assert listing.labels.tolist() == [0, 0, 1, 1], "a column without a name is one"


def test_file_that_is_no_table_is_refused(pets: Path) -> None:
    (pets / "photos.parquet").write_bytes(b"nothing")
    (line,) = lines_of(DataError, pets / "photos.parquet")
    assert line.startswith(f"{pets}/photos.parquet: can't be read (") and line.endswith("or as Parquet")
    (pets / "empty.csv").touch()
    assert "can't be read (No columns to parse" in lines_of(DataError, pets / "empty.csv")[0]
    spreadsheet = write(pets, [row.replace(",", ";") for row in ROWS], "path;label")
    assert lines_of(DataError, spreadsheet)[0].endswith("it has path;label; separate the columns by commas")
