"""The rules of finals, on numbers."""

from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.significance import paired_t
from pipeline.recipe import Recipe
from pipeline.registry.racing import ALPHA, Candidate, Final, Racing, choose


def candidates_of(base: Recipe, count: int, **fields: list[Any]) -> list[Candidate]:
    """The first is the control; each with a rate of its own and what `fields` say."""
    made = []
    for number in range(count):
        changes = {name.replace("__", "."): values[number] for name, values in fields.items()}
        recipe = base.changed({"optimizer.lr": 0.01 * (number + 1)} | changes)
        made.append(Candidate(recipe, number, "", number == 0, 0.5, 1.0))
    return made


def raced(candidates: list[Candidate], scores: Any, least_sd: float = 0.0002, notes: list[str] | None = None) -> Racing:
    """Scores (candidates, seeds), NaN where it diverged; stopped ones get no more."""
    notes = [] if notes is None else notes
    table = np.asarray(scores)
    racing = Racing(candidates, table.shape[1], least_sd)
    for seed in range(table.shape[1]):
        while following := racing.following(range(seed + 1)):
            candidate, number = following
            score = float(table[candidate.trial, number])
            final = Final(f"{candidate.trial}/{number}", None if np.isnan(score) else score, 1.0)
            notes += racing.add(candidate, number, final)
        racing.stop_the_beaten()
    return racing


def test_recipe_far_behind_stops_and_the_control_never(small_recipe: Recipe) -> None:
    candidates = candidates_of(small_recipe, 3)
    noise = np.random.default_rng(0).normal(0, 0.001, (3, 5))
    racing = raced(candidates, np.array([[0.80], [0.95], [0.85]]) + noise)
    assert [len(racing.scores(candidate)) for candidate in candidates] == [5, 5, 3]
    assert racing.stopped[candidates[2].digest].startswith("stopped early: 10.")
    assert candidates[0].digest not in racing.stopped
    racing.add(candidates[0], 5, Final("", None, 1.0))
    assert candidates[0] not in racing.eligible() and candidates[0] in racing.running(), "not even one that diverged"


@pytest.mark.parametrize("when", [3, 4])
def test_what_a_recipe_had_beaten_goes_on_where_that_one_diverges(when: int, small_recipe: Recipe) -> None:
    candidates = candidates_of(small_recipe, 4)
    scores = np.array([[0.80], [0.95], [0.85], [0.7]]) + np.random.default_rng(0).normal(0, 0.001, (4, 5))
    scores[1, when] = np.nan
    notes: list[str] = []
    racing = raced(candidates, scores, notes=notes)
    assert [len(racing.scores(candidate)) for candidate in candidates[:3]] == [5, when, 5]
    assert f"{candidates[2].name}: goes on, as {candidates[1].name}, which was ahead of it, can't win" in notes
    assert racing.stopped[candidates[1].digest] == f"diverged with seed {when}"
    best, _, why = choose(racing, dict.fromkeys(racing.finals, 1)) or pytest.fail("nobody")
    assert (best.trial, why) == (2, "beyond the noise"), "not the control, which was never stopped"


def test_infeasible_final_stops_its_recipe_and_the_control_is_trained_on(small_recipe: Recipe) -> None:
    candidates = candidates_of(small_recipe, 3)
    racing = Racing(candidates, 1, 0.0002)
    broken = ("model/parameters 9, at most 8", "model/latency_ms 2, at most 1", "")
    for candidate, infeasible in zip(candidates, broken, strict=True):
        racing.add(candidate, 0, Final("", 0.9 - 0.1 * candidate.trial, 1.0, infeasible))
    assert racing.stopped[candidates[1].digest] == "infeasible with seed 0: model/latency_ms 2, at most 1"
    assert racing.eligible() == [candidates[2]] and racing.running() == [candidates[0], candidates[2]]
    choice = choose(racing, {candidate.digest: 1 for candidate in candidates})
    assert choice and choice[0] is candidates[2] and "every other recipe was stopped" in choice[2], (
        "of the lowest score"
    )


def test_the_only_recipe_of_finals_beat_nobody(small_recipe: Recipe) -> None:
    [alone] = candidates_of(small_recipe, 1)
    racing = Racing([alone], 1, 0.0002)
    racing.add(alone, 0, Final("", 0.9, 1.0, ""))
    assert choose(racing, {alone.digest: 1}) == (alone, [alone], "the only recipe in the finals")


def test_best_recipe_is_stopped_in_at_most_5_percent_of_finals(small_recipe: Recipe) -> None:
    """All are equally good, so that each is the best one: the hardest case."""
    candidates = candidates_of(small_recipe, 4)
    random = np.random.default_rng(1)
    stopped = [bool(raced(candidates, random.normal(0.9, 0.003, (4, 5))).stopped) for _ in range(1000)]
    assert np.mean(stopped) <= 0.05 * 3, "each of the three that can be stopped is the best one in at most 5 %"
    first = [candidates[1].digest in raced(candidates, random.normal(0.9, 0.003, (4, 5))).stopped for _ in range(1000)]
    assert np.mean(first) <= 0.05


def test_equal_differences_of_one_image_prove_nothing(small_recipe: Recipe) -> None:
    image = 1 / 144
    candidates = candidates_of(small_recipe, 2)
    racing = raced(candidates, [[0.9 + image] * 5, [0.9] * 5], least_sd=image)
    assert not racing.stopped
    assert racing.p_value(*candidates) > 0.05


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_are_a_tie(seeds: int, small_recipe: Recipe) -> None:
    candidates = candidates_of(small_recipe, 3)
    racing = raced(candidates, np.repeat([[0.1], [0.9], [0.5]], seeds, axis=1))
    best, tied, why = choose(racing, dict.fromkeys(racing.finals, 1)) or pytest.fail("nobody")
    assert (best.trial, len(tied), why) == (0, 3, "the control, which changes nothing")


def test_difference_beyond_the_noise_wins_at_any_cost(small_recipe: Recipe) -> None:
    candidates = candidates_of(small_recipe, 2)
    racing = raced(candidates, [[0.80, 0.81, 0.79, 0.80], [0.90, 0.91, 0.90, 0.92]])
    best, tied, why = choose(racing, {candidates[0].digest: 1, candidates[1].digest: 1000}) or pytest.fail("nobody")
    assert (best.trial, tied, why) == (1, [candidates[1]], "beyond the noise")


def test_each_look_at_more_seeds_has_a_lower_level(small_recipe: Recipe) -> None:
    candidates = candidates_of(small_recipe, 2)
    racing = raced(candidates, [[0.80, 0.81, 0.79, 0.80], [0.82, 0.82, 0.82, 0.83]])
    flop, p = dict.fromkeys(racing.finals, 1), racing.p_value(*candidates)
    assert 0.05 / 4 < p < 0.05
    tied = [len((choose(racing, flop, looks) or pytest.fail("nobody"))[1]) for looks in (1, 2)]
    assert tied == [1, 2]


def test_equal_recipes_rarely_differ_after_several_looks() -> None:
    random, differ = np.random.default_rng(0), 0
    for _ in range(2000):
        differences = random.standard_normal(10)
        p_values = [paired_t(differences[:seeds].tolist(), 1e-9) for seeds in (3, 5, 10)]
        differ += any(p < ALPHA / look**2 for look, p in enumerate(p_values, start=1))
    assert differ / 2000 < 0.075


def test_tie_goes_to_flop_then_epochs_then_control(small_recipe: Recipe) -> None:
    noisy = [[0.80, 0.90, 0.85], [0.90, 0.81, 0.86], [0.84, 0.89, 0.86]]

    def chosen(flop: list[int], epochs: list[int]) -> tuple[int, str]:
        candidates = candidates_of(small_recipe, 3, training__epochs=epochs)
        racing = raced(candidates, noisy)
        found = choose(racing, {candidate.digest: f for candidate, f in zip(candidates, flop, strict=True)})
        assert found and len(found[1]) == 3
        return found[0].trial, found[2]

    assert chosen([2, 2, 1], [3, 3, 9]) == (2, "cheaper to predict with")
    assert chosen([2, 1, 1], [3, 4, 5]) == (1, "trained in fewer epochs")
    assert chosen([1, 1, 1], [3, 3, 3]) == (0, "the control, which changes nothing")
    assert chosen([2, 1, 1], [3, 3, 3]) == (2, "the higher mean")
