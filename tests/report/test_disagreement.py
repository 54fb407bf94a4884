"""The images on which the best trial and the control differ are those of the data set, or there are none."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.report.analysis import lead
from pipeline.report.control_comparison import Comparison
from pipeline.report.disagreement import _images, disagreement
from pipeline.report.stored import Predictions, predictions
from pipeline.report.study_page import study_page
from pipeline.report.trials import choose, table
from pipeline.sections.data import Form
from pipeline.tracking.run_data import LocatedData, RunData
from pipeline.tracking.tracker import MlflowTracker
from report.helpers import Store, body, page_of


def test_images_are_the_ones_that_the_caption_says(odd: Path, digits: TrainingData) -> None:
    found = re.findall(r'base64,([^"]+)"><figcaption>.*?\(no\. (\d+)\)', body(odd.read_text()))
    assert len(found) > 3
    places = {int(number): place for place, number in enumerate(digits.validation_ids.tolist())}
    for code, number in found:
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB"))
        assert np.array_equal(image, digits.validation.images[places[int(number)]].permute(1, 2, 0).numpy())


def test_images_of_other_data_are_not_shown_as_those(store: Store) -> None:
    client = MlflowTracker(store.home).client
    tag = client.get_run(store.best).data.tags["data_digest"]
    client.set_tag(store.best, "data_digest", "0" * 64)
    said = body(page_of(store, "odd"))
    client.set_tag(store.best, "data_digest", tag)
    assert "is not in" in said and "The images can&#39;t be shown" in said
    assert "(no. " in said and "data:image/png" not in said


def test_data_that_is_not_there_is_said_and_not_fetched(store: Store, tmp_path: Path) -> None:
    tracker = MlflowTracker(store.home)
    [study] = choose(tracker, ["odd"])
    frame = table(tracker, [study])
    frame["data.dataset"] = "cifar10"
    said = body(study_page(tracker, study, frame, tmp_path, {}))
    assert "The images can&#39;t be shown" in said and "--data-dir" in said
    assert not list(tmp_path.iterdir())


def test_images_are_read_in_the_form_of_the_run(store: Store) -> None:
    """Another one would be decoded for the page alone, for hours where there are many images."""
    tracker = MlflowTracker(store.home)
    [run] = [row for _, row in table(tracker, choose(tracker, ["odd"])).iterrows() if row["run_id"] == store.best]
    changes = {"data.geometry": "random_resized_crop", "data.crop_scale": 0.25}
    seen: list[RunData] = []

    def find(data: RunData) -> LocatedData:
        seen.append(data)
        raise UserError("not needed")

    found = predictions(tracker, store.best)
    assert found and "not needed" in str(_images(tracker, pd.Series({**run, **changes}), found, find))
    assert seen[0].about.form == Form(8, "crop", 16)


def test_the_images_that_are_shown_are_those_of_which_the_right_one_is_surest() -> None:
    """Not those where the wrong one is: the first of these three."""
    labels, sure = np.zeros(3, int), np.array([[0.5, 0.95], [0.9, 0.6], [0.7, 0.6]])
    best, base = (np.stack([of, 1 - of], axis=1) for of in (sure[:, 0], 1 - sure[:, 1]))
    runs = [Predictions(np.arange(3), labels, of, ("cat", "dog")) for of in (best, base)]
    row = pd.Series({"run_id": "r", "objective": "val/accuracy"})
    comparison = Comparison(row, "best", row, *runs, lead(*runs, "val/accuracy"))

    def no_run(run_id: str) -> None:
        raise KeyError(run_id)

    tracker: Any = SimpleNamespace(client=SimpleNamespace(get_run=no_run))
    found = disagreement(tracker, comparison, lambda data: None)  # type: ignore[arg-type, return-value]
    lines = [each["lines"] for each in found["groups"]["Right by the best alone"]["thumbnails"]]
    assert lines[0] == ["cat (no. 1)", "best: cat 90%", "control: dog 60%"]
    assert [line[0] for line in lines] == ["cat (no. 1)", "cat (no. 2)", "cat (no. 0)"]
    runs = [replace(run, images=["a/0.png", "a/1.png", "b/2.png"]) for run in runs]
    named = disagreement(tracker, replace(comparison, best_predictions=runs[0]), lambda data: None)  # type: ignore[arg-type, return-value]
    lines = [each["lines"] for each in named["groups"]["Right by the best alone"]["thumbnails"]]
    assert [line[0] for line in lines] == ["cat (a/1.png)", "cat (b/2.png)", "cat (a/0.png)"]
