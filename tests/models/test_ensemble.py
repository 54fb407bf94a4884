"""Several networks as one: its softmax is the mean of theirs."""

import torch
from torch import nn

from pipeline.models.ensemble import Ensemble


def test_softmax_is_the_mean_of_each_member_with_its_own_preprocessing() -> None:
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(12, 5)) for _ in range(3)]
    temperatures, means, stds = [0.5, 1.0, 3.0], torch.rand(3, 3), torch.rand(3, 3) + 0.5
    ensemble = Ensemble(networks, temperatures, means.tolist(), stds.tolist()).eval()
    images = torch.rand(7, 3, 2, 2)
    expected = [
        (network((images - mean[:, None, None]) / std[:, None, None]) / temperature).softmax(1)
        for network, temperature, mean, std in zip(networks, temperatures, means, stds, strict=True)
    ]
    torch.testing.assert_close(ensemble(images).exp(), torch.stack(expected).mean(0))
    assert list(ensemble.state_dict()) == [f"members.{i}.1.{name}" for i in range(3) for name in ("weight", "bias")]
