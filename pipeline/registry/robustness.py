"""A run's accuracy on corrupted validation images: measured once, and kept in the run as metrics and a table."""

from collections.abc import Callable

import torch
from filelock import FileLock
from mlflow.entities import Metric

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.evaluation.logits import predict_logits
from pipeline.evaluation.robustness import Robustness, measure_robustness
from pipeline.inference.classifier import Classifier
from pipeline.tracking import queries
from pipeline.tracking.run import now_ms
from pipeline.tracking.tracker import MlflowTracker

FILE = "robustness.csv"


def measure(
    classifier: Classifier, data: TrainingData, on_part: Callable[[int, int], None] = lambda done, parts: None
) -> Robustness:
    """Of the validation images of its data, by its plain predictions; `on_part` as in `measure_robustness`."""
    metadata, device = classifier.metadata, classifier.device
    mean, std = (torch.tensor(values, device=device) for values in (metadata.mean, metadata.std))

    def predict(images: torch.Tensor) -> torch.Tensor:
        return predict_logits(classifier.network, images, mean, std, metadata.recipe.training.precision).argmax(1)

    return measure_robustness(predict, data.validation.images, data.validation.labels, device, on_part)


def keep(tracker: MlflowTracker, run_id: str, measured: Robustness) -> Robustness:
    """Into the run; what it has then, which another command may have measured meanwhile.

    Cut off, it can be repeated: the table comes first, and no metric gets a second point.
    """
    with FileLock(tracker.home / "robustness.lock"):
        kept = stored(tracker, run_id)
        if kept is None:
            tracker.client.log_text(run_id, measured.to_csv(), FILE)
            kept = measured
        data = tracker.client.get_run(run_id).data
        missing = {name: value for name, value in kept.metrics().items() if name not in data.metrics}
        step = int(data.params["training.epochs"])
        tracker.client.log_batch(
            run_id, metrics=[Metric(name, value, now_ms(), step) for name, value in missing.items()]
        )
    return kept


def stored(tracker: MlflowTracker, run_id: str) -> Robustness | None:
    """What a run keeps; None where it was not measured yet, UserError where its table is damaged."""
    content = queries.read_file(tracker, run_id, FILE)
    if content is None:
        return None
    try:
        return Robustness.from_csv(content.decode())
    except ValueError as error:  # UnicodeDecodeError and pandas' own are some
        rule, remedy = (
            f"its {FILE} is damaged ({error})",
            f"remove that artifact, and `robustness {run_id}` measures anew",
        )
        raise UserError(f"run {run_id}", rule, remedy) from None
