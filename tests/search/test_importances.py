"""Importances find what matters, in studies with conditional parameters too, and say nothing where nothing is known."""

import random

from pipeline.search.importances import importance_function, num_top


def test_the_parameter_that_makes_the_score_comes_first() -> None:
    dice = random.Random(0)
    params = [
        {"a.lr": 10 ** dice.uniform(-4, -1), "a.noise": dice.random(), "a.name": dice.choice(["x", "y"])}
        for _ in range(60)
    ]
    found = importance_function(params)([-abs(trial["a.lr"] - 0.01) for trial in params])
    assert list(found)[0] == "a.lr" and found["a.lr"] > 0.5
    assert abs(sum(found.values()) - 1) < 1e-9


def test_trials_may_lack_parameters() -> None:
    params = [{"a.kind": "x", "a.only": n / 20} if n % 2 else {"a.kind": "y"} for n in range(20)]
    found = importance_function(params)([1.0 + n / 100 if n % 2 else 0.0 for n in range(20)])
    assert set(found) == {"a.kind", "a.only"}


def test_nothing_is_said_of_few_or_equal_scores() -> None:
    params = [{"a.b": n} for n in range(10)]
    assert importance_function(params[:3])([0.1, 0.2, 0.3]) == {}
    assert importance_function(params)([0.5] * 10) == {}
    assert importance_function([{}] * 10)(list(map(float, range(10)))) == {}


def test_the_best_are_a_tenth_and_five_of_few() -> None:
    assert [num_top(n) for n in (4, 10, 24, 50, 200)] == [2, 5, 5, 5, 20]


def test_equal_shares_come_in_the_order_of_their_names() -> None:
    names = [f"a.{letter}" for letter in "hgfedcba"]
    params = [dict.fromkeys(names, 1) | {"b.told": n % 2} for n in range(20)]
    assert list(importance_function(params)([float(n % 2) for n in range(20)])) == ["b.told", *sorted(names)]
