"""Schedules: values by hand, torch's own schedulers, and properties."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from pipeline.sections.schedule import Constant, Cosine, Linear, OneCycle, Schedule, Step
from pipeline.training.schedules import lr_factor

fractions = st.floats(0, 1)
warmups = st.floats(0, 1, exclude_max=True)
one_cycles = st.builds(OneCycle, initial_fraction=fractions, peak=st.floats(0.001, 0.999), final_fraction=fractions)
to_a_final_rate = st.one_of(
    st.builds(Cosine, warmup=warmups, final_fraction=fractions),
    st.builds(Linear, warmup=warmups, final_fraction=fractions),
    one_cycles,
)
schedules = st.one_of(
    to_a_final_rate,
    st.builds(Constant, warmup=warmups),
    st.builds(Step, warmup=warmups, interval=st.floats(0.001, 1), gamma=st.floats(0.01, 1)),
)
lengths = st.integers(2, 200)
unhurried = settings(deadline=None)  # a loaded machine is no fault


def factors(schedule, total):
    return [lr_factor(schedule, step, total) for step in range(total)]


def torch_rates(scheduler, total, **settings):
    """The rates of `total` steps under one of torch's schedulers, from a rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = scheduler(optimizer, **settings)
    rates = []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            schedule.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), [1, 1, 1, 1]),
        (Constant(warmup=0.5), [1 / 3, 2 / 3, 1, 1]),
        (Linear(), [1, 0.75, 0.5, 0.25, 0]),
        (Linear(final_fraction=0.2), [1, 0.8, 0.6, 0.4, 0.2]),
        (Linear(warmup=0.4), [1 / 3, 2 / 3, 1, 0.5, 0]),
        (Linear(warmup=0.99), [0.25, 0.5, 0.75, 1, 0]),
        (Cosine(), [1, 0.75, 0.25, 0]),
        (Cosine(final_fraction=0.5), [1, 0.875, 0.625, 0.5]),
        (Cosine(warmup=2 / 7), [1 / 3, 2 / 3, 1, 0.8535533905932737, 0.5, 0.14644660940672624, 0]),
        (OneCycle(initial_fraction=0.2, peak=0.5), [0.2, 0.6, 1, 0.75, 0.25, 0]),
        (OneCycle(initial_fraction=0.2, peak=0.5, final_fraction=0.1), [0.2, 0.6, 1, 0.775, 0.325, 0.1]),
        (Step(interval=0.5), [1, 1, 1, 0.1, 0.1, 0.1]),
        (Step(interval=0.25, gamma=0.5), [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125]),
        (Step(interval=0.25, gamma=0.5, warmup=0.25), [1 / 3, 2 / 3, 1, 1, 0.5, 0.5, 0.25, 0.25]),
        (Step(interval=1.0), [1, 1, 1]),
    ],
)
def test_factors_equal_those_by_hand(schedule, expected):
    assert factors(schedule, len(expected)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("final", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("total", [2, 3, 50])
def test_cosine_equals_torchs_cosine_annealing(final, total):
    expected = torch_rates(lr_scheduler.CosineAnnealingLR, total, T_max=total - 1, eta_min=final)
    assert factors(Cosine(final_fraction=final), total) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("total", "peak"), [(10, 0.3), (50, 0.3), (50, 0.5), (200, 0.04), (60, 0.9)])
def test_one_cycle_equals_torchs(total, peak):
    settings = {
        "total_steps": total,
        "pct_start": peak,
        "div_factor": 25,
        "final_div_factor": 40,
        "cycle_momentum": False,
    }
    expected = torch_rates(lr_scheduler.OneCycleLR, total, max_lr=1.0, **settings)
    ours = OneCycle(initial_fraction=1 / 25, peak=peak, final_fraction=1 / 25 / 40)
    assert factors(ours, total) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("total", [10, 97, 100])
def test_step_equals_torchs_step_at_every_interval(total):
    for interval in range(1, total + 1):
        expected = torch_rates(lr_scheduler.StepLR, total, step_size=interval, gamma=0.5)
        assert factors(Step(interval=interval / total, gamma=0.5), total) == pytest.approx(expected), interval


def test_warm_up_then_decay_equals_torchs_sequence():
    def sequence(optimizer):
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / 11, total_iters=10)
        fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=29)
        return lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[10])

    assert factors(Cosine(warmup=0.25), 40) == pytest.approx(torch_rates(sequence, 40), abs=1e-12)


@unhurried
@given(schedules, lengths)
def test_factors_lie_in_0_to_1_and_reach_1(schedule, total):
    values = factors(schedule, total)
    assert all(0 <= value <= 1 for value in values)
    assert max(values) == 1


@unhurried
@given(to_a_final_rate, lengths)
def test_last_step_has_exactly_the_final_fraction(schedule, total):
    assert lr_factor(schedule, total - 1, total) == schedule.final_fraction


@unhurried
@given(schedules, lengths)
def test_rate_rises_to_the_peak_and_falls_after_it(schedule, total):
    values = factors(schedule, total)
    peak = values.index(1.0)
    rounding = 1e-12
    assert all(after >= before - rounding for before, after in pairwise(values[: peak + 1]))
    assert all(after <= before + rounding for before, after in pairwise(values[peak:]))


@unhurried
@given(schedules, lengths)
def test_no_step_jumps_by_more_than_the_slope(schedule, total):
    values = factors(schedule, total)
    peak, fall_starts = values.index(1.0), total - 1 - values[::-1].index(1.0)  # a flat rise or fall stays at 1
    rise = (
        math.pi / 2 * (1 - schedule.initial_fraction) / max(peak, 1)
        if isinstance(schedule, OneCycle)
        else 1 / (peak + 1)
    )
    if isinstance(schedule, Constant):
        fall = 0.0
    elif isinstance(schedule, Step):
        fall = 1 - schedule.gamma ** math.ceil(1 / (schedule.interval * total))
    else:
        curve = 1 if isinstance(schedule, Linear) else math.pi / 2
        fall = curve * (1 - schedule.final_fraction) / max(total - 1 - fall_starts, 1)
    for step, (before, after) in enumerate(pairwise(values)):
        assert abs(after - before) <= (rise if step < peak else fall) + 1e-12, step


@unhurried
@given(st.sampled_from([Constant, Cosine, Linear, Step]), warmups, lengths)
def test_first_step_has_a_rate_above_0(kind, warmup, total):
    assert lr_factor(kind(warmup=warmup), 0, total) > 0


@unhurried
@given(schedules)
def test_training_of_one_step_has_the_highest_rate(schedule):
    assert factors(schedule, 1) == [1.0]


@pytest.mark.parametrize("step", [-1, 5])
def test_step_outside_the_training_is_an_assertion(step):
    with pytest.raises(AssertionError, match=f"step {step} of 5"):
        lr_factor(Constant(), step, 5)


def test_unknown_kind_of_schedule_is_refused() -> None:
    class Unknown(Schedule):
        pass

    with pytest.raises(TypeError, match="type Unknown"):
        lr_factor(Unknown(), 0, 5)  # type: ignore[arg-type]
