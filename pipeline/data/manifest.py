"""A manifest -> a listing: a CSV or Parquet file with a row for each image, whose path is relative to the manifest."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.listing import (
    ORDER,
    SPLITS,
    TRAIN,
    Listing,
    check_classes,
    check_groups,
    check_inside,
    check_names,
    first,
)
from pipeline.errors import DataError, Problem, did_you_mean, first_line
from pipeline.sections.data import COLUMNS

if TYPE_CHECKING:
    import pandas as pd

REQUIRED = ("path", "label")


def read_manifest(place: Path, columns: Mapping[str, str]) -> Listing:
    """The images that the manifest names, in the order of split, class and path, whatever the order of its rows.

    `columns`: what it calls path, label, split and group. DataError where it can't be read, a column is missing or is called
    so but for its case, a row says nothing usable, or a group lies in two splits.
    """
    table, unused = _table(place, columns)
    if problems := list(_problems(place, table, columns)):
        raise DataError.many(first(problems))
    table["split"] = table["split"].str.lower().map(SPLITS) if "split" in table else TRAIN
    counts: dict[str, dict[str, int]] = {TRAIN: {}}
    for split, labels in table.groupby("split", sort=False)["label"]:
        counts[str(split)] = dict(sorted(Counter(labels).items()))
    check_names(place, sorted(set(table["label"])))
    check_classes(
        counts,
        lambda split, name: f"{place.name}, split {split}" + (f", class {name}" if name else ""),
        "name more of them in the column " + columns["label"],
    )
    keys = zip(table["split"].map(ORDER.index), table["label"], table["path"].map(os.path.split), strict=True)
    table = table.iloc[[row for _, row in sorted(zip(keys, range(len(table)), strict=True))]]
    files = [os.path.join(place.parent, path) for path in table["path"]]
    check_inside(place.parent, files)
    classes = tuple(counts[TRAIN])
    listing = Listing(
        place=place,
        classes=classes,
        names=[file.removeprefix(f"{place.parent}{os.sep}") for file in files],
        labels=table["label"].map({name: number for number, name in enumerate(classes)}).to_numpy(np.int64),
        splits=table["split"].to_numpy(str),
        groups=table["group"].to_numpy(str) if "group" in table else None,
        unused=unused,
    )
    check_groups(listing, "put it on one side, or leave out one of the columns split and group")
    return listing


def _table(place: Path, columns: Mapping[str, str]) -> tuple["pd.DataFrame", tuple[str, ...]]:
    """Of text: `path`, `label`, and `split` and `group` where the manifest has them; empty where it says nothing.

    And the names of the other columns.
    """
    import pandas as pd

    try:
        if place.suffix.lower() == ".csv":
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # of cells that no column of the header has
                table = pd.read_csv(place, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
        else:
            table = pd.read_parquet(place)
            table = table if table.index.names == [None] else table.reset_index()
    except OSError as error:
        raise DataError(str(place), error.strerror or first_line(error)) from None
    except pd.errors.ParserWarning:
        rule, remedy = (
            "has rows with more cells than its header",
            "remove commas at their ends, and quote values with commas",
        )
        raise DataError(str(place), rule, remedy) from None
    except Exception as error:  # whatever a parser raises
        rule, remedy = f"can't be read ({first_line(error)})", "write it as CSV in UTF-8, or as Parquet"
        raise DataError(str(place), rule, remedy) from None
    table.columns = table.columns.map(lambda name: str(name).strip())
    _check_header(place, list(table.columns), columns)
    named = {name: table[columns[name]] for name in COLUMNS if columns[name] in table}
    unused = tuple(name for name in table.columns if name not in columns.values() and not name.startswith("Unnamed: "))
    for name, column in named.items():
        if pd.api.types.is_float_dtype(column):
            named[name] = column.convert_dtypes()  # a missing label or group makes floats of whole numbers
    text = {
        name: column.astype(object).where(column.notna(), "").map(str).str.strip() for name, column in named.items()
    }
    text["path"] = text["path"].map(_below(str(place.parent)))
    return pd.DataFrame(text), unused


def _check_header(place: Path, header: list[str], columns: Mapping[str, str]) -> None:
    """DataError where a column is missing, is there twice, or has the name of one that is read but for its case."""
    wanted = [name for name in COLUMNS if name in REQUIRED or columns[name] != name]
    if absent := [columns[name] for name in wanted if columns[name] not in header]:
        renamed = "`--columns path=file,label=species` names those that are called otherwise"
        raise DataError(
            str(place),
            f"has no column {' and '.join(absent)}{did_you_mean(absent[0], header)}; it has {', '.join(header)}",
            renamed if len(header) > 1 else "separate the columns by commas",
        )
    problems = [
        Problem(f"{place}, column {other}", f"would not be used: {name} is read", "rename it")
        for name in columns.values()
        for other in header
        if name not in header and other.lower() == name.lower()
    ]
    problems += [
        Problem(f"{place}, column {name}", f"is there {header.count(name)} times", "remove or rename the others")
        for name in columns.values()
        if header.count(name) > 1
    ]
    if problems:
        raise DataError.many(problems)


def _below(root: str) -> Callable[[str], str]:
    """A row's path -> the one below the root; an absolute one may reach the root by other links than the manifest."""
    real_root = os.path.realpath(root)
    real = cache(os.path.realpath)  # of folders

    def below(path: str) -> str:
        path = path and os.path.normpath(path)
        if not os.path.isabs(path) or path.startswith(os.path.join(root, "")):
            return path.removeprefix(os.path.join(root, ""))
        folder, name = os.path.split(path)
        return os.path.join(real(folder), name).removeprefix(os.path.join(real_root, ""))

    return below


def _problems(place: Path, table: "pd.DataFrame", columns: Mapping[str, str]) -> Iterator[Problem]:
    """Rows that leave a cell empty, name no split, or an image again; they count from 1, without the header."""
    seen: dict[str, int] = {}
    for number, row in enumerate(table.to_dict("records"), 1):
        where = f"{place.name}, row {number}"
        for name, value in row.items():
            if not value:
                yield Problem(where, f"{columns[str(name)]} is empty", "fill it in, or remove the row")
        split = row.get("split")
        if split and split.lower() not in SPLITS:
            rule = f"not one of {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}"
            yield Problem(f"{where}: {columns['split']} = {split}", rule)
        if row["path"] and seen.setdefault(row["path"], number) != number:
            yield Problem(where, f"{row['path']} stands in row {seen[row['path']]}, too", "remove one of them")
