"""What do a balanced sampler, class weights and the focal loss give on CIFAR-10 with a long tail?

CIFAR-10's training part loses images by an exponential profile (Cui et al. 2019, arXiv 1901.05555): class c of 10 keeps
4,500 * RATIO^(-c / 9) of its 4,500 images, 4,500 airplanes to 45 trucks. Validation stays the standard split, 500 images
of each class, so that accuracy and balanced accuracy are the same number. Run by hand, one thread:

    .venv/bin/python studies/rare/long_tail.py run data results.csv --seeds 0
    .venv/bin/python studies/rare/long_tail.py run data results.csv --seeds 1,2,3,4,5 --arms 'plain;weights, power 1'
    .venv/bin/python studies/rare/long_tail.py report results.csv --seeds 1,2,3,4,5
    .venv/bin/python studies/rare/long_tail.py folder data long-tail    # train/<class>/*.png
    make study NAME=rare_classes DATASET=long-tail
"""

import argparse
import csv
import os
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # equal sums need equal threads

import pipeline.runtime  # noqa: F401, I001  before torch is imported
import numpy as np
import torch

from pipeline.data.datasets import Split, load
from pipeline.data.prepare import TrainingData, pixel_statistics, prepare
from pipeline.evaluation.calibration import fit_temperature
from pipeline.evaluation.scores import reliability
from pipeline.evaluation.significance import paired_t, sample
from pipeline.search.portfolio import PORTFOLIO, fields_for
from pipeline.search.study import load_study
from pipeline.training.loop import train

RATIO = 100
BASELINE = load_study("baseline").base
BASE = BASELINE.changed({**fields_for(BASELINE, PORTFOLIO["SGD, small batches, smoothing"]), "training.epochs": 10})
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampler, power 1": {"data.sampler": "balanced"},
    "sampler, power 0.5": {"data.sampler": "balanced", "data.sampler_power": 0.5},
    "weights, power 1": {"loss.class_weights": 1.0},
    "weights, power 0.5": {"loss.class_weights": 0.5},
    "focal, gamma 2": {"loss.name": "focal"},
    "focal, sampler, power 0.5": {"loss.name": "focal", "data.sampler": "balanced", "data.sampler_power": 0.5},
}
SCORES = ("balanced_accuracy", "f1_macro", "recall_of_3_frequent", "recall_of_3_rare", "ece", "temperature")


def kept(labels: torch.Tensor) -> torch.Tensor:
    """Indices of the images that stay, drawn by class."""
    draw, chosen = np.random.RandomState(0), []
    for label in range(10):
        images = np.flatnonzero(labels.numpy() == label)
        chosen.append(draw.permutation(images)[: round(len(images) * RATIO ** (-label / 9))])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def long_tail(data_dir: Path) -> TrainingData:
    """CIFAR-10, its training images thinned."""
    data = prepare(load(BASE.data, data_dir, download=False), BASE.data, torch.device("cpu"))
    thin = data.train.at(kept(data.train.labels))
    mean, std = pixel_statistics(thin.images)
    return replace(data, train=thin, mean=mean, std=std)


def measured(arm: str, seed: int, data: TrainingData) -> dict[str, float]:
    """SCORES of an arm, and the CPU time in seconds that its training took."""
    started = time.process_time()
    result = train(BASE.changed({**ARMS[arm], "training.seed": seed}), data, torch.device("cpu"))
    logits, labels = result.validation_logits.double(), data.validation.labels.numpy()
    right = logits.argmax(1).numpy() == labels
    last = result.history[-1].metrics
    return {
        "balanced_accuracy": last["val/balanced_accuracy"],
        "f1_macro": last["val/f1_macro"],
        "recall_of_3_frequent": float(right[labels < 3].mean()),
        "recall_of_3_rare": float(right[labels > 6].mean()),
        "ece": reliability(logits.softmax(1).numpy(), labels).ece,
        "temperature": fit_temperature(logits.numpy(), labels),
        "cpu_s": time.process_time() - started,
    }


def run(data_dir: Path, file: Path, seeds: list[int], arms: list[str]) -> None:
    """Train what the table lacks."""
    data, known = long_tail(data_dir), set()
    if file.exists():
        with file.open(newline="") as table:
            known = {(row["arm"], int(row["seed"])) for row in csv.DictReader(table)}
    for seed in seeds:
        for arm in arms:
            if (arm, seed) in known:
                continue
            row = {"arm": arm, "seed": seed, **measured(arm, seed, data)}
            is_new = not file.exists()
            with file.open("a", newline="") as table:
                writer = csv.DictWriter(table, list(row), lineterminator="\n")
                if is_new:
                    writer.writeheader()
                writer.writerow({name: f"{v:.4f}" if isinstance(v, float) else v for name, v in row.items()})


def report(file: Path, seeds: list[int]) -> None:
    """Mean and standard deviation over these seeds, and the paired difference of balanced accuracy to plain."""
    scores: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    with file.open(newline="") as table:
        for row in csv.DictReader(table):
            scores[row["arm"]][int(row["seed"])] = {name: float(row[name]) for name in (*SCORES, "cpu_s")}
    lines = [f"| arm | n | {' | '.join(SCORES)} | beside plain, points |", "|---|---|" + "---|" * (len(SCORES) + 1)]
    for arm in ARMS:
        common = [seed for seed in seeds if seed in scores[arm] and seed in scores["plain"]]
        if not common:
            continue
        cells = [sample([scores[arm][seed][name] for seed in common]) for name in SCORES]
        gains = [100 * (scores[arm][seed][SCORES[0]] - scores["plain"][seed][SCORES[0]]) for seed in common]
        gain = sample(gains)
        interval = (
            "" if gain.low is None else f" ({gain.low:+.2f} to {gain.high:+.2f}), p = {paired_t(gains, 0.02):.2g}"
        )
        numbers = " | ".join(f"{cell.mean:.4f} ± {cell.sd or 0:.4f}" for cell in cells)
        lines.append(f"| {arm} | {len(common)} | {numbers} | {gain.mean:+.2f}{interval} |")
    sys.stdout.write("\n".join(lines) + "\n")


def write_folder(data_dir: Path, folder: Path) -> None:
    """The long tail of all 50,000 training images, 5,000 to 50 a class, as PNG files; CIFAR-10's test split stays out."""
    from PIL import Image

    data = load(BASE.data, data_dir, download=False)
    train: Split = data.train.at(kept(data.train.labels))
    for number, (image, label) in enumerate(zip(train.images[:].numpy(), train.labels.tolist(), strict=True)):
        path = folder / "train" / data.classes[label] / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)


def main() -> None:
    """The commands of the docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "report", "folder"])
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--arms", default=";".join(ARMS))
    given = parser.parse_args()
    first, second = (*given.paths, Path())[:2]
    seeds = [int(seed) for seed in given.seeds.split(",")]
    if given.command == "run":
        run(first, second, seeds, given.arms.split(";"))
    elif given.command == "report":
        report(first, seeds)
    else:
        write_folder(first, second)


if __name__ == "__main__":
    main()
