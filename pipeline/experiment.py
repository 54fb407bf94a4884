"""One recipe trained, scored and tracked. Exceptions become states here and nowhere else."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pipeline.data.prepare import TrainingData
from pipeline.evaluation import figures
from pipeline.evaluation.latency import latency_ms
from pipeline.evaluation.logits import predict_logits
from pipeline.evaluation.scores import most_confident, per_class_table, reliability, score
from pipeline.inference.classifier import ModelMetadata
from pipeline.inference.methods import fit, measure, methods_table, out_of_fold, views, views_of
from pipeline.models.build import num_parameters
from pipeline.recipe import Recipe
from pipeline.tracking.tracker import Run, State, Tracker
from pipeline.training.checkpoints import save_checkpoint
from pipeline.training.loop import Diverged, EpochReport, Result, train
from pipeline.training.resume import Resume

COMPARED = ("accuracy", "f1_macro")  # of the prediction methods


class Prune(Exception):
    """Raised by `on_epoch`: this training isn't worth going on with."""


class Interrupted(Exception):
    """Raised by `on_step` or `on_epoch`: somebody asked to stop."""


@dataclass(frozen=True)
class Outcome:
    """How an experiment ended. `metrics` are the last epoch's, with the final scores where it finished.

    `run_id` is None where MLflow had not answered by then; `MlflowTracker.id_of` waits for it.
    """

    state: State
    run_key: str
    run_id: str | None
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    epochs: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()  # a line each: what the training went on from, what of its kept state was of no use


def run(
    recipe: Recipe,
    data: TrainingData,
    device: torch.device,
    tracker: Tracker,
    name: str,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None,
    fence: Callable[[], None] = lambda: None,
    resume: Path | None = None,
    key: str | None = None,
) -> Outcome:
    """Train, score and track one recipe; `key` is the tracked run's, where it is to be gone on with.

    The training's state is kept in the folder `resume`, and gone on from where there is one; the outcome counts the epochs
    and seconds before. The folder goes when the run ends, but stays for one that was interrupted or met a bug.
    A diverged or too large one ends FAILED, one that `on_epoch` prunes PRUNED, an interrupted one INTERRUPTED.
    Any other exception is a bug, or a tracker that broke: its run ends FAILED, and it is raised. `fence` is called before
    anything is logged, and raises Lost where the run belongs to another process by now: it is left as it is.
    """
    started = time.perf_counter()
    seen: list[EpochReport] = []
    kept = Resume(resume) if resume else None

    with tracker.run(name, recipe, data, parent, {"device": str(device), **(tags or {})}, key) as opened:
        tracked = _Fenced(opened, fence)

        def record(report: EpochReport) -> None:
            seen.append(report)
            tracked.log_metrics(report.metrics, report.epoch)
            on_epoch(report)

        state, reason, final = State.FINISHED, "", {}
        try:
            result = train(recipe, data, device, record, on_step, resume=kept)
            final = publish(tracked, recipe, data, result)
        except Prune as verdict:
            state, reason = State.PRUNED, str(verdict)
        except Diverged as error:
            state, reason = State.FAILED, f"diverged: {error}"
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            state, reason = State.FAILED, f"out of memory: {error}"
        except (Interrupted, KeyboardInterrupt):
            state, reason = State.INTERRUPTED, "stopped by the user"
        tracked.end(state, reason)

    if resume and state is not State.INTERRUPTED:
        shutil.rmtree(resume, ignore_errors=True)
    if state is State.FAILED and device.type == "cuda":
        torch.cuda.empty_cache()
    history = [*(kept.history if kept else ()), *(report.metrics for report in seen)]
    seconds = time.perf_counter() - started + (kept.seconds if kept else 0)
    last = history[-1] if history else {}
    notes = tuple(kept.notes) if kept else ()
    return Outcome(state, tracked.key, tracked.id, reason, last | final, len(history), seconds, notes)


class _Fenced:
    """A run that asks, before each thing that it logs, whether it still may."""

    def __init__(self, run: Run, fence: Callable[[], None]):
        self._run, self._fence = run, fence

    @property
    def key(self) -> str:
        """See Run."""
        return self._run.key

    @property
    def id(self) -> str | None:
        """See Run."""
        return self._run.id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See Run."""
        self._fence()
        self._run.log_metrics(metrics, step)

    def log_files(self, folder: Path) -> None:
        """See Run."""
        self._fence()
        self._run.log_files(folder)

    def end(self, state: State, reason: str = "") -> None:
        """See Run."""
        self._fence()
        self._run.end(state, reason)


def publish(tracked: Run, recipe: Recipe, data: TrainingData, result: Result) -> dict[str, float]:
    """Score a finished training on the validation split; log the scores and everything that explains them."""
    labels = data.validation.labels.cpu().numpy()
    logits = _logits_of_views(recipe, data, result)
    probabilities = torch.from_numpy(logits[0]).softmax(1).numpy()
    scores = score(probabilities, labels)
    judged = out_of_fold(logits, labels)
    measured = measure(judged, labels)
    facts = ModelMetadata(
        recipe=recipe,
        recipe_digest=recipe.digest(),
        data_digest=data.digest,
        split_digest=data.split_digest,
        classes=data.classes,
        mean=tuple(data.mean.tolist()),
        std=tuple(data.std.tolist()),
        run_id=tracked.id or "",
        fitted=fit(logits[0], labels),
        measured=measured,
    )
    metrics = scores.metrics(data.classes) | {
        "calibration/temperature": facts.fitted.temperature,
        "calibration/ece": measured["plain"].ece,
        "calibration/loss": measured["plain"].loss,
        **{f"methods/{score}_{method}": getattr(m, score) for method, m in measured.items() for score in COMPARED},
        "model/parameters": float(num_parameters(result.network)),
        "model/latency_ms": latency_ms(result.network, data.image_size, recipe.training.precision),
        "time/training_s": result.seconds,
    }
    logged = result.history[-1].metrics  # by the loop, of the same logits: a point is logged once
    tracked.log_metrics({name: value for name, value in metrics.items() if name not in logged}, len(result.history))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "artifacts"
        averaged = result.network if result.plain else None
        save_checkpoint(folder, result.plain or result.network, averaged, facts.as_json())
        per_class_table(scores, data.classes).to_csv(folder / "per_class.csv", index=False)
        methods_table(measured, data.classes).to_csv(folder / "prediction_methods.csv", index=False)
        _write_predictions(folder / "predictions.parquet", data, labels, probabilities)
        history = [{"epoch": report.epoch, **report.metrics} for report in result.history]
        pictures = {
            "confusion_matrix": figures.confusion_matrix_figure(scores, data.classes),
            "learning_curves": figures.learning_curves_figure(history),
            "reliability": figures.reliability_figure(
                reliability(probabilities, labels), reliability(judged["plain"], labels), facts.fitted.temperature
            ),
            "most_confident_correct": _gallery(data, labels, probabilities, correct=True),
            "most_confident_wrong": _gallery(data, labels, probabilities, correct=False),
        }
        for picture, figure in pictures.items():
            figures.save(figure, folder / f"{picture}.png")
        tracked.log_files(folder)
    return {name: value for name, value in metrics.items() if name not in logged}


def _logits_of_views(recipe: Recipe, data: TrainingData, result: Result) -> np.ndarray:
    """(V, N, C) float64 of the validation images; those of the images themselves are there already."""
    others = views(data.validation.images, *views_of(recipe))[1:]
    precision = recipe.training.precision
    logits = [predict_logits(result.network, view, data.mean, data.std, precision) for view in others]
    return torch.stack([result.validation_logits, *logits]).double().cpu().numpy()


def _write_predictions(path: Path, data: TrainingData, labels: np.ndarray, probabilities: np.ndarray) -> None:
    """One row per validation image: id (its place in the training part), label, predicted, confidence, probabilities."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "id": pa.array(data.validation_ids.numpy(), pa.int64()),
            "label": pa.array(labels, pa.int32()),
            "predicted": pa.array(probabilities.argmax(1), pa.int32()),
            "confidence": pa.array(probabilities.max(1), pa.float32()),
            "probabilities": pa.array(list(probabilities), pa.list_(pa.float32())),
        },
        metadata={"classes": json.dumps(data.classes)},
    )
    pq.write_table(table, path)


def _gallery(data: TrainingData, labels: np.ndarray, probabilities: np.ndarray, correct: bool) -> figures.Figure:
    chosen = most_confident(probabilities, labels, correct, 16)
    return figures.gallery_figure(
        data.validation.images[torch.from_numpy(chosen).to(data.validation.images.device)].cpu().numpy(),
        [data.classes[i] for i in labels[chosen]],
        [data.classes[i] for i in probabilities[chosen].argmax(1)],
        list(probabilities[chosen].max(1)),
        f"Most confident {'correct' if correct else 'wrong'} of {len(labels):,} validation images",
    )


def _out_of_memory(error: BaseException) -> bool:
    """torch has an exception for it, but its CPU allocator, cuBLAS and cuDNN raise plain RuntimeErrors.

    So does a capture that it ends: the error that says why is then the one before.
    """
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "unable to find an engine")
    found = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)
    return found or (error.__context__ is not None and _out_of_memory(error.__context__))
