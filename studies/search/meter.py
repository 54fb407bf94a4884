"""What a search spends: trainings, kept in a table so that none is done twice, and their epochs, counted each time."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.data.prepare import TrainingData
from pipeline.recipe import Recipe
from pipeline.training.loop import Diverged, EpochReport, train

KEPT = ("val/accuracy", "val/f1_macro", "val/loss", "train/accuracy", "time/epoch_s")

OnEpoch = Callable[[int, float], None]  # the epoch, from 1, and its score


class Spent(Exception):
    """The search has no epoch left."""


@dataclass
class Curve:
    """What is known of a training: its numbers by epoch, and whether it came to its end."""

    digest: str  # of the whole recipe, seed and length included
    split: str  # digest of the data's split
    epochs: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in KEPT})
    ended: bool = False  # it came to its last epoch, or diverged
    diverged: bool = False
    recipe: dict[str, Any] = field(default_factory=dict)
    finished_at: str = ""


class Trainer:
    """Trains recipes on one data set. A training that `file` (JSON lines) holds is told from there, epoch by epoch.

    With one thread equal recipes give equal weights, bit for bit; so one that was stopped early and is asked for again,
    to go further this time, is trained anew and tells only what is new.
    """

    def __init__(self, data: TrainingData, device: torch.device, file: Path, objective: str):
        self.data, self.device, self.objective = data, device, objective
        self._file = file
        self._curves: dict[tuple[str, str], Curve] = {}
        for curve in _read(file):
            self._curves[curve.digest, curve.split] = curve

    def train(self, recipe: Recipe, on_epoch: OnEpoch = lambda epoch, score: None) -> float:
        """The score after the last epoch. Diverged, or whatever `on_epoch` raises, ends it; what was measured is kept."""
        key = (recipe.digest(), self.data.split_digest)
        known = self._curves.get(key, Curve(*key))
        for epoch, score in enumerate(known.epochs[self.objective], 1):
            on_epoch(epoch, score)
        if not known.ended:
            known = self._train(recipe, Curve(*key, recipe=recipe.model_dump(mode="json")), known, on_epoch)
        if known.diverged:
            raise Diverged(f"as known: after epoch {len(known.epochs[self.objective])}")
        return known.epochs[self.objective][-1]

    def _train(self, recipe: Recipe, new: Curve, known: Curve, on_epoch: OnEpoch) -> Curve:
        def note(report: EpochReport) -> None:
            for name, values in new.epochs.items():
                values.append(report.metrics[name])
            new.ended = report.epoch == recipe.training.epochs
            if report.epoch > len(known.epochs[self.objective]):
                on_epoch(report.epoch, report.metrics[self.objective])

        try:
            train(recipe, self.data, self.device, note)
        except Diverged:
            new.ended = new.diverged = True
        finally:
            if new.ended or len(new.epochs[self.objective]) > len(known.epochs[self.objective]):
                self._keep(new)
        return new

    def _keep(self, curve: Curve) -> None:
        curve.finished_at = time.strftime("%Y-%m-%dT%H:%M:%S")
        self._curves[curve.digest, curve.split] = curve
        with self._file.open("a") as table:
            table.write(json.dumps(asdict(curve)) + "\n")
            table.flush()
            os.fsync(table.fileno())


def _read(file: Path) -> list[Curve]:
    """The curves in a file, which is made where it isn't there, and freed of a line that was being written at a kill."""
    file.touch()
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return [Curve(**json.loads(line)) for line in whole.splitlines()]


class Meter:
    """A trainer that counts epochs, those that the table held too, and ends when `budget` of them are used.

    The epoch in which a training diverges counts as one.
    """

    def __init__(self, trainer: Trainer, budget: int):
        self.trainer, self.budget = trainer, budget
        self.used = 0

    def train(self, recipe: Recipe, on_epoch: OnEpoch = lambda epoch, score: None) -> float:
        """As Trainer.train; Spent where the training can't begin, or not go on."""

        def count(epoch: int, score: float) -> None:
            self.used += 1
            on_epoch(epoch, score)
            if epoch < recipe.training.epochs:
                self._check()

        self._check()
        try:
            return self.trainer.train(recipe, count)
        except Diverged:
            self.used += 1
            raise

    def _check(self) -> None:
        if self.used >= self.budget:
            raise Spent
