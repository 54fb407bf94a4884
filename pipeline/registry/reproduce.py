"""A run made again from what MLflow holds, and compared with its first time, bit for bit where that can be."""

import contextlib
import hashlib
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from mlflow.entities import Run as StoredRun
from mlflow.exceptions import MlflowException
from safetensors.torch import load

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.errors import NotReproduced, UserError
from pipeline.experiment import ExperimentRequest, Interrupted, Outcome, Prune
from pipeline.processes import StopOnSignal, this_process
from pipeline.recipe import Recipe
from pipeline.registry.finals import check_same_data, recipe_of
from pipeline.tracking.lineage import code, environment, same_code
from pipeline.tracking.tags import RunTags
from pipeline.tracking.tracker import MlflowTracker, State
from pipeline.training.checkpoints import PLAIN_WEIGHTS, WEIGHTS
from pipeline.training.loop import EpochReport

# Packages whose code computes something of a run; a change of another one changes no bit.
COMPUTING = frozenset({"torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow"})
# What the machine does meanwhile, and not the training.
MEASURED = ("time/", "throughput/", "memory/", "system/", "model/latency_ms")
DEVIATIONS = 3


@dataclass(frozen=True)
class Past:
    """A run as it was."""

    run: StoredRun
    recipe: Recipe
    epochs: int  # that it had

    @property
    def name(self) -> str:
        """For a person."""
        study = self.run.data.tags.get("study")
        return f"{self.run.info.run_name}{f' of {study}' if study else ''}, run {self.run.info.run_id}"

    @property
    def state(self) -> str:
        """finished, pruned, failed or interrupted."""
        return self.run.data.tags["state"]

    @property
    def threads(self) -> int | None:
        """That torch used on the CPU."""
        found = re.search(r"(\d+) threads", self.run.data.tags.get("hardware", ""))
        return int(found[1]) if found else None

    @property
    def device(self) -> str:
        """cpu or cuda. Runs older than the tag took a GPU where there was one."""
        guess = "cuda" if "gpu 0:" in self.run.data.tags.get("hardware", "") else "cpu"
        return self.run.data.tags.get("device", guess).partition(":")[0]


@dataclass(frozen=True)
class Difference:
    """Something that is not as it was."""

    line: str
    matters: bool  # whether other bits are to be expected of it


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side: a line for each part, and what decides."""

    lines: list[str]
    equal: bool  # every compared bit
    points: float  # by which validation accuracy differs
    tolerance: float  # points


def find_past(tracker: MlflowTracker, run_id: str) -> Past:
    """The run of this id; UserError where there is none, or nothing of it that can be compared."""
    if not re.fullmatch(r"[0-9a-f]{32}", run_id):
        raise UserError(f"RUN {run_id}: must be a run's id, 32 of 0-9a-f; make ui shows them")
    try:
        run = tracker.client.get_run(run_id)
    except MlflowException:
        raise UserError(f"RUN {run_id}: no such run in the tracking store; make ui shows those there are") from None
    tags = run.data.tags
    if "recipe_digest" not in tags:
        raise UserError(f"RUN {run_id}: a whole study, or no run of this pipeline; its trials can be reproduced")
    if "state" not in tags:
        raise UserError(f"RUN {run_id}: has not ended; reproduce it when it has")
    epochs = len(tracker.client.get_metric_history(run_id, "val/accuracy"))
    if not epochs:
        raise UserError(f"RUN {run_id}: {tags['state']} before its first epoch ended; there is nothing to compare")
    return Past(run, recipe_of(tracker, run), epochs)


def differences(tracker: MlflowTracker, past: Past, device: torch.device) -> list[Difference]:
    """What differs from then, but for the number of threads: code, Python, packages, machine, device."""
    run_id, tags = past.run.info.run_id, past.run.data.tags
    commit, patch = tags.get("mlflow.source.git.commit", "none"), tracker.read_file(run_id, "diff.patch") or b""
    found = []
    same = bool(re.fullmatch(r"[0-9a-f]+", commit)) and same_code(commit, patch)
    unchanged = ", the folder pipeline is the same" if same else ""
    if commit != code().commit:
        found.append(Difference(f"commit: {commit} then, {code().commit} now{unchanged}", not same))
    if patch != code().diff:
        then, now = (f"{len(text.splitlines())} lines" if text else "none" for text in (patch, code().diff))
        where = f" (diff.patch of run {run_id} has it)" if patch else ""
        found.append(Difference(f"uncommitted difference: {then} then{where}, {now} now", True))
    old = _facts((tracker.read_file(run_id, "environment.txt") or b"").decode())
    new = _facts(environment())
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            matters = name in {*COMPUTING, "python", "platform", "processor"} or name.startswith("variable ")
            matters |= name.startswith("gpu") and device.type == "cuda"
            found.append(Difference(f"{name}: {old.get(name, 'none')} then, {new.get(name, 'none')} now", matters))
    if past.device != device.type:
        found.append(Difference(f"device: {past.device} then, {device.type} now", True))
    elif device.type == "cuda" and not past.recipe.training.deterministic:
        found.append(Difference("a GPU adds in any order unless training.deterministic is set, which it was not", True))
    return found


def reproduce(
    tracker: MlflowTracker,
    past: Past,
    data: TrainingData,
    device: torch.device,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
) -> Outcome:
    """Train the run again, as many epochs as it had, with its number of threads; tracked beside it.

    The reproduction has the role `reproduction` and the tag `reproduces`: it is no trial, and no candidate for anything.
    Raises Interrupted where somebody asks to stop, DataError where the data is not what it was.
    """
    tags = past.run.data.tags
    check_same_data(past.name, tags, data)
    tracker.close_gone(past.run.info.experiment_id)

    def check(*progress: object) -> None:
        if stop.requested:
            raise Interrupted

    def after_epoch(report: EpochReport) -> None:
        on_epoch(report)
        check()
        if report.epoch == past.epochs and past.state != State.FINISHED:
            raise Prune(f"the run that is reproduced ended {past.state} after epoch {past.epochs}")

    with StopOnSignal() as stop, threads(past.threads if device.type == "cpu" else None):
        request = ExperimentRequest(
            recipe=past.recipe,
            data=data,
            device=device,
            name=f"reproduction of {past.run.info.run_name}",
            parent_run=tags.get("mlflow.parentRunId"),
            tags=RunTags(
                role="reproduction",
                reproduces=past.run.info.run_id,
                worker=this_process(),
                study=tags.get("study"),
            ),
            on_epoch=after_epoch,
            on_step=check,
        )
        outcome = experiment.run(request, tracker)
    if outcome.state is State.INTERRUPTED:
        raise Interrupted
    return outcome


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """torch computes with so many while it is open; equal bits as with OMP_NUM_THREADS from the start (measured)."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_tolerance(past: Past, num_validation: int) -> float:
    """Points of validation accuracy by which a run may differ whose bits can't be the same.

    Rounding differs at first, and training amplifies it until the two are as far apart as two seeds. Those disagree on
    about as many of the n images as a run of accuracy p gets wrong, n (1 - p), either way by a coin, which gives their
    difference a standard deviation of sqrt((1 - p) / n); DEVIATIONS of it are let pass. At 94 % and n = 5,000 that is
    1.0 point. The formula gives 0.24 points for n = 10,000; from seed to seed 0.145 were measured with 200 seeds, so
    0.205 for a difference of two.
    """
    wrong = max(1 - past.run.data.metrics["val/accuracy"], 1 / num_validation)
    return 100 * DEVIATIONS * math.sqrt(wrong / num_validation)


def compare(
    tracker: MlflowTracker, past: Past, run_id: str, num_validation: int, tolerance: float | None
) -> Comparison:
    """Weights, every epoch's metrics and predictions of a run and its reproduction; `tolerance` in points."""
    old, new = past.run.info.run_id, run_id
    lines, equal = [], []
    if past.state == State.FINISHED:
        for part in (_weights, _predictions):
            line, same = part(tracker, old, new)
            lines.append(line)
            equal.append(same)
    then, now = _metrics(tracker, old), _metrics(tracker, new)
    places = sorted(then.keys() | now.keys())
    other = [place for place in places if then.get(place) != now.get(place)]
    line = f"metrics: {len(places)} numbers of {past.epochs} epochs, {len(places) - len(other)} equal"
    if other:
        step, name = other[0]
        first = " then, ".join(str(side.get(other[0], "none")) for side in (then, now))
        line += f"; the first that differs: {name} after epoch {step}, {first} now"
    last = (past.epochs, "val/accuracy")
    points = 100 * abs(then[last] - now.get(last, -math.inf))
    lines += [line, f"val/accuracy after epoch {past.epochs}: {then[last]:.4f} then, {now.get(last, math.nan):.4f} now"]
    allowed = default_tolerance(past, num_validation) if tolerance is None else tolerance
    return Comparison(lines, not other and all(equal), points, allowed)


def verdict(comparison: Comparison, found: list[Difference]) -> str:
    """A line that says how far the run was reproduced; NotReproduced where it differs more than it may."""
    causes = [difference.line.partition(":")[0] for difference in found if difference.matters]
    if comparison.equal:
        return "reproduced bit for bit"
    gap = f"val/accuracy differs by {comparison.points:.2f} points"
    details = [f"  {line}" for line in comparison.lines]
    if not causes:
        reason = "code, versions, processor and threads are the same, so every bit must be"
        raise NotReproduced([f"not reproduced: {reason}; {gap}", *details])
    if comparison.points > comparison.tolerance:
        raise NotReproduced([f"not reproduced: {gap}, more than the tolerance of {comparison.tolerance:.2f}", *details])
    return (
        f"reproduced within the tolerance: {gap}, {comparison.tolerance:.2f} may be; equal bits can't be expected: "
        f"{', '.join(causes)}"
    )


def _facts(text: str) -> dict[str, str]:
    """environment.txt by name; the threads are a matter of their own."""
    facts = {}
    for line in text.splitlines():
        if line.startswith("# python "):
            facts["python"] = line.removeprefix("# python ")
        elif line.startswith("# cpu: "):
            facts["processor"] = re.sub(r", \d+ threads$", "", line.removeprefix("# cpu: "))
        elif gpu := re.match(r"# (gpu \d+): (.*)", line):
            facts[gpu[1]] = gpu[2]
        elif line.startswith("# variable "):
            name, _, value = line.removeprefix("# ").partition("=")
            facts[name] = value
        elif line.startswith("# "):
            facts["platform"] = line.removeprefix("# ")
        elif "==" in line:
            name, _, version = line.partition("==")
            facts[name.lower().replace("_", "-")] = version
    return facts


def _metrics(tracker: MlflowTracker, run_id: str) -> dict[tuple[int, str], float]:
    """(epoch, name) -> value of all that the training alone decides."""
    names = [name for name in tracker.client.get_run(run_id).data.metrics if not name.startswith(MEASURED)]
    histories = {name: tracker.client.get_metric_history(run_id, name) for name in names}
    return {(point.step, name): point.value for name, points in histories.items() for point in points}


def _weights(tracker: MlflowTracker, old: str, new: str) -> tuple[str, bool]:
    lines, equal = [], True
    for name in (WEIGHTS, PLAIN_WEIGHTS):
        then, now = (tracker.read_file(run_id, name) for run_id in (old, new))
        if name == WEIGHTS and then is None:
            raise UserError(f"run {old}: its {WEIGHTS} is gone; there is nothing to compare")
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
        content = tracker.read_file(run_id, "predictions.parquet")
        if content is None:
            raise UserError(f"run {run_id}: its predictions.parquet is gone; there is nothing to compare")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "table").write_bytes(content)
            tables.append(pq.read_table(Path(folder) / "table"))
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


def thread_line(past: Past, device: torch.device) -> str | None:
    """What is said about threads: they are set to then's, so they are no difference."""
    here = torch.get_num_threads()
    if device.type != "cpu" or past.threads in (None, here):
        return None
    return f"threads: {past.threads} then, {here} here by default; trains with {past.threads}"


def remember(tracker: MlflowTracker, run_id: str, said: str) -> None:
    """The verdict as a tag of the reproduction."""
    tracker.client.set_tag(run_id, "reproduced", said)
