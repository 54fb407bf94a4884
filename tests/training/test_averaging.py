import copy

import pytest
import torch
from torch import nn

from pipeline.data.augment import normalise
from pipeline.training.averaging import WeightAverage, mean_weights, measure_norms


def convnet(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return nn.Sequential(*layers).to(dtype=dtype, memory_format=torch.channels_last)


@torch.no_grad()
def a_step(network, generator):
    """Move weights, running statistics and the count of batches, as a training step does."""
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        else:
            tensor += 1


@pytest.mark.parametrize(
    ("dtype", "on_device"), [(torch.float32, False), (torch.float64, False), (torch.float32, True)]
)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_fifty_updates_equal_a_plain_loop_over_tensors(dtype, on_device, decay):
    network, generator = convnet(dtype), torch.Generator().manual_seed(1)
    average = WeightAverage(network, decay, on_device)
    expected = {name: tensor.double().clone() for name, tensor in network.state_dict().items()}
    for t in range(50):
        a_step(network, generator)
        average.update(network)
        kept = min(decay, (1 + t) / (10 + t))
        for name, tensor in network.state_dict().items():
            expected[name] = kept * expected[name] + (1 - kept) * tensor.double()
    precision = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    averaged = average.network.state_dict()
    for name, tensor in averaged.items():
        if tensor.is_floating_point():
            assert tensor.dtype == dtype
            torch.testing.assert_close(tensor.double(), expected[name], **precision, msg=name)
    assert not torch.equal(averaged["1.running_mean"], torch.zeros(8)), "the buffers must have moved"
    assert averaged["1.num_batches_tracked"] == 50
    assert average.state_dict()["updates"] == 50


def test_decay_0_follows_the_network_bit_for_bit():
    network, generator = convnet(), torch.Generator().manual_seed(1)
    average = WeightAverage(network, 0.0)
    for _ in range(3):
        a_step(network, generator)
        average.update(network)
    for name, tensor in network.state_dict().items():
        assert torch.equal(average.network.state_dict()[name], tensor), name


def test_averaged_network_is_a_frozen_copy_in_eval_mode():
    network = convnet().train()
    average = WeightAverage(network, 0.9)
    average.update(network)
    assert network.training
    assert not any(module.training for module in average.network.modules())
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    pairs = list(zip(network.parameters(), average.network.parameters(), strict=True))
    assert all(mine.data_ptr() != copied.data_ptr() for mine, copied in pairs)
    assert all(mine.stride() == copied.stride() for mine, copied in pairs)
    assert average.network[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_tied_weights_are_averaged_once():
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    network[1].weight = network[0].weight
    average = WeightAverage(network, 0.9)
    before = network[0].weight.detach().clone()
    with torch.no_grad():
        network[0].weight += 1
    average.update(network)
    assert average.network[0].weight is average.network[1].weight
    torch.testing.assert_close(average.network[0].weight.detach(), before + 0.9)  # the first update keeps 1 / 10


@pytest.mark.parametrize("on_device", [False, True])
def test_loaded_average_continues_as_if_uninterrupted(on_device):
    network, generator = convnet(), torch.Generator().manual_seed(1)
    average = WeightAverage(network, 0.999, on_device)
    for _ in range(4):
        a_step(network, generator)
        average.update(network)
    resumed = WeightAverage(convnet(), 0.999, on_device)
    resumed.load_state_dict(copy.deepcopy(average.state_dict()))
    for _ in range(4):
        a_step(network, generator)
        average.update(network)
        resumed.update(network)
    for name, tensor in average.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], tensor), name
    assert average.state_dict()["updates"] == resumed.state_dict()["updates"] == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_update_never_waits_for_the_gpu():
    network = convnet().cuda()
    average = WeightAverage(network, 0.9)
    average.update(network)
    torch.cuda.set_sync_debug_mode("error")
    try:
        average.update(network)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_mean_weights_are_the_mean_of_each_tensor():
    networks, generator = [convnet() for _ in range(3)], torch.Generator().manual_seed(2)
    for number, network in enumerate(networks):
        for _ in range(number):
            a_step(network, generator)
    mean = mean_weights(networks)
    assert mean["1.num_batches_tracked"] == 0
    for name in ("0.weight", "1.running_var", "5.bias"):
        parts = [network.state_dict()[name] for network in networks]
        torch.testing.assert_close(mean[name], sum(parts) / 3)


def test_norms_are_measured_on_images_without_dropout_or_memory():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.BatchNorm2d(4, momentum=0.3)).train()
    images = torch.randint(0, 256, (1100, 3, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    measure_norms(network, images, mean, std, "fp32")
    chunks = [images[first::3] for first in range(3)]
    features = [network[0](normalise(chunk, mean, std)).transpose(0, 1).flatten(1) for chunk in chunks]
    torch.testing.assert_close(network[2].running_mean, torch.stack([f.mean(1) for f in features]).mean(0))
    torch.testing.assert_close(network[2].running_var, torch.stack([f.var(1) for f in features]).mean(0))
    assert not network.training and not network[2].training and network[2].momentum == 0.3


def test_norms_are_measured_alike_whatever_the_order_and_number_of_images():
    """Classes lie one after the other in a folder; a last batch of one image would count as much as all others."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(192))
    images = torch.zeros(1001, 3, 8, 8, dtype=torch.uint8)
    images[500:] = 255
    measure_norms(network, images, torch.zeros(3), torch.ones(3), "fp32")
    for norm, size in ((network[0], 3), (network[2], 192)):
        torch.testing.assert_close(norm.running_mean, torch.full((size,), 0.5 * (size == 3)), atol=5e-3, rtol=0)
        torch.testing.assert_close(norm.running_var, torch.full((size,), 0.25 if size == 3 else 1.0), atol=0.01, rtol=0)
