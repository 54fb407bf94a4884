"""How good is the recipe that a search returns, as a function of the epochs it used?

Run by hand, `run` and then `report`; README.md beside this file says how it measures.
"""

import argparse
import csv
import logging
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # equal sums need equal threads, and an epoch more would not be faster

import pipeline.runtime  # noqa: F401, I001  before torch is imported
import optuna
import torch
from filelock import FileLock, Timeout
from scipy.stats import ttest_ind

from contestants import SYSTEMS, VARIANTS, Line, Step, Strategy, System, hand_of
from meter import Meter, Spent, Trainer
from pipeline.data.datasets import load
from pipeline.data.prepare import prepare
from pipeline.errors import UserError
from pipeline.evaluation.significance import sample
from pipeline.recipe import Recipe
from pipeline.search.search import Search
from pipeline.training.loop import Diverged

FINAL_SEEDS = (1001, 1002, 1003)  # no search is seeded so
# Of full length: what `baseline` with 30 trials and today's pruner used, 190 epochs of 20, and two fifths of it.
POINTS = "9.5,3.8"

TRIAL_COLUMNS = (
    *("system", "variant", "seed", "trial", "epochs_used", "state", "length", "epochs", "score"),
    *("recipe", "returned", "returned_score", "changes"),
)
SCORE_COLUMNS = (
    *("system", "variant", "seed", "at", "trials", "epochs_used", "returned", "search_score"),
    *("mean", "sd", "scores", "changes"),
)
log = logging.getLogger("benchmark")


class Table:
    """A CSV that grows row by row, each row once by its first `keys` columns; a torn last line is cut off."""

    def __init__(self, file: Path, columns: tuple[str, ...], keys: int):
        self._file, self._columns, self._keys = file, columns, keys
        text = file.read_text() if file.exists() else ""
        if not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            file.write_text(text or ",".join(columns) + "\n")
        with file.open(newline="") as table:
            self.rows = list(csv.DictReader(table))
        self._seen = {self._key(row) for row in self.rows}

    def has(self, *key: object) -> bool:
        """Whether there is a row with this key."""
        return tuple(map(str, key)) in self._seen

    def add(self, *values: object) -> None:
        """Append a row, unless it is there."""
        row = dict(zip(self._columns, map(str, values), strict=True))
        if self._key(row) not in self._seen:
            self._seen.add(self._key(row))
            self.rows.append(row)
            with self._file.open("a", newline="") as table:
                csv.writer(table, lineterminator="\n").writerow(row.values())

    def _key(self, row: dict[str, str]) -> tuple[str, ...]:
        return tuple(list(row.values())[: self._keys])


def run(
    system: str,
    variants: list[str],
    seeds: list[int],
    points: list[float],
    data_dir: Path,
    output: Path,
) -> None:
    """Search with each variant and seed, then train what it would have returned at each point, in whole trainings."""
    asked = SYSTEMS[system]
    data_fields = asked.search(0).base.data
    device = torch.device("cpu")
    data = prepare(load(data_fields, data_dir), data_fields, device)
    trainer = Trainer(data, device, output / "trainings.jsonl", "val/accuracy")
    trials = Table(output / "trials.csv", TRIAL_COLUMNS, keys=4)
    scores = Table(output / "scores.csv", SCORE_COLUMNS, keys=4)
    points_at = [round(point * asked.epochs) for point in points]
    budget = max(points_at)
    for seed in seeds:
        for variant in variants:
            strategy = strategy_of(variant, asked)
            if isinstance(strategy, Line) and seed != seeds[0]:
                continue
            search, meter = asked.search(seed), Meter(trainer, budget)
            log.info("%s %s seed %d: %d epochs", system, variant, seed, budget)
            steps: list[tuple[int, Step]] = []
            for used, step in steps_of(strategy, search, meter):
                steps.append((used, step))
                add_trial(trials, system, variant, seed, len(steps) - 1, used, step, search.base)
            for at in [0] if isinstance(strategy, Line) else points_at:
                reached = [(used, step) for used, step in steps if used <= at]
                if not scores.has(system, variant, seed, at) and reached and reached[-1][1].best:
                    add_score(scores, trainer, system, variant, seed, at, reached, search.base)


def strategy_of(variant: str, system: System) -> Strategy:
    """By name."""
    return hand_of(system) if variant == "hand" else VARIANTS[variant]


def steps_of(strategy: Strategy, search: Search, meter: Meter) -> Iterator[tuple[int, Step]]:
    """Each step, and the epochs that were used when it ended; one that the budget cut off is none."""
    try:
        for step in strategy(search, meter):
            yield meter.used, step
            if isinstance(strategy, Line):
                return
    except Spent:
        return


def add_trial(
    table: Table, system: str, variant: str, seed: int, number: int, used: int, step: Step, base: Recipe
) -> None:
    """A row, and a line in the log where it is new."""
    if table.has(system, variant, seed, number):
        return
    score = f"{step.score:.4f}" if step.score is not None else ""
    best = (
        (identity(step.best), f"{step.best_score:.4f}" if step.best_score is not None else "")
        if step.best
        else ("", "")
    )
    length = step.recipe.training.epochs
    about = (used, step.state, length, step.epochs, score, identity(step.recipe), *best, changes(step.recipe, base))
    table.add(system, variant, seed, number, *about)
    log.info("%s %s seed %d, trial %d: %s %s, %d epochs used", system, variant, seed, number, step.state, score, used)


def add_score(
    table: Table,
    trainer: Trainer,
    system: str,
    variant: str,
    seed: int,
    at: int,
    reached: list[tuple[int, Step]],
    base: Recipe,
) -> None:
    """Train the returned recipe with the final seeds, in full, and write the row."""
    used, step = reached[-1]
    assert step.best
    found = []
    for final in FINAL_SEEDS:
        recipe = step.best.changed({"training.epochs": base.training.epochs, "training.seed": final})
        try:
            found.append(trainer.train(recipe))
        except Diverged:
            found.append(0.0)
    mean, sd = statistics.mean(found), statistics.stdev(found)
    own = f"{step.best_score:.4f}" if step.best_score is not None else ""
    each = " ".join(f"{score:.4f}" for score in found)
    about = (len(reached), used, identity(step.best), own, f"{mean:.5f}", f"{sd:.5f}", each, changes(step.best, base))
    table.add(system, variant, seed, at, *about)
    log.info("%s %s seed %d at %d epochs: %.2f %%", system, variant, seed, at, 100 * mean)


def identity(recipe: Recipe) -> str:
    """Of a recipe without its seed."""
    return recipe.changed({"training.seed": 0}).digest()[:12]


def changes(recipe: Recipe, base: Recipe) -> str:
    """What is not as in the base recipe, for a reader."""
    fields = {name: here for name, (here, _) in recipe.difference(base).items() if here is not None}
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in fields.items()
    )


def report(output: Path) -> Iterator[str]:
    """Markdown: of each system, variant and point the mean over searches, its 95 % interval, what it is above the first
    start, and the lead of `ours`."""
    with (output / "scores.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    for system in dict.fromkeys(row["system"] for row in rows):
        yield f"### {system}"
        yield (
            "| variant | epochs | returned, % | 95 % interval | minus the first start | lead of `ours` | each search "
            "| seen by the search, % |"
        )
        yield "|---|---|---|---|---|---|---|---|"
        groups: dict[tuple[int, str], list[float]] = defaultdict(list)
        saw: dict[tuple[int, str], list[float]] = defaultdict(list)
        for row in [row for row in rows if row["system"] == system]:
            groups[int(row["at"]), row["variant"]].append(100 * float(row["mean"]))
            if row["search_score"]:
                saw[int(row["at"]), row["variant"]].append(100 * float(row["search_score"]))
        for (at, variant), each in sorted(groups.items(), key=lambda item: (item[0][0], -statistics.mean(item[1]))):
            found = sample(each)
            interval = f"{found.low:.2f} to {found.high:.2f}" if found.n > 1 else ""
            listed, seen = ", ".join(f"{mean:.2f}" for mean in each), saw[at, variant]
            seen_mean = f"{statistics.mean(seen):.2f}" if seen else ""
            lead = lead_of(groups[at, "ours"], each) if variant != "ours" else ""
            gain = gain_of(each, groups[0, "first-start"])
            yield f"| {variant} | {at} | {found.mean:.2f} | {interval} | {gain} | {lead} | {listed} | {seen_mean} |"
        yield ""


def gain_of(searches: Sequence[float], start: Sequence[float]) -> str:
    """By how many points searches are better than the first start alone, taken as exact, with the 95 % interval by Student.

    "" for fewer than two searches, or without the start's score.
    """
    if len(searches) < 2 or not start:
        return ""
    gain = sample([score - start[0] for score in searches])
    return f"{gain.mean:+.2f} ({gain.low:.2f} to {gain.high:.2f})"


def lead_of(ours: Sequence[float], others: Sequence[float]) -> str:
    """By how many points the searches `ours` are better than others, with Welch's 95 % interval; "" for fewer than two."""
    if min(len(ours), len(others)) < 2:
        return ""
    interval = ttest_ind(ours, others, equal_var=False).confidence_interval()
    return f"{statistics.mean(ours) - statistics.mean(others):+.2f} ({interval.low:.2f} to {interval.high:.2f})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="search, and train what is returned; the same command resumes")
    runs.add_argument("system", choices=SYSTEMS)
    runs.add_argument("--variants", required=True, help=f"with commas, of: hand, {', '.join(VARIANTS)}")
    runs.add_argument("--seeds", default="0", help="of the searches, with commas: 0,1,2")
    runs.add_argument(
        "--at",
        default=POINTS,
        help="used compute at which to score, in trainings of full length; the largest is the budget",
    )
    runs.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is")
    reports = commands.add_parser("report", help="the scores so far, as a table")
    for command in (runs, reports):
        command.add_argument(
            "--output", type=Path, required=True, help="the folder of the results, outside the repository"
        )
    options = parser.parse_args()
    if options.command == "report":
        if not (options.output / "scores.csv").exists():
            parser.error(f"--output {options.output}: has no scores.csv; run writes it")
        sys.stdout.writelines(line + "\n" for line in report(options.output))
        return
    variants = options.variants.split(",")
    if unknown := [name for name in variants if name != "hand" and name not in VARIANTS]:
        parser.error(f"--variants {','.join(unknown)}: must be of hand, {', '.join(VARIANTS)}")
    try:
        seeds, points = (
            [int(seed) for seed in options.seeds.split(",")],
            [float(point) for point in options.at.split(",")],
        )
    except ValueError as error:
        parser.error(f"--seeds, --at: must be numbers with commas between them ({error})")
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, stream=sys.stdout)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with FileLock(options.output / "lock", timeout=0):
            run(options.system, variants, seeds, points, options.data_dir, options.output)
    except Timeout:
        parser.error(f"--output {options.output}: another process writes there; wait for it, or name another folder")
    except UserError as error:
        parser.error("\n".join(error.lines))
    log.info("done in %.0f s", time.monotonic() - started)


if __name__ == "__main__":
    main()
