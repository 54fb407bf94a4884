"""What only some runs are asked for: their predictions, metric histories and aliases."""

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.tracking.tracker import MlflowTracker

log = logging.getLogger(__name__)


def aliases(tracker: MlflowTracker) -> dict[str, list[str]]:
    """run id -> what the registry calls it, in order: `image-classifier@champion`."""
    client, names_by_run = tracker.client, dict[str, list[str]]()
    for model in client.search_registered_models(max_results=1000):
        for alias, version in model.aliases.items():
            run_id = client.get_model_version(model.name, version).run_id
            names_by_run.setdefault(str(run_id), []).append(f"{model.name}@{alias}")
    return {run_id: sorted(names) for run_id, names in names_by_run.items()}


@dataclass(frozen=True, eq=False)
class Predictions:
    """A run's answers on the validation split."""

    ids: np.ndarray  # (N,) int64, places in the data set's training part
    labels: np.ndarray  # (N,) int
    probabilities: np.ndarray  # (N, C) float
    classes: tuple[str, ...]
    images: Sequence[str] | None = None  # N paths below the data set's root, where it lies in files

    def name(self, index: int) -> str:
        """What one of the images is called."""
        return self.images[index] if self.images else f"no. {self.ids[index]}"

    @property
    def answers(self) -> np.ndarray:
        """(N,) the likeliest class."""
        return self.probabilities.argmax(axis=1)


def predictions(tracker: MlflowTracker, run_id: str) -> Predictions | None:
    """What a finished run stored; None where its file is gone or can't be read."""
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        try:
            stored = pq.read_table(tracker.client.download_artifacts(run_id, "predictions.parquet", folder))
            return Predictions(
                stored["id"].to_numpy().copy(),  # torch wants to be able to write
                stored["label"].to_numpy(),
                np.stack(stored["probabilities"].to_numpy()),
                tuple(json.loads(stored.schema.metadata[b"classes"])),
                stored["image"].to_pylist() if "image" in stored.column_names else None,
            )
        except Exception as error:  # whatever the store or the file's format raises: the page does without
            log.warning("run %s: its predictions can't be read (%s)", run_id, str(error).splitlines()[0][:120])
            return None


def histories(tracker: MlflowTracker, run_ids: Sequence[str], metric: str) -> pd.DataFrame:
    """Columns run_id, epoch (from 1), value: a metric's whole history for some runs, in their order."""
    points = [
        {"run_id": run_id, "epoch": point.step, "value": point.value}
        for run_id in run_ids
        for point in tracker.client.get_metric_history(run_id, metric)
    ]
    frame = pd.DataFrame(points, columns=["run_id", "epoch", "value"])
    return frame.sort_values("epoch", kind="stable").drop_duplicates(["run_id", "epoch"], keep="last")
