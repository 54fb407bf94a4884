"""Predictions as tables: what is written is read back the same, and what doesn't fit together isn't averaged."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import DataError, UserError
from pipeline.inference.predictions import average, check_output, predictions_table, read_predictions, write_predictions

CLASSES = ["cat", "dog", "p_x", "id"]
IDS = ["0", "0012", "NA", "a,b.png"]
RANDOM = np.random.RandomState(0)


def table(ids: list[str] = IDS, classes: list[str] = CLASSES) -> pd.DataFrame:
    return predictions_table(ids, RANDOM.dirichlet(np.ones(len(classes)), len(ids)), classes)


def test_row_is_id_label_and_probability_by_class() -> None:
    made = predictions_table(["7", "8"], np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]), ["a", "b", "c"])
    assert list(made.columns) == ["id", "label", "p_a", "p_b", "p_c"]
    assert made.to_numpy().tolist() == [["7", "b", 0.2, 0.5, 0.3], ["8", "a", 0.6, 0.3, 0.1]]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".CSV"])
def test_table_is_read_back_as_it_was_written(suffix: str, tmp_path: Path) -> None:
    made, path = table(), tmp_path / f"out{suffix}"
    write_predictions(made, path)
    pd.testing.assert_frame_equal(read_predictions(path), made, check_dtype=False)
    write_predictions(made.head(2), path)  # a file that is there is replaced
    assert len(read_predictions(path)) == 2
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_failed_write_leaves_the_old_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.csv"
    write_predictions(table(), path)
    before = path.read_bytes()

    def full(self: pd.DataFrame, file: Path, **options: object) -> None:
        Path(file).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(UserError, match=r"out.csv: can't be written: No space left on device"):
        write_predictions(table(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["out.csv"]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("out.txt", "should end in .csv or .parquet"),
        ("out", "should end in .csv or .parquet"),
        ("none/out.csv", "there is no folder"),
        ("folder.csv", "is a folder"),
    ],
)
def test_impossible_output_is_refused_before_the_work(name: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=line):
        check_output(tmp_path / name)
    check_output(tmp_path / "out.parquet")


def test_mean_is_by_id_and_the_label_follows() -> None:
    a = predictions_table(["1", "2"], np.array([[0.9, 0.1], [0.6, 0.4]]), ["x", "y"])
    b = predictions_table(["2", "1"], np.array([[0.1, 0.9], [0.7, 0.3]]), ["x", "y"])
    made = average({"a": a, "b": b})
    assert list(made["id"]) == ["1", "2"]
    assert list(made["label"]) == ["x", "y"]
    np.testing.assert_allclose(made[["p_x", "p_y"]], [[0.8, 0.2], [0.35, 0.65]])


def test_all_tables_with_other_ids_or_classes_are_named() -> None:
    with pytest.raises(DataError) as caught:
        average(
            {
                "a.csv": table(),
                "b.csv": table(["0", "0012", "NA", "other"]),
                "c.csv": table(IDS[:3]),
                "d.csv": table(classes=["dog", "cat", "p_x", "id"]),
                "e.csv": table(),
            }
        )
    assert caught.value.lines == [
        "b.csv: its ids are not those of a.csv: 2 are in one only, as a,b.png",
        "c.csv: its ids are not those of a.csv: 1 are in one only, as a,b.png",
        "d.csv: its classes are not those of a.csv, in the same order",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("id,label,p_a,p_b\n1,a,0.6,0.4\n1,a,0.6,0.4\n", "id 1 is there twice"),
        ("id,label,p_a,p_b\n1,a,0.6,0.3\n", "the probabilities of id 1 are not"),
        ("id,label,p_a,p_b\n1,a,0.6,0.401\n", "the probabilities of id 1 are not"),
        ("id,label,p_a,p_b\n1,a,1.6,-0.6\n", "the probabilities of id 1 are not"),
        ("id,label,p_a,p_b\n1,a,0.6,\n", "can't be read as predictions"),
        ("id,label,p_a,p_b\n1,a,nan,1\n", "the probabilities of id 1 are not"),
        ("id,label,p_a,p_b\n", "holds no rows"),
        ("id,label\n1,a\n", "its columns should be id, label and p_<class>"),
        ("id,class,p_a\n1,a,1\n", "its columns should be id, label and p_<class>"),
        ("", "can't be read as predictions"),
        ("\x00\x01", "predictions.csv"),
    ],
)
def test_table_without_predictions_is_refused(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=line) as caught:
        read_predictions(path)
    assert len(caught.value.lines) == 1


def test_probabilities_rounded_to_four_digits_are_read(tmp_path: Path) -> None:
    many = predictions_table(["1"], np.full((1, 100), 0.01) + 4e-5, [str(name) for name in range(100)])
    write_predictions(many.round(4), tmp_path / "a.csv")
    assert len(read_predictions(tmp_path / "a.csv")) == 1


@pytest.mark.parametrize(
    "columns",
    [
        {"id": ["1"], "label": ["a"], "p_a": ["one"], "p_b": ["zero"]},
        {"id": ["1"], "label": ["a"], "p_a": [{"x": 1}], "p_b": [{"x": 1}]},
        {"id": ["1", None], "label": ["a", "a"], "p_a": [1.0, 1.0], "p_b": [0.0, 0.0]},
    ],
)
def test_other_parquet_is_refused(columns: dict, tmp_path: Path) -> None:
    pd.DataFrame(columns).to_parquet(tmp_path / "odd.parquet")
    with pytest.raises(DataError, match=r"odd.parquet: can't be read as predictions"):
        read_predictions(tmp_path / "odd.parquet")


def test_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    with pytest.raises(UserError, match="can't be written to"):
        check_output(tmp_path / "out.csv")


def test_missing_or_damaged_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_predictions(tmp_path / "none.csv")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"cut.parquet: can't be read"):
        read_predictions(tmp_path / "cut.parquet")
    with pytest.raises(UserError, match=r"should end in"):
        read_predictions(tmp_path / "a.json")
