"""The page and the table of an inspection."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation.label_errors import LabelErrors
from pipeline.report.inspection import Inspection, inspect
from pipeline.report.inspection_page import _sheet, findings, inspection_page
from pipeline.report.label_suspects import Suspects
from pipeline.sections.data import Data
from report.helpers import ATTACK, body
from report.test_inspection import make_photos

ERRORS = LabelErrors(np.array([0]), np.array([1]), np.array([0.75]))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    root = make_photos(tmp_path_factory.mktemp("page") / "photos")
    plain = inspect(Data(dataset=str(root)), Path("nowhere"), root.parent / "mlruns", None)
    suspects = Suspects(ERRORS, np.array([3]), 26, "the best recipe on 5 folds")
    return replace(plain, suspects=suspects, suspect_rows=np.array([3]), classes=("cat", ATTACK))


def test_page_shows_every_finding_and_no_test_image(found: Inspection) -> None:
    page = inspection_page(found, "photos.csv")
    text = body(page)
    assert len(page) < 300_000 and "Plotly" not in page, "no figures, no code for them"
    for line in found.lines():
        assert line.replace("'", "&#39;") in text
    assert text.count(">sealed</div>") == 2 and text.count("<img src=") == 9, "a set's other images, and a suspect"
    assert "train/dog/broken.jpg" in text and "empty file" in text
    assert "seems &lt;img src=x onerror" in text and ATTACK not in text
    assert re.search(r"<td>width</td>\s*<td class=\"n\">40</td>", text)
    assert len(re.findall(r'class="sheet"', text)) == 2


def test_page_without_findings_says_so(found: Inspection) -> None:
    clean = replace(found, survey=replace(found.survey, unreadable=()), duplicates=())
    clean = replace(clean, suspects=None, suspect_rows=np.empty(0, np.int64))
    text = body(inspection_page(clean, "photos.csv"))
    assert "nothing was found that needs a decision" in text
    assert "No two images are the same" in text and "No finished run has seen this data set" in text


def test_table_has_a_row_for_each_image(found: Inspection) -> None:
    table = findings(found)
    assert table["finding"].value_counts().to_dict() == {
        "exact duplicate": 6,
        "near duplicate": 4,
        "suspected label": 1,
        "unreadable": 1,
    }
    assert table.iloc[0].tolist()[:4] == ["exact duplicate", 1, "train/cat/sealed.png", "cat"]
    assert table.iloc[-1].tolist()[2:] == ["train/dog/broken.jpg", ATTACK, "train", "empty file"]
    assert table.iloc[-2]["detail"] == f"seems {ATTACK} (+0.75)"


def test_names_that_are_not_utf_8_are_escaped(tmp_path: Path) -> None:
    root = make_photos(tmp_path / "photos")
    try:
        for name, odd in (("train/cat/other.png", b"\xe9ther.png"), ("train/dog/broken.jpg", b"br\xe9ken.jpg")):
            (root / name).rename((root / name).with_name(os.fsdecode(odd)))
    except OSError:
        pytest.skip("this file system takes no such names")
    found = inspect(Data(dataset=str(root)), Path("nowhere"), tmp_path / "mlruns", None)
    found = replace(found, suspect_rows=np.array([3]), suspects=Suspects(ERRORS, np.array([3]), 26, "folds"))
    names = np.where(np.arange(len(found.survey.names)) == 3, "train/cat/\udce9.png", found.survey.names)
    found = replace(found, survey=replace(found.survey, names=names))
    table, page = findings(found).to_csv(index=False), inspection_page(found, "photos.csv")
    for name in ("cat/\\xe9ther.png", "dog/br\\xe9ken.jpg", "cat/\\xe9.png"):
        assert name in table and name in page
    assert table.encode() and page.encode()


def test_sheet_puts_images_side_by_side() -> None:
    images = np.arange(14, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), dtype=np.uint8)
    sheet = _sheet(images)
    assert sheet.shape == (4, 24, 3)
    assert sheet[0, ::2, 0].tolist() == list(range(12)) and sheet[2, ::2, 0].tolist() == [12, 13, *[255] * 10]
