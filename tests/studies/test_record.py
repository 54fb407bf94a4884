"""The scripts of studies/record/, on a few digits."""

import csv
import sys
from pathlib import Path

import pytest
from conftest import Trained

from pipeline.models.build import build_network, num_parameters
from pipeline.search.study import load_study

ROOT = Path(__file__).resolve().parents[2]
PEER = """
from torch import nn
from torchvision import transforms

MEAN, STD = (0.5,) * 3, (0.2,) * 3
AUG = {"tiny": [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]}

def tiny():
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))
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


def test_usual_baseline_is_the_network_of_the_study(record: Path) -> None:
    import usual_baseline  # type: ignore[import-not-found]

    ours = build_network(load_study("baseline").base.model, 10, 32, 0)
    assert num_parameters(usual_baseline.baseline()) == num_parameters(ours) == 136_874
