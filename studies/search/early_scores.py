"""What does an early score tell about the final one? Three kinds of early score at equal cost, from `trainings.jsonl`.

A full training stopped early, as a pruner sees it: its score there (`stopped`), or a power law fitted to its scores so far
and read at the last epoch (`extrapolated`; pow3 of Domhan, Springenberg, Hutter, IJCAI 2015). Or a training of that length
with its whole schedule (`short`). The measure is Spearman's rank correlation with the last score of the full training of
the same recipe and seed; the interval is of a bootstrap over recipes. Trains nothing:

    .venv/bin/python studies/search/early_scores.py studies/search/results/trainings.jsonl
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import spearmanr

Curve = list[float]  # validation accuracy by epoch


def curves(file: Path) -> dict[str, list[dict[int, Curve]]]:
    """By network: of each recipe and seed the complete trainings by their epochs."""
    found: dict[str, dict[str, dict[int, Curve]]] = defaultdict(lambda: defaultdict(dict))
    for line in file.read_text().splitlines():
        row = json.loads(line)
        recipe, scores = row["recipe"], row["epochs"]["val/accuracy"]
        epochs = recipe["training"].pop("epochs")
        if len(scores) == epochs:
            found[recipe["model"]["network"]][json.dumps(recipe, sort_keys=True)][epochs] = scores
    return {network: list(recipes.values()) for network, recipes in found.items()}


def extrapolated(scores: Sequence[float], epochs: int) -> float:
    """The value at the last epoch of `a - b * t ** -c`, fitted to the scores so far."""
    epoch = np.arange(1, len(scores) + 1)
    fit = least_squares(lambda x: _power_law(epoch, *x) - scores, x0=(0.8, 0.5, 0.5), bounds=([0, 0, 0.01], [1, 1, 3]))
    return float(_power_law(epochs, *fit.x))


def _power_law(epoch: np.ndarray | int, a: float, b: float, c: float) -> np.ndarray:
    return a - b * np.power(np.asarray(epoch, float), -c)


def correlation(early: Sequence[float], final: Sequence[float], resamples: int = 2000) -> str:
    """Spearman's rho, its 95 % interval in brackets."""
    pairs, generator = np.array([early, final]), np.random.default_rng(0)
    drawn = [pairs[:, generator.integers(0, len(early), len(early))] for _ in range(resamples)]
    low, high = np.nanquantile([spearmanr(*sample).statistic for sample in drawn], [0.025, 0.975])
    return f"{spearmanr(*pairs).statistic:.2f} ({low:.2f} to {high:.2f})"


def early(kind: str, recipe: dict[int, Curve], at: int) -> float:
    """The early score of a recipe after `at` epochs; `recipe` has its trainings by their epochs."""
    full = max(recipe)
    if kind == "short":
        return recipe[at][-1]
    return recipe[full][at - 1] if kind == "stopped" else extrapolated(recipe[full][:at], full)


def main() -> None:
    """A row for each network and kind of early score: of all full trainings, and of those that were trained short too."""
    lines = ["| network | recipes | early score | after a quarter of the epochs | after half |", "|---" * 5 + "|"]
    for network, recipes in curves(Path(sys.argv[1])).items():
        full = max(epochs for recipe in recipes for epochs in recipe)
        complete = [recipe for recipe in recipes if full in recipe]
        both = [recipe for recipe in complete if full // 4 in recipe]
        for chosen, kinds in ((complete, ("stopped", "extrapolated")), (both, ("stopped", "extrapolated", "short"))):
            final = [recipe[full][-1] for recipe in chosen]
            for kind in kinds:
                parts = (full // 4,) if kind == "short" else (full // 4, full // 2)
                cells = [correlation([early(kind, recipe, at) for recipe in chosen], final) for at in parts]
                row = [f"`{network}`", len(chosen), kind, *cells, *[""] * (2 - len(cells))]
                lines.append(f"| {' | '.join(map(str, row))} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
