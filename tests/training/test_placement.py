"""Which worker gets which device."""

import pytest
import torch

from pipeline.errors import UserError
from pipeline.training.placement import Placement, check_workers, fair_workers, placements


def test_gpus_are_assigned_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    first, second = Placement("cuda:0"), Placement("cuda:1")
    half = Placement("cuda:0", 1 / 2)
    assert placements(torch.device("cuda"), 2) == [first, second]
    assert placements(torch.device("cuda"), 3) == [half, second, half]
    assert placements(torch.device("cuda:1"), 2) == [Placement("cuda:1", 1 / 2)] * 2


def test_workers_of_a_cpu_share_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert placements(torch.device("cpu"), 1) == [Placement("cpu")]
    assert placements(torch.device("cpu"), 3) == [Placement("cpu", threads=5)] * 3
    assert placements(torch.device("cpu"), 20) == [Placement("cpu", threads=1)] * 20


def test_threads_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert Placement("cpu").set_up() == Placement("cpu", threads=3).set_up() == torch.device("cpu")
    assert asked == [3]


def test_workers_that_share_a_device_are_refused_where_times_are_bounded() -> None:
    cpu, gpu, bounded = torch.device("cpu"), torch.device("cuda:0"), {"time/training_s": 60.0}
    for device in (cpu, gpu):
        with pytest.raises(UserError, match=r"`--workers 2`: the study bounds time/training_s, which .*; leave it out"):
            check_workers(bounded, 2, device)
        check_workers(bounded, 1, device)
        check_workers({"val/ece": 0.1}, 2, device)
        assert [fair_workers(bounds, 4, device) for bounds in (bounded, {})] == [1, 4]
