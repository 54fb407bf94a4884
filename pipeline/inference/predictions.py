"""A model applied to files; and the predictions as tables, written completely or not at all, read back and averaged.

A table has one row per image. Columns: `id`, `label` (the class with the highest probability), then one per class,
`p_<class>`, its probability.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.images import BadImage
from pipeline.disk import replacing
from pipeline.errors import DataError, Problem, UserError
from pipeline.inference.classifier import Classifier
from pipeline.inference.inputs import read_inputs

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet")
_PREFIX = "p_"
_ROUNDING = 1e-4  # of each probability: tables rounded to four digits are taken


@dataclass
class FilePredictions:
    """N ids with (N, C) probabilities, the first images, the files that can't be used, and lines on those left out."""

    ids: list[str] = field(default_factory=list)
    probabilities: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    images: np.ndarray = field(default_factory=lambda: np.empty((0, 3, 0, 0), np.uint8))  # the first `keep`
    faults: list[BadImage] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def predict_files(
    classifier: Classifier,
    paths: Sequence[Path],
    method: str,
    keep: int = 0,
    on_progress: Callable[[int], None] = lambda done: None,
) -> FilePredictions:
    """Image files, folders of them and CIFAR's pickles, as `read_inputs` takes them; a fault stops nothing."""
    result, chunks, kept = FilePredictions(), [], []
    for ids, images in read_inputs(paths, classifier.form, result.faults.append, note=result.left_out.append):
        kept.append(images[: max(0, keep - len(result.ids))].numpy().copy())  # a view would keep its whole batch
        chunks.append(classifier.probabilities(images, method))
        result.ids += ids
        on_progress(len(result.ids))
    if chunks:
        result.probabilities, result.images = np.concatenate(chunks), np.concatenate(kept)
    return result


def predictions_table(ids: Sequence[str], probabilities: np.ndarray, classes: Sequence[str]) -> "pd.DataFrame":
    """N ids and (N, C) probabilities as a table."""
    import pandas as pd

    labels = np.array(classes, dtype=object)[probabilities.argmax(axis=1)]
    columns = {f"{_PREFIX}{name}": probabilities[:, i] for i, name in enumerate(classes)}
    return pd.DataFrame({"id": list(ids), "label": labels, **columns})


def check_output(path: Path) -> None:
    """UserError where no table can be written there; to be called before the work is done."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(str(path), f"should end in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise UserError(str(path), "is a folder", "name a file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(str(path), f"there is no folder {folder}", "make it, or write elsewhere")
    if not os.access(folder, os.W_OK):
        raise UserError(str(path), f"{folder} can't be written to", "write elsewhere")


def write_predictions(table: "pd.DataFrame", path: Path) -> None:
    """As CSV or Parquet, by the suffix; a file that is there is replaced at once. UserError if it can't be."""
    try:
        with replacing(path) as new:
            if path.suffix.lower() == ".csv":
                table.to_csv(new, index=False)
            else:
                table.to_parquet(new, index=False)
    except OSError as error:
        raise UserError(str(path), f"can't be written: {error.strerror or error}") from None


def read_predictions(path: Path) -> "pd.DataFrame":
    """A table that `write_predictions` wrote, ids as text; DataError, naming the fault, where it is none."""
    import pandas as pd

    if path.suffix.lower() not in SUFFIXES:
        raise UserError(str(path), f"should end in {' or '.join(SUFFIXES)}")
    try:
        if path.suffix.lower() == ".csv":
            table = pd.read_csv(path, dtype={"id": str, "label": str}, keep_default_na=False)
        else:
            table = pd.read_parquet(path)
            if table[["id", "label"]].isna().any(axis=None):
                raise ValueError("an id or a label is missing")
            table = table.astype({"id": str, "label": str})
        values = _probabilities(table).to_numpy(dtype=np.float64)
    except OSError as error:
        raise DataError(str(path), error.strerror or str(error)) from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:  # pandas' and Arrow's own errors are ValueErrors
        raise DataError(str(path), f"can't be read as predictions: {str(error).splitlines()[0]}") from None
    reason = _why_invalid(table, values)
    if reason:
        raise DataError(str(path), reason)
    return table


def average(tables: Mapping[str, "pd.DataFrame"]) -> "pd.DataFrame":
    """Tables (by name) of the same images and classes -> one of their mean probabilities, in the first one's order.

    DataError, a line for each table whose ids or classes are others.
    """
    (first_name, first), *others = tables.items()
    problems = []
    for name, table in others:
        if list(table.columns) != list(first.columns):
            problems.append(Problem(name, f"its classes are not those of {first_name}, in the same order"))
        elif odd := sorted(set(table["id"]) ^ set(first["id"])):
            rule = f"its ids are not those of {first_name}: {len(odd)} are in one only, as {odd[0]}"
            problems.append(Problem(name, rule))
    if problems:
        raise DataError.many(problems)
    aligned = [_probabilities(table.set_index("id").loc[first["id"]]).to_numpy() for table in tables.values()]
    return predictions_table(list(first["id"]), np.mean(aligned, axis=0), classes_of(first))


def classes_of(table: "pd.DataFrame") -> list[str]:
    """The classes that a table has probabilities of."""
    return [name.removeprefix(_PREFIX) for name in table.columns if name.startswith(_PREFIX)]


def _probabilities(table: "pd.DataFrame") -> "pd.DataFrame":
    return table[[f"{_PREFIX}{name}" for name in classes_of(table)]]


def _why_invalid(table: "pd.DataFrame", values: np.ndarray) -> str | None:
    """Why a table that could be read holds no predictions; None where it does."""
    if list(table.columns[:2]) != ["id", "label"] or values.shape[1] != len(table.columns) - 2 or not values.shape[1]:
        return "its columns should be id, label and p_<class> for each class, as `predict --output` writes them"
    if not len(table):
        return "holds no rows"
    if table["id"].duplicated().any():
        return f"id {table['id'][table['id'].duplicated()].iloc[0]} is there twice"
    is_distribution = (values >= 0).all(axis=1) & (np.abs(values.sum(axis=1) - 1) <= values.shape[1] * _ROUNDING)
    invalid = ~is_distribution  # a row with NaN too
    if invalid.any():
        return f"the probabilities of id {table['id'][invalid].iloc[0]} are not between 0 and 1 with a sum of 1"
    return None
