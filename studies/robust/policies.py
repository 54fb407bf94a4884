"""Which augmentation makes a network robust to corruptions, and what does it cost?

`baseline` on CIFAR-10 by a portfolio recipe, 10 epochs, trained by each policy, its validation images then corrupted in 15
kinds at 5 strengths. Run by hand, one thread; a row that is there is not measured again, so it may be stopped:

    .venv/bin/python studies/robust/policies.py run data results.csv --seeds 0,1,2
    .venv/bin/python studies/robust/policies.py report results.csv
"""

import argparse
import csv
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # equal sums need equal threads

import pipeline.runtime  # noqa: F401, I001  before torch is imported
import numpy as np
import torch

from pipeline.data.datasets import load
from pipeline.data.prepare import TrainingData, prepare
from pipeline.evaluation.logits import predict_logits
from pipeline.evaluation.robustness import measure_robustness
from pipeline.evaluation.significance import paired_t, sample
from pipeline.search.portfolio import PORTFOLIO, fields_for
from pipeline.search.study import load_study
from pipeline.training.loop import train

BASELINE = load_study("baseline").base
BASE = BASELINE.changed({**fields_for(BASELINE, PORTFOLIO["SGD, small batches, smoothing"]), "training.epochs": 10})
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "augmix": {"augmentation.policy": "augmix"},
    "augmix, consistency 12": {"augmentation.policy": "augmix", "augmentation.consistency": 12.0},
    "trivialaugment": {"augmentation.policy": "trivialaugment"},
    # What AugMix costs, and what it costs with consistency, spent on more epochs instead.
    "none, 17 epochs": {"training.epochs": 17},
    "none, 40 epochs": {"training.epochs": 40},
}
GROUPS = {"noise": slice(0, 3), "blur": slice(3, 7), "weather": slice(7, 11), "digital": slice(11, 15)}
SCORES = ("clean", "corrupted", *GROUPS)
CPU = torch.device("cpu")


def measured(arm: str, seed: int, data: TrainingData, num_images: int) -> dict[str, float]:
    """Accuracies on all validation images and on so many corrupted ones, and the CPU time in seconds of the training."""
    started = time.process_time()
    recipe = BASE.changed({**ARMS[arm], "training.seed": seed})
    result = train(recipe, data, CPU)
    cpu_s, precision = time.process_time() - started, recipe.training.precision

    def predict(images: torch.Tensor) -> torch.Tensor:
        return predict_logits(result.network, images, data.mean, data.std, precision).argmax(1)

    some = data.validation.at(slice(num_images))
    found = measure_robustness(predict, some.images, some.labels, CPU)
    groups = {name: float(found.accuracy[kinds].mean()) for name, kinds in GROUPS.items()}
    clean = result.history[-1].metrics["val/accuracy"]
    return {"clean": clean, "corrupted": found.mean, **groups, "cpu_s": cpu_s}


def run(data_dir: Path, file: Path, seeds: list[int], arms: list[str], num_images: int) -> None:
    """Measure what the table lacks."""
    data, known = prepare(load(BASE.data, data_dir, download=False), BASE.data, CPU), set()
    if file.exists():
        with file.open(newline="") as table:
            known = {(row["arm"], int(row["seed"])) for row in csv.DictReader(table)}
    for seed, arm in [(seed, arm) for seed in seeds for arm in arms if (arm, seed) not in known]:
        row = {"arm": arm, "seed": seed, **measured(arm, seed, data, num_images)}
        is_new = not file.exists()
        with file.open("a", newline="") as table:
            writer = csv.DictWriter(table, list(row), lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow({name: f"{v:.4f}" if isinstance(v, float) else v for name, v in row.items()})


def report(file: Path) -> None:
    """Mean and standard deviation over seeds, and the paired difference on corrupted images to no policy."""
    rows: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    with file.open(newline="") as table:
        for row in csv.DictReader(table):
            rows[row["arm"]][int(row["seed"])] = {name: float(row[name]) for name in (*SCORES, "cpu_s")}
    lines = [f"| arm | n | {' | '.join(SCORES)} | CPU s | corrupted, beside none, points |", "|---" * 10 + "|"]
    for arm, by_seed in rows.items():
        cells = [sample([100 * scores[name] for scores in by_seed.values()]) for name in SCORES]
        numbers = " | ".join(f"{cell.mean:.2f}" + (f" ± {cell.sd:.2f}" if cell.sd else "") for cell in cells)
        common = [seed for seed in by_seed if seed in rows["none"] and arm != "none"]
        gains = [100 * (by_seed[seed]["corrupted"] - rows["none"][seed]["corrupted"]) for seed in common]
        gain = f"{np.mean(gains):+.2f}" if gains else ""
        gain += f", p = {paired_t(gains, 0.02):.2g}" if len(gains) > 1 else ""
        cpu_s = np.mean([scores["cpu_s"] for scores in by_seed.values()])
        lines.append(f"| {arm} | {len(by_seed)} | {numbers} | {cpu_s:.0f} | {gain} |")
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    """The commands of the docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--arms", default=";".join(ARMS))
    parser.add_argument("--images", type=int, default=5000, help="that are corrupted")
    given = parser.parse_args()
    if given.command == "run":
        seeds = [int(seed) for seed in given.seeds.split(",")]
        run(given.paths[0], given.paths[1], seeds, given.arms.split(";"), given.images)
    else:
        report(given.paths[0])


if __name__ == "__main__":
    main()
