"""The scripts of studies/record/, on a few digits."""

import csv
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import Trained
from PIL import Image
from torch import nn

from pipeline.models.build import build_network, num_parameters
from pipeline.search.study import load_study

ROOT = Path(__file__).resolve().parents[2]
PEER = """
import torch
from torch import nn
from torchvision import transforms

MEAN, STD = (0.5,) * 3, (0.2,) * 3
AUG = {"tiny": [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]}

def tiny():
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))

def optimizer(model, parameters):
    return torch.optim.Adam(parameters, 1e-3)
"""


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = ROOT / "studies" / "record"
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.mark.parametrize(("times", "reached"), [(3.0, "True"), (0.0, "False")])
def test_time_to_the_published_number_is_a_row(
    times: float, reached: str, trained: Trained, record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time_to_published  # type: ignore[import-not-found]

    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.setattr(time_to_published, "TIMES_OURS", times)
    monkeypatch.chdir(trained.home.parent)
    words = [
        trained.finished,
        "--peer",
        str(tmp_path / "peer.py"),
        "--model",
        "tiny",
        "--output",
        str(tmp_path / "t.csv"),
    ]
    monkeypatch.setattr(sys, "argv", ["time_to_published.py", *words, "--target", "0.02"])
    time_to_published.main()
    monkeypatch.setattr(sys, "argv", ["time_to_published.py", *words, "--target", "1"])
    with pytest.raises(SystemExit, match=f"run {trained.finished} ended at .* below 100.00%"):
        time_to_published.main()
    [row] = csv.DictReader((tmp_path / "t.csv").open())
    assert (row["model"], row["run"], row["ours_epochs"]) == ("tiny", trained.finished, "1")
    assert float(row["ours"]) >= 0.02 and (row["theirs_reached"], row["theirs_epochs"]) == (
        reached,
        str(int(times > 0)),
    )


@pytest.fixture
def usual_script(record: Path) -> ModuleType:
    import usual_script  # type: ignore[import-not-found]

    return usual_script


@pytest.mark.parametrize("name", ["baseline", "improved", "plain"])
def test_usual_script_has_the_networks_and_optimizers_of_the_studies(name: str, usual_script: ModuleType) -> None:
    base, network = load_study(name).base, usual_script.NETWORKS[name]()
    ours = build_network(base.model, 10, 32, 0)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert num_parameters(network) == num_parameters(ours) + sum(norm.num_features for norm in norms), "biases before"
    optimizer = usual_script.optimizer(name, network.parameters())
    [group] = optimizer.param_groups
    assert type(optimizer).__name__.lower() == base.optimizer.name
    assert (group["lr"], group["weight_decay"]) == (base.optimizer.lr, base.optimizer.weight_decay)


def test_usual_script_is_a_peer(
    usual_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On made-up images, by the options that `bench` gives a peer."""

    def photos(folder: Path, train: bool, transform: Any) -> list[tuple[Any, int]]:
        assert folder == tmp_path and train
        images = np.random.RandomState(0).randint(0, 256, (8, 32, 32, 3), np.uint8)
        return [(transform(Image.fromarray(image)), label) for label, image in enumerate(images)]

    monkeypatch.setattr(usual_script.datasets, "CIFAR10", photos)
    options = {"--data": tmp_path, "--model": "plain", "--images": 8, "--batch": 4, "--workers": 0}
    monkeypatch.setattr(sys, "argv", ["usual_script.py", *map(str, itertools.chain(*options.items()))])
    usual_script.main()
    assert json.loads(capsys.readouterr().out)["images_per_second"] > 0


def test_usual_script_is_the_peer_by_default(record: Path, usual_script: ModuleType) -> None:
    import time_to_published

    peer = time_to_published.module(time_to_published.PEER)
    assert peer.AUG.keys() == usual_script.NETWORKS.keys()
