"""Whole learning curves of random recipes of a study, kept as a table, so that ways of pruning can be replayed on them."""

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from pipeline.data.prepare import TrainingData
from pipeline.errors import DataError, UserError
from pipeline.recipe import Recipe
from pipeline.search.study import Search
from pipeline.training.loop import Diverged, EpochReport, train

COLUMNS = ("recipe", "epoch", "score_plain", "score_averaged", "digest", "params")
NO_SCORE = math.nan  # from where a recipe diverged


@dataclass(frozen=True)
class Curve:
    """One recipe's validation scores by epoch, of the trained and of the averaged weights; NaN once it had diverged."""

    recipe: int
    digest: str  # of the whole recipe
    params: dict[str, Any]
    plain: list[float]
    averaged: list[float]


def averaging(search: Search, data: TrainingData) -> Search:
    """The same search with all recipes averaging their weights: over half an epoch, where its base doesn't average.

    Half an epoch is long beside the noise from batch to batch, and short beside the schedule: an average over more
    would lag behind weights that still move, most of all in the first epochs, where a pruner decides.
    """
    steps = max(4, len(data.train.labels) // search.base.training.batch_size)
    decay = search.base.training.ema_decay or 1 - 2 / steps
    return replace(search, settings={**search.settings, "training.ema_decay": decay})


def draw(search: Search, count: int) -> list[dict[str, Any]]:
    """The parameters of `count` recipes: the control, then random ones; more begin with those of fewer."""
    sampler = optuna.samplers.RandomSampler(seed=search.base.training.seed)
    study = optuna.create_study(sampler=sampler)
    drawn = [search.control()]
    while len(drawn) < count:
        trial = study.ask()
        search.ask(trial)
        drawn.append(trial.params)
    return drawn


def check_length(search: Search) -> None:
    """UserError where the space asks for the number of epochs."""
    if "training.epochs" in search.space():
        raise UserError("the study asks for training.epochs, but curves need one length: --epochs N gives all the same")


def collect(
    search: Search,
    data: TrainingData,
    device: torch.device,
    file: Path,
    count: int,
    on_epoch: Callable[[int, EpochReport], None] = lambda recipe, report: None,
) -> Iterator[Curve]:
    """Train `count` recipes of a search to the end, each that `file` does not hold yet; yields each as it is written.

    A recipe is written whole, when it is done. Raises UserError where the space asks for the number of epochs, as
    curves need one length, and where the file holds other recipes.
    """
    check_length(search)
    drawn = draw(search, count)
    recipes = [search.recipe(params) for params in drawn]
    done = _begun(file, recipes)
    with file.open("a", encoding="utf-8", newline="") as table:
        for number in range(done, count):
            curve = _train(number, recipes[number], drawn[number], search.study.objective, data, device, on_epoch)
            table.write(_rows(curve))
            table.flush()
            os.fsync(table.fileno())
            yield curve


def load_curves(file: Path) -> list[Curve]:
    """The whole curves in a table that `collect` wrote, without a torn end; DataError where it is none."""
    curves, _ = _read(file)
    if len(curves) < 2:
        raise DataError(f"{file}: {len(curves)} whole learning curves; a replay needs at least 2")
    return curves


def scores(curves: list[Curve], which: str) -> np.ndarray:
    """(num_recipes, num_epochs) float64 of the "plain" or the "averaged" weights."""
    return np.array([getattr(curve, which) for curve in curves])


def _train(
    number: int,
    recipe: Recipe,
    params: dict[str, Any],
    objective: str,
    data: TrainingData,
    device: torch.device,
    on_epoch: Callable[[int, EpochReport], None],
) -> Curve:
    plain, averaged = [NO_SCORE] * recipe.training.epochs, [NO_SCORE] * recipe.training.epochs

    def note(report: EpochReport) -> None:
        averaged[report.epoch - 1] = report.metrics[objective]
        plain[report.epoch - 1] = report.metrics[objective.replace("val/", "plain/")]
        on_epoch(number, report)

    with contextlib.suppress(Diverged):  # a curve that ends early, as a search meets it
        train(recipe, data, device, note, score_plain=True)
    return Curve(number, recipe.digest(), params, plain, averaged)


def _rows(curve: Curve) -> str:
    """A line for each epoch; digest and parameters stand in the first."""
    text = io.StringIO()
    about = [curve.digest, json.dumps(curve.params, separators=(",", ":"))]
    for epoch, pair in enumerate(zip(curve.plain, curve.averaged, strict=True), 1):
        cells = ["" if math.isnan(score) else f"{score:.6g}" for score in pair]
        csv.writer(text, lineterminator="\n").writerow([curve.recipe, epoch, *cells, *about])
        about = ["", ""]
    return text.getvalue()


def _parse(text: str, epochs: int | None = None) -> tuple[list[Curve], int]:
    """The whole curves of a table, and how many characters hold them; ValueError where it is no such table.

    What comes after the last whole curve was being written when the command ended. `epochs` is the length of a curve,
    without it that of the longest.
    """
    header = ",".join(COLUMNS) + "\n"
    if not text.startswith(header):
        raise ValueError(f"its first line is not {header.strip()}")
    lines = [line for line in text[len(header) :].splitlines(keepends=True) if line.endswith("\n")]
    rows = list(csv.reader(lines))
    epochs = epochs or max((int(row[1]) for row in rows), default=1)
    curves = []
    for number in range(len(rows) // epochs):
        block = rows[number * epochs : (number + 1) * epochs]
        if [row[:2] for row in block] != [[str(number), str(epoch)] for epoch in range(1, epochs + 1)]:
            raise ValueError(f"recipe {number} should have the epochs 1 to {epochs}")
        plain, averaged = ([float(row[column] or NO_SCORE) for row in block] for column in (2, 3))
        curves.append(Curve(number, block[0][4], json.loads(block[0][5]), plain, averaged))
    return curves, len(header) + sum(map(len, lines[: epochs * len(curves)]))


def _begun(file: Path, recipes: list[Recipe]) -> int:
    """How many of the recipes `file` holds; it is made where it isn't there, and freed of a torn end."""
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"OUTPUT {file}: can't be written ({error.strerror})") from None
    curves, end = _read(file, recipes[0].training.epochs)
    for curve, recipe in zip(curves, recipes, strict=False):
        if curve.digest != recipe.digest():
            raise UserError(
                f"OUTPUT {file}: its recipe {curve.recipe} is another than this command's; the former options go on "
                "with it, another file begins anew"
            )
    with file.open("r+", encoding="utf-8") as table:
        table.truncate(end)
    return len(curves)


def _read(file: Path, epochs: int | None = None) -> tuple[list[Curve], int]:
    try:
        return _parse(file.read_text(encoding="utf-8"), epochs)
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{file}: no table of learning curves ({error}); python -m pipeline curves makes one") from None
