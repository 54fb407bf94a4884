"""Threads that work ahead."""

import threading

import pytest

from pipeline.data.ahead import ahead


def test_results_come_in_order_and_never_far_ahead() -> None:
    started: list[int] = []

    def double(number: int) -> int:
        started.append(number)
        return 2 * number

    results = ahead(double, range(20), threads=3, depth=4)
    for number in range(20):
        assert next(results) == 2 * number
        assert len(started) <= number + 4
    assert next(results, None) is None


def test_an_error_is_raised_in_the_place_of_its_result() -> None:
    results = ahead(lambda number: 6 // number, [3, 2, 0, 1], threads=2, depth=3)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_who_stops_early_leaves_no_thread() -> None:
    before = threading.active_count()
    results = ahead(abs, range(1000), threads=2, depth=5)
    next(results)
    results.close()
    assert threading.active_count() == before
