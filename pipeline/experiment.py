"""One recipe trained, scored and tracked. Exceptions become states here and nowhere else."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pipeline.data.exclusions import excluded_table
from pipeline.data.prepare import TrainingData
from pipeline.errors import path_text
from pipeline.evaluation import figures
from pipeline.evaluation.calibration import fit_calibration
from pipeline.evaluation.constraints import violations
from pipeline.evaluation.latency import latency_ms
from pipeline.evaluation.logits import images_together, predict_logits
from pipeline.evaluation.scores import CLASS_F1, most_confident, per_class_table, reliability, score
from pipeline.inference.classifier import ModelMetadata
from pipeline.inference.methods import measure, methods_table, out_of_fold, views, views_of
from pipeline.models.build import build_network, num_parameters
from pipeline.processes import StopOnSignal
from pipeline.recipe import Recipe
from pipeline.tracking.tracker import Run, RunRequest, State, Tracker
from pipeline.training.checkpoints import save_checkpoint
from pipeline.training.loop import Diverged, EpochReport, Result, normalised_for, train
from pipeline.training.resume import Resume

SCORES_OF_METHODS = ("accuracy", "f1_macro")  # that are logged for each prediction method
DIVERGED = "diverged"  # how the reason of a training that did so begins
MAX_CLASSES_BY_EPOCH = 50  # with more, each class's F1 is logged when the run ends, and not after every epoch
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "unable to find an engine")


class Prune(Exception):
    """Raised by `on_epoch`: the training is not worth continuing. `metrics` are what is known besides its epochs'."""

    def __init__(self, reason: str, metrics: dict[str, float] | None = None):
        super().__init__(reason)
        self.metrics = metrics or {}


class Interrupted(Exception):
    """Raised within a training: the user asked to stop, or what the message says."""


@dataclass(frozen=True, kw_only=True)
class ExperimentRequest(RunRequest):
    """A run whose recipe is to be trained, scored and tracked."""

    device: torch.device
    # Metric -> upper bound; a recipe that is known to break one before it is trained ends PRUNED.
    constraints: Mapping[str, float] = field(default_factory=dict)
    pruned_at_end: str = ""  # the reason with which a short training ends PRUNED after its last epoch
    resume_dir: Path | None = None  # where the training's state is kept, and resumed from where there is one
    on_epoch: Callable[[EpochReport], None] = lambda report: None
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None
    # Asked after each step, and each epoch but the last: the run is INTERRUPTED then.
    stop_requested: Callable[[], bool] = lambda: False
    stop_reason: str = ""  # where it is not the user


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
    notes: tuple[str, ...] = ()  # a line each: where the training resumed, which of its kept state was unusable

    @property
    def is_conclusive(self) -> bool:
        """Whether the recipe's training would end so each time: it finished, or diverged."""
        return self.state is State.FINISHED or (self.state is State.FAILED and self.reason.startswith(DIVERGED))


def run(request: ExperimentRequest, tracker: Tracker) -> Outcome:
    """Train, score and track one recipe. A resumed training's outcome counts the epochs and seconds before, too.

    A training that diverges or needs too much memory ends FAILED, one that `on_epoch` prunes PRUNED, an interrupted one
    INTERRUPTED. Any other exception is a bug, or a tracker that broke: the run ends FAILED, and the exception is raised.
    OwnershipLost is raised too, and the run left as it is. The kept state is removed when the run ends, but stays for one
    that was interrupted or met a bug.
    """
    start = time.perf_counter()
    reports: list[EpochReport] = []
    resume = Resume(request.resume_dir) if request.resume_dir else None
    data, tags = request.data.at(request.recipe.data), replace(request.tags, device=str(request.device))
    request = replace(request, data=data, tags=tags)
    with tracker.run(request) as tracked:

        def on_epoch(report: EpochReport) -> None:
            reports.append(report)
            report = replace(report, metrics=split_metrics(report.metrics, request.data)[0])
            is_last = report.epoch == request.recipe.training.epochs  # then all is done: the run completes
            if not is_last:
                tracked.log_metrics(report.metrics, report.epoch)
            request.on_epoch(report)
            if not is_last:
                _check_stop(request)

        def on_step(epoch: int, step: int, steps: int) -> None:
            request.on_step(epoch, step, steps)
            _check_stop(request)

        state, reason, final_metrics = State.FINISHED, "", {}
        try:
            _check_feasible(request)
            result = train(request.recipe, request.data, request.device, on_epoch, on_step, resume=resume)
            if request.pruned_at_end:
                raise Prune(request.pruned_at_end, _known_after(request, result))
            final_metrics = publish(tracked, request.recipe, request.data, result)
        except Prune as error:
            state, reason, final_metrics = State.PRUNED, str(error), error.metrics
        except (Diverged, MemoryError, RuntimeError) as error:
            state, reason = State.FAILED, why_failed(error)
            if not reason:
                raise
        except (Interrupted, KeyboardInterrupt) as error:
            state, reason = State.INTERRUPTED, str(error) or "stopped by the user"
        if metrics := _metrics_at_the_end(request, reports, state) | final_metrics:
            tracked.log_metrics(metrics, reports[-1].epoch if reports else 1)
        tracked.end(state, reason)

    if request.resume_dir and state is not State.INTERRUPTED:
        shutil.rmtree(request.resume_dir, ignore_errors=True)
    if state is State.FAILED and request.device.type == "cuda":
        torch.cuda.empty_cache()
    history = [*(resume.history if resume else ()), *(report.metrics for report in reports)]
    return Outcome(
        state=state,
        run_key=tracked.key,
        run_id=tracked.id,
        reason=reason,
        metrics=(history[-1] if history else {}) | final_metrics,
        epochs=len(history),
        seconds=time.perf_counter() - start + (resume.seconds if resume else 0),
        notes=tuple(resume.notes) if resume else (),
    )


def why_failed(error: BaseException) -> str:
    """Why a recipe has failed whose training raised this: it diverged or needs too much memory; empty for a bug."""
    if isinstance(error, Diverged):
        return f"{DIVERGED}: {error}"
    return f"out of memory: {error}" if _is_out_of_memory(error) else ""


def run_until_stopped(request: ExperimentRequest, tracker: Tracker) -> Outcome:
    """`run`, which a signal of the user's ends at the next step: Interrupted then."""
    with StopOnSignal() as stop:
        outcome = run(replace(request, stop_requested=lambda: stop.requested), tracker)
    if outcome.state is State.INTERRUPTED:
        raise Interrupted
    return outcome


def _check_stop(request: ExperimentRequest) -> None:
    if request.stop_requested():
        raise Interrupted(request.stop_reason)


def known_before(constraints: Mapping[str, float], recipe: Recipe, data: TrainingData) -> dict[str, float]:
    """Those of the constrained metrics that are known before the recipe is trained, as `publish` measures them."""
    if "model/parameters" not in constraints:
        return {}
    network = build_network(recipe.model, len(data.classes), recipe.data.image_size, recipe.training.seed)
    return {"model/parameters": float(num_parameters(network))}


def _check_feasible(request: ExperimentRequest) -> None:
    metrics = known_before(request.constraints, request.recipe, request.data)
    if broken := violations(request.constraints, metrics):
        raise Prune(f"infeasible, not trained: {broken}", metrics)


def _known_after(request: ExperimentRequest, result: Result) -> dict[str, float]:
    """Those of the constrained metrics that a short training has in common with one in full."""
    if "model/latency_ms" not in request.constraints:
        return {}
    precision = request.recipe.training.precision
    return {"model/latency_ms": latency_ms(result.network, request.data.image_size, precision)}


def split_metrics(metrics: Mapping[str, float], data: TrainingData) -> tuple[dict[str, float], dict[str, float]]:
    """What is logged after each epoch, and what only when the run ends, in whatever state: F1 of many classes."""
    at_the_end = {
        name: value
        for name, value in metrics.items()
        if name.startswith(CLASS_F1) and len(data.classes) > MAX_CLASSES_BY_EPOCH
    }
    return {name: value for name, value in metrics.items() if name not in at_the_end}, at_the_end


def _metrics_at_the_end(request: ExperimentRequest, reports: Sequence[EpochReport], state: State) -> dict[str, float]:
    """Of the newest epoch, what was not logged after it: F1 of many classes, and of the recipe's last epoch everything.

    The model of the last epoch is the one that is published. An interrupted run trains that epoch again, on a GPU to another
    model, and a metric keeps the first value of each step: so nothing of it is logged before the model's files are.
    """
    if not reports:
        return {}
    if reports[-1].epoch < request.recipe.training.epochs:
        return split_metrics(reports[-1].metrics, request.data)[1]
    return {} if state is State.INTERRUPTED else reports[-1].metrics


def publish(
    tracked: Run,
    recipe: Recipe,
    data: TrainingData,
    result: Result,
    method: Literal["single", "mean", "soup"] = "single",
    members: Sequence[ModelMetadata] = (),
) -> dict[str, float]:
    """Score a finished training on the validation split and log the files that explain the scores; returns the scores.

    The scores that the last epoch's report has are not among them. Or an ensemble of trained members, which has no epochs,
    and whose pixel statistics are those of `data`.
    """
    data = data if members else normalised_for(recipe, data)
    labels = data.validation.labels.cpu().numpy()
    logits = _logits_of_views(recipe, data, result)
    probabilities = torch.from_numpy(logits[0]).softmax(1).numpy()
    scores = score(probabilities, labels)
    predicted = out_of_fold(logits, labels)  # by each prediction method
    measured = measure(predicted, labels)
    metadata = ModelMetadata(
        recipe=recipe,
        recipe_digest=recipe.digest(),
        data_digest=data.digest,
        split_digest=data.split_digest,
        classes=data.classes,
        mean=tuple(data.mean.tolist()),
        std=tuple(data.std.tolist()),
        run_id=tracked.id or "",
        calibration=fit_calibration(logits[0], labels),
        measured=measured,
        method=method,
        members=tuple(members),
    )
    metrics = scores.metrics(data.classes) | {
        "calibration/temperature": metadata.calibration.temperature,
        "calibration/ece": measured["plain"].ece,
        "calibration/loss": measured["plain"].loss,
        **{
            f"methods/{score}_{method}": getattr(m, score)
            for method, m in measured.items()
            for score in SCORES_OF_METHODS
        },
        "model/parameters": float(num_parameters(result.network)),
        "model/latency_ms": latency_ms(result.network, data.image_size, recipe.training.precision),
        "time/training_s": result.seconds,
    }
    history = [{"epoch": report.epoch, **report.metrics} for report in result.history]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "artifacts"
        averaged = result.network if result.plain else None
        save_checkpoint(folder, result.plain or result.network, averaged, metadata.as_json())
        per_class_table(scores, data.classes).to_csv(folder / "per_class.csv", index=False)
        methods_table(measured, data.classes).to_csv(folder / "prediction_methods.csv", index=False)
        _write_predictions(folder / "predictions.parquet", data, labels, probabilities)
        if data.listed and data.listed.excluded:
            excluded_table(data.listed.excluded).to_csv(folder / "excluded.csv", index=False)
        images = {
            "confusion_matrix": figures.confusion_matrix_figure(scores, data.classes),
            **(
                {"learning_curves": figures.learning_curves_figure(history, figures.training_terms(recipe))}
                if history
                else {}
            ),
            "reliability": figures.reliability_figure(
                reliability(probabilities, labels),
                reliability(predicted["plain"], labels),
                metadata.calibration.temperature,
            ),
            "most_confident_correct": _gallery(data, labels, probabilities, correct=True),
            "most_confident_wrong": _gallery(data, labels, probabilities, correct=False),
        }
        for image_name, figure in images.items():
            figures.save(figure, folder / f"{image_name}.png")
        tracked.log_files(folder)
    reported = history[-1].keys() if history else ()  # of the same logits: a point is logged once
    return {name: value for name, value in metrics.items() if name not in reported}


def _logits_of_views(recipe: Recipe, data: TrainingData, result: Result) -> np.ndarray:
    """(V, N, C) float64 logits of V views of the validation images; the training gives those of the images themselves."""
    images, precision = data.validation.images, recipe.training.precision
    logits = [
        [
            predict_logits(result.network, view, data.mean, data.std, precision)
            for view in views(some, *views_of(recipe))[1:]
        ]
        for some in images.split(images_together(images.shape[-1]))  # all views of all images would take gigabytes
    ]
    others = [torch.cat(parts) for parts in zip(*logits, strict=True)]
    return torch.stack([result.validation_logits, *others]).double().cpu().numpy()


def _write_predictions(path: Path, data: TrainingData, labels: np.ndarray, probabilities: np.ndarray) -> None:
    """One row per validation image: id (its index in the training part), label, predicted, confidence, probabilities.

    Of images in files also `image`, the path below the data set's root, and `group`, where it has groups.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names: dict[str, list[str]] = {}
    if data.listed:
        validation = data.listed.listing.usable.where(data.validation_ids.numpy())
        names["image"] = list(map(path_text, validation.names))
        if validation.groups is not None:
            names["group"] = list(map(path_text, validation.groups.tolist()))
    table = pa.table(
        {
            "id": pa.array(data.validation_ids.numpy(), pa.int64()),
            "label": pa.array(labels, pa.int32()),
            "predicted": pa.array(probabilities.argmax(1), pa.int32()),
            "confidence": pa.array(probabilities.max(1), pa.float32()),
            "probabilities": pa.array(list(probabilities), pa.list_(pa.float32())),
            **names,
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


def _is_out_of_memory(error: BaseException) -> bool:
    """torch has an exception for it, but its CPU allocator, cuBLAS and cuDNN raise plain RuntimeErrors.

    Where memory ends during a graph capture, the capture raises another error; the cause is then its context.
    """
    by_name = any(text in str(error) for text in OUT_OF_MEMORY)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or by_name:
        return True
    return error.__context__ is not None and _is_out_of_memory(error.__context__)
