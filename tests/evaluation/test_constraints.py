"""Upper bounds, on numbers."""

import pytest

from pipeline.evaluation.constraints import excess, nearest, violations

BOUNDS = {"model/parameters": 1000, "model/latency_ms": 2.5}


@pytest.mark.parametrize(
    ("metrics", "broken"),
    [
        ({"model/parameters": 1000.0, "model/latency_ms": 2.5}, ""),
        ({"model/parameters": 123_456.0}, "model/parameters 123,456, at most 1,000"),
        ({"model/latency_ms": 2.71828, "val/loss": 9.0}, "model/latency_ms 2.718, at most 2.5"),
        (
            {"model/parameters": 1001.0, "model/latency_ms": 3.0},
            "1,001, at most 1,000; model/latency_ms 3, at most 2.5",
        ),
        ({}, ""),  # what was not measured breaks nothing
    ],
)
def test_each_broken_bound_is_named_with_its_value(metrics: dict[str, float], broken: str) -> None:
    assert violations(BOUNDS, metrics).endswith(broken) and bool(violations(BOUNDS, metrics)) == bool(broken)


def test_excess_is_at_most_0_where_a_bound_is_kept() -> None:
    assert excess(BOUNDS, {"model/parameters": 900.0, "model/latency_ms": 3.0}) == {
        "model/parameters": -100.0,
        "model/latency_ms": 0.5,
    }


def test_nearest_weighs_bounds_by_their_size() -> None:
    far, near = {"model/parameters": 1100.0, "model/latency_ms": 5.0}, {"model/parameters": 1900.0}
    assert nearest(BOUNDS, [("trial 1", far), ("trial 2", near)]) == "trial 2 (model/parameters 1,900, at most 1,000)"
