"""The images that the best trial or the control has right, and not the other."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from pipeline.data.mapped import MappedImages
from pipeline.errors import UserError
from pipeline.report.control_comparison import Comparison
from pipeline.report.render import picture
from pipeline.report.stored import Predictions
from pipeline.sections.data import FILE_FIELDS, FORM_FIELDS, Data
from pipeline.tracking import queries
from pipeline.tracking.run_data import LocatedData, RunData
from pipeline.tracking.tags import RunTags
from pipeline.tracking.tracker import MlflowTracker

FindData = Callable[[RunData], LocatedData]  # `run_data.find_data`, with where to look

MAX_IMAGES = 12  # of each kind of disagreement
THUMBNAIL = (96, 96)  # pixels at most


def disagreement(tracker: MlflowTracker, comparison: Comparison, find: FindData) -> dict[str, Any]:
    """How many images both, one or none have right, and those that only one has, of which it is surest; {} where they
    can't be compared.
    """
    best, base = comparison.best_predictions, comparison.control_predictions
    if best is None or base is None or comparison.lead is None:
        return {}
    best_right, base_right = best.answers == best.labels, base.answers == base.labels
    images = _images(tracker, comparison.best, best, find)
    runs, shown = {comparison.label: best, "control": base}, {}
    for name, in_group in ((comparison.label, best_right & ~base_right), ("control", base_right & ~best_right)):
        title, indices = f"Right by the {name} alone", np.flatnonzero(in_group)
        confidence = runs[name].probabilities.max(1)[indices]
        shown_indices = indices[np.argsort(-confidence, kind="stable")][:MAX_IMAGES]
        if len(indices):
            pixels = None
            if not isinstance(images, str):
                pixels = images[torch.from_numpy(shown_indices)].permute(0, 2, 3, 1).numpy()
            thumbnails = list(_thumbnails(shown_indices, runs, pixels))
            shown[title] = {"count": len(indices), "thumbnails": thumbnails}
    both, either = int((best_right & base_right).sum()), int((best_right | base_right).sum())
    return {
        "num_images": len(best_right),
        "both": both,
        "neither": len(best_right) - either,
        "images_missing": images if isinstance(images, str) else "",
        "groups": shown,
    }


def _images(
    tracker: MlflowTracker, run: pd.Series, predictions: Predictions, find: FindData
) -> torch.Tensor | MappedImages | str:
    """uint8 (N, 3, S, S) of a run's validation images, in the order of its predictions; or why there are none."""
    run_id = str(run["run_id"])
    try:
        digest = RunTags.of(tracker.client.get_run(run_id)).data_digest
        if digest is None:
            raise KeyError("data_digest")
        fields = {name: run[name] for name in FILE_FIELDS + FORM_FIELDS if pd.notna(run.get(name))}
        about = Data.model_validate({name.removeprefix("data."): value for name, value in fields.items()})
        seen = RunData(f"run {run_id}", about, digest, queries.data_places(tracker, run_id), tracker.home)
        data = find(seen).images
    except (UserError, KeyError, ValueError) as error:
        reason = error.lines[0] if isinstance(error, UserError) else "the run does not say which"
        return f"The images can't be shown, only their names, or numbers in the training part: {reason}."
    return data.train.at(torch.from_numpy(predictions.ids)).images


def _thumbnails(
    indices: np.ndarray, runs: Mapping[str, Predictions], images: np.ndarray | None
) -> Iterator[dict[str, Any]]:
    """Each of the `indices` as a data URL, from uint8 `images` (n, S, S, 3), None without images, and the lines below it."""
    first = next(iter(runs.values()))
    for number, index in enumerate(indices):
        lines = [f"{first.classes[first.labels[index]]} ({first.name(index)})"]
        for label, run in runs.items():
            lines.append(f"{label}: {run.classes[run.answers[index]]} {run.probabilities[index].max():.0%}")
        yield {"source": None if images is None else _thumbnail(images[number]), "lines": lines}


def _thumbnail(image: np.ndarray) -> str:
    small = Image.fromarray(image)
    small.thumbnail(THUMBNAIL)
    return picture(np.asarray(small))
