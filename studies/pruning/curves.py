"""Complete learning curves of random recipes of a study, kept as a table, on which replay.py replays ways of pruning.

    python studies/pruning/curves.py baseline --output studies/pruning/baseline.csv --recipes 60 \\
        --set training.epochs=18 data.train_fraction=0.3333333

The table is resumed if it exists; Ctrl-C loses one recipe.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from pipeline.data.datasets import load
from pipeline.data.prepare import TrainingData, prepare
from pipeline.errors import DataError, UserError
from pipeline.recipe import Recipe
from pipeline.search.study import Search, load_study
from pipeline.training.loop import Diverged, EpochReport, train

COLUMNS = ("recipe", "epoch", "score_plain", "score_averaged", "digest", "params")
NO_SCORE = math.nan  # from where a recipe diverged


@dataclass(frozen=True)
class Curve:
    """One recipe's validation scores by epoch, of the trained and of the averaged weights; NaN once it had diverged."""

    recipe: int
    digest: str  # of the recipe
    params: dict[str, Any]
    plain: list[float]
    averaged: list[float]


def averaging(search: Search, data: TrainingData) -> Search:
    """The same search with averaged weights in all recipes: over half an epoch, where its base doesn't average.

    Half an epoch is long compared with the noise of batches, and short compared with the schedule: an average over more
    would lag behind weights that still change, most of all in the first epochs, where a pruner decides.
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
        rule = "the study searches it, but curves need one length"
        raise UserError("training.epochs", rule, "`--set training.epochs=N` gives all recipes the same")


def collect(
    search: Search,
    data: TrainingData,
    device: torch.device,
    file: Path,
    count: int,
    on_epoch: Callable[[int, EpochReport], None] = lambda recipe, report: None,
) -> Iterator[Curve]:
    """Train `count` recipes of a search to the end, except those in `file`; yields each after it was written.

    Raises UserError where the space asks for the number of epochs, and where the file holds other recipes.
    """
    check_length(search)
    drawn = draw(search, count)
    recipes = [search.recipe(params) for params in drawn]
    done = _num_stored(file, recipes)
    with file.open("a", encoding="utf-8", newline="") as table:
        for number in range(done, count):
            curve = _train(number, recipes[number], drawn[number], search.study.objective, data, device, on_epoch)
            table.write(_rows(curve))
            table.flush()
            os.fsync(table.fileno())
            yield curve


def load_curves(file: Path) -> list[Curve]:
    """The complete curves in a table that `collect` wrote; DataError where it is no such table."""
    curves, _ = _read(file)
    if len(curves) < 2:
        raise DataError(str(file), f"{len(curves)} complete learning curves; a replay needs at least 2")
    return curves


def scores_of(curves: list[Curve], weights: str) -> np.ndarray:
    """(num_recipes, num_epochs) float64 of the "plain" or the "averaged" weights."""
    return np.array([getattr(curve, weights) for curve in curves])


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

    def record(report: EpochReport) -> None:
        averaged[report.epoch - 1] = report.metrics[objective]
        plain[report.epoch - 1] = report.metrics[objective.replace("val/", "plain/")]
        on_epoch(number, report)

    with contextlib.suppress(Diverged):  # a curve that ends early, as a search meets it
        train(recipe, data, device, record, score_plain=True)
    return Curve(number, recipe.digest(), params, plain, averaged)


def _rows(curve: Curve) -> str:
    """A line for each epoch; the first also holds digest and parameters."""
    text = io.StringIO()
    about = [curve.digest, json.dumps(curve.params, separators=(",", ":"))]
    for epoch, pair in enumerate(zip(curve.plain, curve.averaged, strict=True), 1):
        cells = ["" if math.isnan(score) else f"{score:.6g}" for score in pair]
        csv.writer(text, lineterminator="\n").writerow([curve.recipe, epoch, *cells, *about])
        about = ["", ""]
    return text.getvalue()


def _parse(text: str, epochs: int | None = None) -> tuple[list[Curve], int]:
    """The complete curves of a table, and how many characters they take; ValueError where it is no such table.

    A curve after the last complete one was being written when the command ended. `epochs` is the length of a curve, by
    default that of the longest.
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


def _num_stored(file: Path, recipes: list[Recipe]) -> int:
    """How many of the recipes `file` holds. It is made if it is missing, and an incomplete curve at its end is removed."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    curves, end = _read(file, recipes[0].training.epochs)
    for curve, recipe in zip(curves, recipes, strict=False):
        if curve.digest != recipe.digest():
            rule = f"its recipe {curve.recipe} is not the one of this command"
            raise UserError(f"`--output` {file}", rule, "resume it with the former options, or use another file")
    with file.open("r+", encoding="utf-8") as table:
        table.truncate(end)
    return len(curves)


def _read(file: Path, epochs: int | None = None) -> tuple[list[Curve], int]:
    try:
        return _parse(file.read_text(encoding="utf-8"), epochs)
    except (OSError, ValueError, IndexError) as error:
        raise DataError(str(file), f"no table of learning curves ({error})", "curves.py makes one") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a module of studies/, e.g. baseline")
    parser.add_argument("--output", type=Path, required=True, help="the table, a CSV")
    parser.add_argument("--recipes", type=int, default=60, help="in all; the first is the control")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="for all recipes")
    options = parser.parse_args()
    pairs = (change.split("=", 1) for change in options.set)
    changes = {field: json.loads(value) if value[:1] in "[-.0123456789" else value for field, value in pairs}
    study = load_study(options.study)
    search = Search(options.study, study, study.settings(changes), study.version, options.recipes, None)
    search.check()
    device, base = torch.device("cuda" if torch.cuda.is_available() else "cpu"), search.base
    data = prepare(load(base.data.dataset, base.data.form, options.data_dir), base.data, device)
    start = time.monotonic()
    for curve in collect(averaging(search, data), data, device, options.output, options.recipes):
        scores = f"plain {curve.plain[-1]:.4f}, averaged {curve.averaged[-1]:.4f}"
        print(f"recipe {curve.recipe}: {scores}, after {time.monotonic() - start:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()
