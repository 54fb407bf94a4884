"""The scripts of studies/pruning stay runnable, and their rules are Optuna's own."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.pruners import BasePruner
from optuna.trial import TrialState

FOLDER = Path(__file__).resolve().parents[2] / "studies" / "pruning"
sys.path.insert(0, str(FOLDER))

from replay import STRATEGIES, replay_all, rule, simulate  # noqa: E402


class OptunaRule:
    """A Rule that asks a real Optuna study."""

    def __init__(self, pruner: BasePruner, name: str, trials: int):
        storage = optuna.storages.InMemoryStorage()
        self.study = optuna.create_study(storage=storage, direction="maximize", pruner=pruner, study_name=name)
        self.trials = [self.study.ask() for _ in range(trials)]

    def prune(self, trial: int, epoch: int, score: float) -> bool:
        self.trials[trial].report(score, epoch)
        if pruned := self.trials[trial].should_prune():
            self.study.tell(self.trials[trial], state=TrialState.PRUNED)
        return pruned

    def complete(self, trial: int) -> None:
        self.study.tell(self.trials[trial], 1.0)


def rising_curves(seed: int, recipes: int = 40, epochs: int = 12) -> np.ndarray:
    """Curves on a coarse grid, so that scores tie; some cross, some diverge."""
    random = np.random.RandomState(seed)
    height, speed = random.uniform(0.2, 1, (recipes, 1)), random.uniform(0.5, 8, (recipes, 1))
    curves = height * (1 - np.exp(-np.arange(1, epochs + 1) / speed)) + random.normal(0, 0.03, (recipes, epochs))
    curves = curves.clip(0, 1).round(2)
    for row in random.choice(recipes, recipes // 10, replace=False):
        curves[row, random.randint(epochs) :] = np.nan
    return curves


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rules_decide_as_optunas_pruners(strategy: str) -> None:
    make = STRATEGIES[strategy]
    curves = rising_curves(0)
    for workers in (1, 4):
        expected = OptunaRule(make(*curves.shape), "order 0", len(curves))
        rows = curves.tolist()
        assert simulate(rows, rule(make(*curves.shape), "order 0"), workers) == simulate(rows, expected, workers)


def test_regret_is_what_pruning_loses_when_all_curves_cross() -> None:
    late, share = np.linspace(0.1, 0.9, 30)[:, None], np.linspace(0, 1, 12)
    crossing, parallel = (1 - late) * (1 - share) + late * share, late * np.linspace(0.5, 1, 12)
    for line in replay_all({"plain": crossing, "averaged": parallel}, orders=10, resamples=10):
        if line.strategy.startswith("halving"):
            assert line.rank_correlation.value == pytest.approx(-1 if line.weights == "plain" else 1)
            assert (line.regret.low > 0.05) == (line.weights == "plain")
        if line.strategy == "no pruning":
            assert (line.epochs_used.value, line.regret.value) == (1, 0)


def test_curves_are_collected_resumed_and_replayed(tmp_path: Path) -> None:
    table = tmp_path / "curves.csv"

    def run(script: str, *options: str) -> str:
        environment = {"PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(FOLDER / script), *options]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    study = ("attention", "--output", str(table), "--set", "data.dataset=digits", "training.epochs=1")
    tiny = ("model.widths=[4,8]", "data.train_fraction=0.3")
    assert "recipe 1: plain 0." in run("curves.py", *study, *tiny, "--recipes", "2")
    text = table.read_text()
    table.write_text(text[:-5])  # as if it had been killed
    assert "recipe 0" not in run("curves.py", *study, *tiny, "--recipes", "2")
    assert table.read_text() == text
    assert "plain | no pruning | 1 | 1 | " in run("replay.py", str(table), "--orders", "2")
    assert not math.isnan(float(text.splitlines()[1].split(",")[2]))
