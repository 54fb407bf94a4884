"""The learning rate of each step, as a fraction of the recipe's."""

import math

from pipeline.sections.schedule import AnySchedule, Constant, Cosine, Linear, OneCycle, Step


def lr_factor(schedule: AnySchedule, step: int, total_steps: int) -> float:
    """What the recipe's rate, the highest one, is multiplied by in `step` (from 0) of `total_steps`: in [0, 1].

    A warm-up of W steps rises by 1 / (W + 1) from there, so that no step is spent at rate 0; the first step after it
    has the highest rate and starts the decay, and the last step has exactly `final_fraction`. Lengths are rounded
    to whole steps; the peak and the last step always keep one each, so a training of one step has the highest rate.
    As torch's CosineAnnealingLR (T_max = total_steps - 1), OneCycleLR (its peak is the last step of the rise) and
    StepLR, where their fields mean the same.
    """
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    rise = schedule.peak * total_steps - 1 if isinstance(schedule, OneCycle) else schedule.warmup * total_steps
    peak = min(max(round(rise), 0), max(total_steps - 2, 0))
    if step < peak:
        if isinstance(schedule, OneCycle):
            return _cosine(schedule.initial_fraction, 1.0, step / peak)
        return (step + 1) / (peak + 1)
    progress = (step - peak) / max(total_steps - 1 - peak, 1)
    match schedule:
        case Constant():
            return 1.0
        case Step():
            # The tolerance: 7 / (0.07 * 100) is 0.9999999999999999, and the seventh step must drop all the same.
            return schedule.gamma ** math.floor((step - peak) / (schedule.interval * total_steps) + 1e-9)
        case Linear():
            return _between(1.0, schedule.final_fraction, progress)
        case Cosine() | OneCycle():
            return _cosine(1.0, schedule.final_fraction, progress)
    raise TypeError(f"no schedule is known for a section of type {type(schedule).__name__}")


def _between(start: float, end: float, progress: float) -> float:
    """On the straight line; exactly `start` at 0 and `end` at 1."""
    return start * (1 - progress) + end * progress


def _cosine(start: float, end: float, progress: float) -> float:
    """On half a cosine; exactly `start` at 0 and `end` at 1."""
    return _between(start, end, (1 - math.cos(math.pi * progress)) / 2)
