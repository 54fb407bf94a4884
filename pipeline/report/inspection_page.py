"""An inspection as one page, and as a table of all that was found; templates/inspection.html has its order and its words."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.duplicates import MAX_BITS, MAX_DIFFERENCE
from pipeline.data.listing import TEST, TRAIN
from pipeline.errors import path_text
from pipeline.report.inspection import DUPLICATES, DuplicateSet, Inspection
from pipeline.report.render import picture, render

PICTURE = 64  # height and width in pixels
MAX_SETS = 12  # of duplicates that are shown, of each severity
MAX_IN_SET = 6
MAX_SUSPECTS = 60
MAX_ROWS = 60  # of other tables
MAX_SHEETS = 60  # classes with a contact sheet
SHEET = (2, 12)  # rows and columns of one
_QUANTILES = (0, 0.05, 0.5, 0.95, 1)


def inspection_page(found: Inspection, table_file: str, word: Callable[[str], str] = str) -> str:
    """The HTML; `table_file` is where `findings` are written. `word` as `render` takes it."""
    survey, suspects = found.survey, found.suspects
    totals = {split: f"{counts.sum():,}" for split, counts in found.counts.items()}
    return render(
        "inspection.html",
        {},
        word,
        title=f"Inspection of {found.name}",
        links={},
        next_steps={},
        place=found.place,
        dataset=found.dataset,
        written=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        lines=found.lines(),
        notes=found.notes,
        table_file=table_file,
        num_images=sum(int(counts.sum()) for counts in found.counts.values()),
        totals={f"in {split}": total for split, total in totals.items()},
        classes=found.classes,
        num_sets=len(found.duplicates),
        groups=list(_groups(found)),
        max_bits=MAX_BITS,
        max_difference=MAX_DIFFERENCE,
        suspects=suspects,
        num_suspects=len(found.suspect_rows),
        suspect_items=[_suspect(found, place) for place in range(min(len(found.suspect_rows), MAX_SUSPECTS))],
        unreadable=[one._replace(name=path_text(one.name)) for one in survey.unreadable[:MAX_ROWS]],
        num_unreadable=len(survey.unreadable),
        headings=[("class", ""), *((split, "n") for split in found.counts), ("training images", "wide")],
        class_rows=_class_rows(found),
        quantiles=_quantiles(survey.sizes),
        sizes=Counter(f"{width} x {height}" for width, height in survey.sizes.tolist()).most_common(8),
        kinds=Counter(survey.kinds.tolist()).most_common(8),
        sheets=list(_sheets(found)),
    )


def findings(found: Inspection) -> pd.DataFrame:
    """A row for each image that something was found of: finding, set (a number for images that belong together), image,
    class, split, detail. A duplicate is exact where another image of its set has the same bytes.
    """
    survey, rows = found.survey, list[tuple[Any, ...]]()
    for number, one in enumerate(found.duplicates, 1):
        where = DUPLICATES[one.severity].where
        for row, is_copy in zip(one.rows, one.is_copy, strict=True):
            kind = "exact duplicate" if is_copy else "near duplicate"
            rows.append((kind, number, path_text(survey.names[row]), survey.labels[row], survey.splits[row], where))
    for place, row in enumerate(found.suspect_rows):
        detail = f"seems {_suggestion(found, place)}"
        rows.append(
            ("suspected label", pd.NA, path_text(survey.names[row]), survey.labels[row], survey.splits[row], detail)
        )
    rows += [("unreadable", pd.NA, path_text(one.name), one.label, one.split, one.reason) for one in survey.unreadable]
    frame = pd.DataFrame(rows, columns=["finding", "set", "image", "class", "split", "detail"])
    return frame.assign(**{"class": [found.classes[label] for label in frame["class"]]}).astype({"set": "Int64"})


def _groups(found: Inspection) -> Iterator[dict[str, Any]]:
    """The duplicates of each severity, the worst first."""
    for severity, about in enumerate(DUPLICATES):
        sets = [one for one in found.duplicates if one.severity == severity]
        if sets:
            shown = [_set(found, one) for one in sets[:MAX_SETS]]
            yield {"title": f"Twice {about.where}", "remedy": about.remedy, "count": len(sets), "sets": shown}


def _set(found: Inspection, one: DuplicateSet) -> dict[str, Any]:
    survey = found.survey
    items = [
        _item(found, row, [path_text(survey.names[row]), found.classes[survey.labels[row]], survey.splits[row]])
        for row in one.rows[:MAX_IN_SET]
    ]
    near = f"nearly the same{f', {sum(one.is_copy)} of them with equal bytes' if any(one.is_copy) else ''}"
    kind = "equal byte for byte" if one.is_exact else near
    return {"kind": kind, "pictures": items, "hidden": len(one.rows) - len(items)}


def _suspect(found: Inspection, place: int) -> dict[str, Any]:
    row = int(found.suspect_rows[place])
    label = found.classes[found.survey.labels[row]]
    return _item(
        found, row, [path_text(found.survey.names[row]), f"labelled {label}", f"seems {_suggestion(found, place)}"]
    )


def _suggestion(found: Inspection, place: int) -> str:
    assert found.suspects
    errors = found.suspects.errors
    return f"{found.classes[errors.suggested[place]]} ({errors.margins[place]:+.2f})"


def _item(found: Inspection, row: int, lines: list[str]) -> dict[str, Any]:
    is_sealed = found.survey.splits[row] == TEST
    return {"source": "" if is_sealed else picture(_shown(found, row), "JPEG"), "lines": lines}


def _shown(found: Inspection, row: int) -> np.ndarray:
    """(S, S, 3)"""
    return found.picture(row, PICTURE).transpose(1, 2, 0)


def _class_rows(found: Inspection) -> list[Mapping[str, Any]]:
    """The largest class first; of many the first and last."""
    train = found.counts[TRAIN]
    order = np.argsort(-train, kind="stable").tolist()
    if len(order) > MAX_ROWS:
        order = [*order[: MAX_ROWS // 2], *order[-MAX_ROWS // 2 :]]
    return [
        {
            "name": found.classes[label],
            "counts": [int(counts[label]) for counts in found.counts.values()],
            "percent": round(100 * train[label] / max(train.max(), 1), 1),
        }
        for label in order
    ]


def _quantiles(sizes: np.ndarray) -> list[dict[str, Any]]:
    if not len(sizes):
        return []
    width, height = sizes.T.astype(float)
    measured = (("width", width, ",.0f"), ("height", height, ",.0f"), ("width by height", width / height, ".2f"))
    return [
        {"name": name, "numbers": [format(value, form) for value in np.quantile(values, _QUANTILES)]}
        for name, values, form in measured
    ]


def _sheets(found: Inspection) -> Iterator[dict[str, Any]]:
    """A picture of some images of each class, evenly from all of them."""
    usable = np.flatnonzero(found.survey.splits != TEST)
    labels = found.survey.labels[usable]
    smallest = np.argsort(np.bincount(labels, minlength=len(found.classes)), kind="stable")[:MAX_SHEETS]
    for label in sorted(smallest.tolist()):
        rows = usable[labels == label]
        chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(SHEET[0] * SHEET[1], len(rows))).astype(int))]
        if len(chosen):
            images = np.stack([_shown(found, row) for row in chosen.tolist()])
            yield {"name": found.classes[label], "source": picture(_sheet(images), "JPEG"), "shown": len(chosen)}


def _sheet(images: np.ndarray) -> np.ndarray:
    """(rows S, columns S, 3) of uint8 (N, S, S, 3), white where there are too few."""
    columns, size = SHEET[1], images.shape[1]
    rows = -(-len(images) // columns)
    cells = np.full((rows * columns, size, size, 3), 255, dtype=np.uint8)
    cells[: len(images)] = images
    return cells.reshape(rows, columns, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(rows * size, columns * size, 3)
