"""Is some shape of `efficient` twice as fast as a `plain` network of equal accuracy? (Its project claims so of its own.)

Both networks in several widths, by the portfolio's first recipe, by default for 12 epochs on a third of CIFAR-10; then the
latency of one image in ONNX, fp32, on one thread. Run by hand. A row that is there is not trained again, so `run` may be
stopped; each table holds one length and one share of the data:

    .venv/bin/python studies/record/efficient_shapes.py run data shapes.csv --seeds 0,1,2
    .venv/bin/python studies/record/efficient_shapes.py run data shapes-48.csv --epochs 48 --train-fraction 1 --device cuda
    .venv/bin/python studies/record/efficient_shapes.py report shapes.csv
"""

import argparse
import csv
import os
import sys
import tempfile
import time
from collections import defaultdict
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # equal sums need equal threads

import pipeline.runtime  # noqa: F401, I001  before torch is imported
import numpy as np
import torch

from pipeline.data.datasets import load
from pipeline.data.prepare import prepare
from pipeline.evaluation.significance import sample
from pipeline.models.build import build_network, num_parameters, prediction_flop
from pipeline.recipe import Recipe
from pipeline.registry.export import OPSET, session
from pipeline.search.portfolio import PORTFOLIO
from pipeline.search.study import load_study
from pipeline.training.loop import train

SHAPES = {
    "plain": ["16-32-64-128", "24-48-96-192", "32-64-128-256", "48-96-192-384", "64-128-256-512"],
    "efficient": [
        "48-96-192",
        "16-64-256",
        "32-128-256",
        "32-64-128",
        "32-48-96",
        "16-32-64",
        "16-64-128",
        "16-32-128",
        "16-64-192",
    ],
}


def recipe_of(network: str, widths: str, seed: int = 0, epochs: int = 12, train_fraction: float = 1 / 3) -> Recipe:
    """The portfolio's first recipe, but for the network's own fields, which stay as published."""
    start = {name: value for name, value in PORTFOLIO["Muon, smoothing"].items() if not name.startswith("model.")}
    lengths = {"data.train_fraction": train_fraction, "training.epochs": epochs, "training.seed": seed}
    shape = {"model.widths": tuple(int(width) for width in widths.split("-"))}
    return load_study(network).base.changed({**start, **lengths, **shape})


def run(data_dir: Path, file: Path, recipes: dict[tuple[str, str, int], Recipe], device: torch.device) -> None:
    """Train what the table lacks of the recipes by network, widths and seed."""
    known = {(row["network"], row["widths"], int(row["seed"])) for row in _rows(file)}
    data_recipe = next(iter(recipes.values())).data
    data = prepare(load(data_recipe, data_dir, download=False), data_recipe, device)
    for row, recipe in recipes.items():
        if row in known:
            continue
        started = time.process_time()
        accuracy = train(recipe, data, device).history[-1].metrics["val/accuracy"]
        cpu_s = time.process_time() - started
        is_new = not file.exists()
        with file.open("a", newline="") as table:
            writer = csv.writer(table, lineterminator="\n")
            if is_new:
                writer.writerow(["network", "widths", "seed", "accuracy", "cpu_s"])
            writer.writerow([*row, f"{accuracy:.4f}", f"{cpu_s:.0f}"])


def report(file: Path) -> None:
    """Accuracy and latency of each shape, and how much slower the `plain` network of equal accuracy is."""
    accuracies: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in _rows(file):
        accuracies[row["network"], row["widths"]].append(100 * float(row["accuracy"]))
    milliseconds = dict(zip(accuracies, _latencies_ms(list(accuracies)), strict=True))
    plain = sorted((sample(a).mean, milliseconds[shape]) for shape, a in accuracies.items() if shape[0] == "plain")
    scores, times = zip(*plain, strict=True)
    lines = ["| network | widths | parameters | MFLOP | n | accuracy, % | ms | `plain` of equal accuracy, ms, factor |"]
    lines.append("|---" * 8 + "|")
    for (network, widths), values in accuracies.items():
        model, score, ms = recipe_of(network, widths).model, sample(values), milliseconds[network, widths]
        equal = float(np.exp(np.interp(score.mean, scores, np.log(times))))
        factor = f"{equal:.3f}, {equal / ms:.2f}" if scores[0] <= score.mean <= scores[-1] else "outside"
        spread = f" ± {score.sd:.2f}" if score.sd else ""
        size = f"{num_parameters(build_network(model, 10, 32, 0)):,} | {prediction_flop(model, 10, 32) / 1e6:.0f}"
        lines.append(f"| {network} | {widths} | {size} | {score.n} | {score.mean:.2f}{spread} | {ms:.3f} | {factor} |")
    sys.stdout.write("\n".join(lines) + "\n")


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as table:
        return list(csv.DictReader(table))


def _latencies_ms(shapes: list[tuple[str, str]], rounds: int = 12, repeats: int = 40) -> list[float]:
    """Milliseconds of one image, of each shape with random weights: the least of several rounds, in turn."""
    sessions = []
    with tempfile.TemporaryDirectory() as folder:
        for network, widths in shapes:
            path = Path(folder) / f"{network}-{widths}.onnx"
            model = build_network(recipe_of(network, widths).model, 10, 32, 0).eval()
            image = (torch.zeros(1, 3, 32, 32),)
            torch.onnx.export(model, image, path, dynamo=True, opset_version=OPSET, input_names=["x"], verbose=False)
            sessions.append(session(path))
    least, inputs = [float("inf")] * len(shapes), {"x": np.zeros((1, 3, 32, 32), np.float32)}
    for place, model in [item for _ in range(rounds) for item in enumerate(sessions)]:
        model.run(None, inputs)
        for _ in range(repeats):
            started = time.perf_counter()
            model.run(None, inputs)
            least[place] = min(least[place], 1000 * (time.perf_counter() - started))
    return least


def main() -> None:
    """The commands of the docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--shapes", default=";".join(f"{name}:{widths}" for name in SHAPES for widths in SHAPES[name]))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--train-fraction", type=float, default=1 / 3)
    parser.add_argument("--device", type=torch.device, default="cpu")
    given = parser.parse_args()
    if given.command == "report":
        report(given.paths[0])
        return
    recipes = {}
    for seed, shape in product(given.seeds.split(","), given.shapes.split(";")):
        network, _, widths = shape.partition(":")
        recipes[network, widths, int(seed)] = recipe_of(network, widths, int(seed), given.epochs, given.train_fraction)
    run(given.paths[0], given.paths[1], recipes, given.device)


if __name__ == "__main__":
    main()
