"""Nodes of a Ray cluster that go and come while a study runs; several on this machine."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from pipeline.data.prepare import TrainingData
from pipeline.recipe import Recipe
from pipeline.search import run_study
from pipeline.search.ray_pool import connect
from pipeline.search.search import Search
from pipeline.search.storage import open_storage
from pipeline.search.stored_study import num_finished
from pipeline.search.study import Study
from pipeline.search.trial import StudyContext
from pipeline.search.trial_attributes import TrialAttributes
from pipeline.search.worker import Limits
from pipeline.tracking.tracker import MlflowTracker

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray isn't installed"),
]


class NodeRemover:
    """An Observer that takes a node away at the first epoch it sees, and brings another."""

    def __init__(self, cluster: Any, node: Any):
        self._cluster, self._node, self.rooms = cluster, node, []

    def epoch(self, number: int, report: Any) -> None:
        if self._node:
            self._cluster.remove_node(self._node, allow_graceful=False)
            self._node = None
            self._cluster.add_node(num_cpus=1)

    def __getattr__(self, name: str) -> Any:
        return lambda *what: None


def rates(trial: Any) -> None:
    trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)


def test_lost_node_costs_no_trial_and_is_replaced(
    tmp_path: Path, small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = nodes.add_node(num_cpus=1)
        home = tmp_path / "mlruns"
        storage, tracker = open_storage(home), MlflowTracker(home)
        base = small_recipe.changed({"training.epochs": 6})
        study = Study(question="?", base=base, space=rates, objective="val/accuracy", trials=8)
        search = Search("storm", study, {}, version=1, trials=8, timeout_s=None)
        with connect(nodes.address, "cpu", Path("data"), None, Limits(heartbeat_s=0.5, heartbeat_timeout_s=15)) as pool:
            assert pool.capacity() == 2
            watch: Any = NodeRemover(nodes, node)
            context = StudyContext(
                search=search, data=digits, device=torch.device("cpu"), storage=storage, tracker=tracker, observer=watch
            )
            done = run_study.run_study(context, pool)
        assert num_finished(done) == 8
        assert {trial.state for trial in done.trials} <= {
            optuna.trial.TrialState.COMPLETE,
            optuna.trial.TrialState.PRUNED,
            optuna.trial.TrialState.FAIL,
        }
        again = [trial for trial in done.trials if TrialAttributes.of(trial).requeued]
        assert len(done.trials) == 8 + len(again)
        assert os.getpid() not in {TrialAttributes.of(trial).worker["pid"] for trial in done.trials}
    finally:
        nodes.shutdown()
