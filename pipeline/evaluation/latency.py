"""How long a network takes for one image."""

import statistics
import time

import torch
from torch import nn

from pipeline.evaluation.logits import autocast


@torch.inference_mode()
def latency_ms(network: nn.Module, image_size: int, precision: str, repeats: int = 20) -> float:
    """Median milliseconds from one normalised image on the device to its class, after three warm-up passes."""
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    image = torch.zeros(1, 3, image_size, image_size, device=device).contiguous(memory_format=torch.channels_last)
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        with autocast(device, precision):
            network(image).argmax().item()  # the transfer waits for the device
        times.append(time.perf_counter() - start)
    network.train(was_training)
    return statistics.median(times[3:]) * 1000
