"""A run made again from what MLflow holds, and compared with its first time, bit for bit where that can be."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import torch
from mlflow.entities import Run as StoredRun
from safetensors.torch import load

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.errors import NotReproduced, UserError
from pipeline.evaluation.robustness import PREFIX as ROBUSTNESS
from pipeline.experiment import ExperimentRequest, Outcome, Prune
from pipeline.models.build import weights_digest
from pipeline.recipe import Recipe
from pipeline.registry import initial_weights
from pipeline.registry.finals import check_same_data, execution_line, recipe_of
from pipeline.tracking import queries, recovery
from pipeline.tracking.lineage import code, environment, same_code
from pipeline.tracking.run_id import is_run_id, not_a_run
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.checkpoints import PLAIN_WEIGHTS, WEIGHTS
from pipeline.training.execution import executable_on
from pipeline.training.loop import EpochReport
from pipeline.training.placement import use_threads

# Packages whose code computes something of a run; a change of another one changes no bit.
COMPUTING = frozenset({"torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow", "timm"})
# Prefixes of metrics that depend on the machine's load, or were measured later: not on the training alone.
MEASURED = ("time/", "throughput/", "memory/", "system/", "model/latency_ms", ROBUSTNESS)
# Columns of a run's predictions that its training determines: an image's file may have another name by now.
PREDICTED = ("id", "label", "predicted", "confidence", "probabilities")
DEVIATIONS = 3


@dataclass(frozen=True)
class OriginalRun:
    """The run that is to be reproduced, as it was."""

    run: StoredRun
    tags: RunTags
    recipe: Recipe
    epochs: int  # that it had
    state: State

    @property
    def name(self) -> str:
        """For a person."""
        study = f" of {self.tags.study}" if self.tags.study else ""
        return f"{self.run.info.run_name}{study}, run {self.run.info.run_id}"

    @property
    def threads(self) -> int | None:
        """How many torch used on the CPU."""
        match = re.search(r"(\d+) threads", self.tags.hardware or "")
        return int(match[1]) if match else None

    @property
    def device(self) -> str:
        """cpu or cuda; where its tag is gone, cuda if the machine had a GPU."""
        guess = "cuda" if "gpu 0:" in (self.tags.hardware or "") else "cpu"
        return (self.tags.device or guess).partition(":")[0]

    def recipe_on(self, device: torch.device) -> Recipe:
        """Its recipe as the device can execute it; see `executable_on`."""
        return executable_on(self.recipe, device)


@dataclass(frozen=True)
class Difference:
    """Something that is not as it was when the original run was trained."""

    line: str
    matters: bool  # whether it can change the result's bits


@dataclass(frozen=True)
class Comparison:
    """A run and its reproduction: a line for each compared part, and what decides."""

    lines: list[str]
    equal: bool  # every compared bit
    points: float  # by which validation accuracy differs
    tolerance: float  # points


def find_original(tracker: MlflowTracker, run_id: str) -> OriginalRun:
    """The run of this id; UserError where there is none, or nothing of it that can be compared."""
    subject = f"run {run_id}"
    if not is_run_id(run_id):
        raise not_a_run(subject)
    run = tracker.store.run(run_id)
    if run is None:
        raise UserError(subject, "no such run in the tracking store", "`ui` shows those there are")
    tags = RunTags.of(run)
    if tags.role == "ensemble":
        again = f"`ensemble --runs '{' '.join(tags.members or ())}' --method {tags.method}` combines them"
        remedy = f"`reproduce` repeats each of them, {again}"
        raise UserError(subject, "an ensemble, which is made of other runs without a training", remedy)
    if tags.recipe_digest is None:
        raise UserError(subject, "a study's own run, or no run of this pipeline", "its trials can be reproduced")
    if tags.state is None:
        raise UserError(subject, "has not ended", "reproduce it when it has")
    epochs = len(tracker.client.get_metric_history(run_id, "val/accuracy"))
    if not epochs:
        raise UserError(subject, f"{tags.state} before its first epoch ended; there is nothing to compare")
    return OriginalRun(run, tags, recipe_of(tracker, run), epochs, tags.state)


def differences(tracker: MlflowTracker, original: OriginalRun, device: torch.device) -> list[Difference]:
    """What differs from then, but for the number of threads: code, weights, Python, packages, machine, device, execution."""
    return [
        *_code_differences(tracker, original),
        *_weights_differences(original),
        *_environment_differences(tracker, original, device),
        *_device_differences(original, device),
    ]


def _code_differences(tracker: MlflowTracker, original: OriginalRun) -> Iterator[Difference]:
    run_id, current = original.run.info.run_id, code()
    commit, patch = original.tags.commit or "none", queries.read_file(tracker, run_id, "diff.patch") or b""
    if commit != current.commit:
        same = bool(re.fullmatch(r"[0-9a-f]+", commit)) and same_code(commit, patch)
        unchanged = ", the folder pipeline is the same" if same else ""
        yield Difference(f"commit: {commit} then, {current.commit} now{unchanged}", not same)
    if patch != current.diff:
        old, new = (f"{len(text.splitlines())} lines" if text else "none" for text in (patch, current.diff))
        source = f" (diff.patch of run {run_id} has it)" if patch else ""
        yield Difference(f"uncommitted difference: {old} then{source}, {new} now", True)


def _weights_differences(original: OriginalRun) -> Iterator[Difference]:
    then, now = original.tags.weights_sha256, weights_digest(original.recipe)
    if then and then != now:
        yield Difference(f"weights: SHA-256 {then[:16]}... then, {str(now)[:16]}... now", True)


def _environment_differences(
    tracker: MlflowTracker, original: OriginalRun, device: torch.device
) -> Iterator[Difference]:
    old = _parse_environment((queries.read_file(tracker, original.run.info.run_id, "environment.txt") or b"").decode())
    new = _parse_environment(environment())
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            matters = name in {*COMPUTING, "python", "platform", "processor"} or name.startswith("variable ")
            matters |= name.startswith("gpu") and device.type == "cuda"
            yield Difference(f"{name}: {old.get(name, 'none')} then, {new.get(name, 'none')} now", matters)


def _device_differences(original: OriginalRun, device: torch.device) -> Iterator[Difference]:
    recipe = original.recipe_on(device)
    if original.device != device.type:
        yield Difference(f"device: {original.device} then, {device.type} now", True)
    elif device.type == "cuda" and not original.recipe.training.deterministic:
        yield Difference("a GPU adds in any order unless training.deterministic is set, which it was not", True)
    if recipe != original.recipe:
        yield Difference(execution_line(original.recipe, recipe, device), True)


def reproduce(
    tracker: MlflowTracker,
    original: OriginalRun,
    data: TrainingData,
    device: torch.device,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
) -> Outcome:
    """Train the run again, as many epochs as it had, with its number of threads, under a run of its own.

    The reproduction has the role `reproduction` and the tag `reproduces`: it is no trial, and no candidate for anything.
    Raises Interrupted where the user asks to stop, DataError where the data is not what it was.
    """
    check_same_data(original.name, original.tags, data)
    initial_weights.restore(tracker, original.run.info.run_id, original.recipe)
    recovery.close_abandoned_runs(tracker, original.run.info.experiment_id)

    def after_epoch(report: EpochReport) -> None:
        on_epoch(report)
        if report.epoch == original.epochs and original.state is not State.FINISHED:
            raise Prune(f"the run that is reproduced ended {original.state} after epoch {original.epochs}")

    tags = RunTags(
        role="reproduction",
        reproduces=original.run.info.run_id,
        study=original.tags.study,
    )
    with use_threads(original.threads if device.type == "cpu" else None):
        request = ExperimentRequest(
            recipe=original.recipe_on(device),
            data=data,
            device=device,
            name=f"reproduction of {original.run.info.run_name}",
            parent_run=original.tags.parent_run,
            tags=tags,
            on_epoch=after_epoch,
        )
        return experiment.run_until_stopped(request, tracker)


def default_tolerance(original: OriginalRun, num_validation: int) -> float:
    """Points of validation accuracy by which a run may differ whose bits can't be the same.

    Rounding differs at first, and training amplifies it until the two are as far apart as two seeds. Those disagree on
    about as many of the n images as a run of accuracy p gets wrong, n (1 - p), either way at random, which gives their
    difference a standard deviation of sqrt((1 - p) / n); DEVIATIONS of it are allowed. At 94 % and n = 5,000 that is
    1.0 point. The formula gives 0.24 points for n = 10,000; from seed to seed 0.145 were measured with 200 seeds, so
    0.205 for a difference of two.
    """
    wrong = max(1 - original.run.data.metrics["val/accuracy"], 1 / num_validation)
    return 100 * DEVIATIONS * math.sqrt(wrong / num_validation)


def conclude(
    tracker: MlflowTracker,
    original: OriginalRun,
    outcome: Outcome,
    changes: list[Difference],
    num_validation: int,
    tolerance: float | None,
) -> list[str]:
    """Lines that compare a run with its reproduction, the verdict last, which becomes a tag of the reproduction.

    `tolerance` in points; None: see `default_tolerance`. NotReproduced where it failed, or differs more than it may.
    """
    run_id = tracker.id_of(outcome.run_key)
    try:
        if outcome.state is State.FAILED:
            rule = f"the run {original.state}, its reproduction failed ({outcome.reason})"
            raise NotReproduced("not reproduced", rule)
        comparison = compare(tracker, original, run_id, num_validation, tolerance)
        verdict = summarise(comparison, changes)
    except NotReproduced as error:
        tracker.store.set_tags(run_id, RunTags(reproduced=error.lines[0]))
        raise
    tracker.store.set_tags(run_id, RunTags(reproduced=verdict))
    return [*comparison.lines, verdict]


def compare(
    tracker: MlflowTracker, original: OriginalRun, run_id: str, num_validation: int, tolerance: float | None
) -> Comparison:
    """Weights, every epoch's metrics and predictions of a run and its reproduction; `tolerance` in points."""
    old, new = original.run.info.run_id, run_id
    lines, equal = [], []
    if original.state is State.FINISHED:
        for part in (_weights, _predictions):
            line, same = part(tracker, old, new)
            lines.append(line)
            equal.append(same)
    then, now = _metrics(tracker, old), _metrics(tracker, new)
    points = sorted(then)  # another version of this project may log others too
    differing = [point for point in points if then.get(point) != now.get(point)]
    line = f"metrics: {len(points)} numbers of {original.epochs} epochs, {len(points) - len(differing)} equal"
    if differing:
        step, name = differing[0]
        first = " then, ".join(str(values.get(differing[0], "none")) for values in (then, now))
        line += f"; the first that differs: {name} after epoch {step}, {first} now"
    last = (original.epochs, "val/accuracy")
    gap = 100 * abs(then[last] - now.get(last, -math.inf))
    lines += [
        line,
        f"val/accuracy after epoch {original.epochs}: {then[last]:.4f} then, {now.get(last, math.nan):.4f} now",
    ]
    allowed = default_tolerance(original, num_validation) if tolerance is None else tolerance
    return Comparison(lines, not differing and all(equal), gap, allowed)


def summarise(comparison: Comparison, changes: list[Difference]) -> str:
    """A line that says how far the run was reproduced; NotReproduced where it differs more than it may."""
    causes = [difference.line.partition(":")[0] for difference in changes if difference.matters]
    if comparison.equal:
        return "reproduced bit for bit"
    gap = f"val/accuracy differs by {comparison.points:.2f} points"
    if not causes:
        reason = "code, versions, processor and threads are the same, so every bit must be"
        raise NotReproduced("not reproduced", f"{reason}; {gap}", details=comparison.lines)
    if comparison.points > comparison.tolerance:
        rule = f"{gap}, more than the tolerance of {comparison.tolerance:.2f}"
        raise NotReproduced("not reproduced", rule, details=comparison.lines)
    return (
        f"reproduced within the tolerance: {gap}, {comparison.tolerance:.2f} is allowed; equal bits can't be expected: "
        f"{', '.join(causes)}"
    )


def _parse_environment(text: str) -> dict[str, str]:
    """environment.txt as name -> value, without the number of threads."""
    values = {}
    for line in text.splitlines():
        if line.startswith("# python "):
            values["python"] = line.removeprefix("# python ")
        elif line.startswith("# cpu: "):
            values["processor"] = re.sub(r", \d+ threads$", "", line.removeprefix("# cpu: "))
        elif gpu := re.match(r"# (gpu \d+): (.*)", line):
            values[gpu[1]] = gpu[2]
        elif line.startswith("# variable "):
            name, _, value = line.removeprefix("# ").partition("=")
            values[name] = value
        elif line.startswith("# "):
            values["platform"] = line.removeprefix("# ")
        elif "==" in line:
            name, _, version = line.partition("==")
            values[name.lower().replace("_", "-")] = version
    return values


def _metrics(tracker: MlflowTracker, run_id: str) -> dict[tuple[int, str], float]:
    """(epoch, name) -> value of all that the training alone decides.

    What is not measured at each epoch counts at the last one: F1 of many classes is also logged where a run is interrupted.
    """
    names = [name for name in tracker.client.get_run(run_id).data.metrics if not name.startswith(MEASURED)]
    histories = {name: tracker.client.get_metric_history(run_id, name) for name in names}
    epochs = max((len(points) for points in histories.values()), default=0)
    return {
        (point.step, name): point.value
        for name, points in histories.items()
        for point in (points if len(points) == epochs else points[-1:])
    }


def _weights(tracker: MlflowTracker, old: str, new: str) -> tuple[str, bool]:
    lines, equal = [], True
    for name in (WEIGHTS, PLAIN_WEIGHTS):
        then, now = (queries.read_file(tracker, run_id, name) for run_id in (old, new))
        if name == WEIGHTS and then is None:
            raise UserError(f"run {old}", f"its {WEIGHTS} is gone; there is nothing to compare")
        if then is None and now is None:
            continue
        shas = [hashlib.sha256(content or b"").hexdigest()[:16] for content in (then, now)]
        if then == now:
            lines.append(f"{name}: equal, SHA-256 {shas[0]}...")
            continue
        equal = False
        apart = f", by up to {_largest_gap(load(then), load(now)):.2g}" if then and now else ""
        lines.append(f"{name}: differs{apart}, SHA-256 {shas[0]}... then, {shas[1]}... now")
    return "; ".join(lines), equal


def _largest_gap(then: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> float:
    return max(
        (float((then[name].double() - now[name].double()).abs().max()) for name in then.keys() & now), default=0.0
    )


def _predictions(tracker: MlflowTracker, old: str, new: str) -> tuple[str, bool]:
    tables = []
    for run_id in (old, new):
        content = queries.read_file(tracker, run_id, "predictions.parquet")
        if content is None:
            raise UserError(f"run {run_id}", "its predictions.parquet is gone; there is nothing to compare")
        tables.append(pq.read_table(pyarrow.BufferReader(content), columns=[*PREDICTED]))
    then, now = tables
    count = f"{len(then):,} images"
    if then.equals(now):
        return f"predictions: those of all {count} equal", True
    if not then["id"].equals(now["id"]):
        return f"predictions: of other images ({count} then, {len(now):,} now)", False
    labels = [table["predicted"].to_numpy() for table in tables]
    rows = [np.stack(table["probabilities"].to_numpy()) for table in tables]
    changed, gap = int((labels[0] != labels[1]).sum()), float(np.abs(rows[0] - rows[1]).max())
    return f"predictions: another class for {changed:,} of {count}, probabilities differ by up to {gap:.2g}", False


def thread_line(original: OriginalRun, device: torch.device) -> str | None:
    """How many threads are used, where the default is another number. They are set as then, so they are no difference."""
    default = torch.get_num_threads()
    if device.type != "cpu" or original.threads in (None, default):
        return None
    return f"threads: {original.threads} then, {default} here by default; trains with {original.threads}"
