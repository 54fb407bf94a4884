"""What is said of noise holds where the truth is known."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from pipeline.report.analysis import effects, finals, importances, lead, pareto
from pipeline.report.stored import Predictions

RNG = np.random.default_rng(0)


def predictions(answers: np.ndarray, labels: np.ndarray) -> Predictions:
    return Predictions(np.arange(len(labels)), labels, np.eye(10)[answers], tuple("abcdefghij"))


def study(trials: int, seed: int, strength: float) -> pd.DataFrame:
    """Random trials of three parameters; only `optimizer.name` = adam adds to the score."""
    dice = np.random.default_rng(seed)
    name = dice.choice(["sgd", "adam"], trials)
    name[0] = "sgd"
    return pd.DataFrame(
        {
            "study": "s",
            "trial": range(trials),
            "objective": "val/accuracy",
            "epochs": 4,
            "run_id": [f"r{n}" for n in range(trials)],
            "role": "trial",
            "state": "finished",
            "infeasible": "",
            "short": False,
            "full_of": pd.NA,
            "control": [n == 0 for n in range(trials)],
            "optimizer.name": name,
            "optimizer.lr": 10 ** dice.uniform(-4, -1, trials),
            "augmentation.rotation": dice.choice([0.0, 5.0, 10.0], trials),
            "score": 0.8 + strength * (name == "adam") + 0.01 * dice.standard_normal(trials),
        }
    )


def test_a_lead_is_that_of_the_pairs_and_its_interval_holds_the_truth() -> None:
    labels = RNG.integers(10, size=2000)
    held = 0
    for _ in range(200):
        right = RNG.random((2, 2000)) < [[0.8], [0.77]]
        first, second = (predictions(np.where(r, labels, (labels + 1) % 10), labels) for r in right)
        found = lead(first, second, "val/accuracy")
        assert found is not None
        assert found.difference == pytest.approx(right[0].mean() - right[1].mean())
        assert (found.only_first, found.only_second) == ((right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum())
        held += found.low <= 0.03 <= found.high
    assert 180 <= held <= 199


def test_luck_is_what_the_best_of_equal_models_leads_by() -> None:
    labels, trials, leads, lucks = np.zeros(1000, int), 20, [], []
    for _ in range(150):
        wrong = (RNG.random((trials + 1, 1000)) > 0.8).astype(int)
        best = wrong[wrong[1:].sum(1).argmin() + 1]
        found = lead(predictions(best, labels), predictions(wrong[0], labels), "val/accuracy", trials)
        assert found is not None
        leads.append(found.difference)
        lucks.append(found.luck)
    assert np.mean(lucks) == pytest.approx(np.mean(leads), rel=0.15)


def test_the_verdict_knows_noise_from_luck_from_more() -> None:
    def found(only_first: int, only_second: int, trials: int, images: int = 10_000) -> str:
        place, labels = np.arange(images), np.zeros(images, int)
        first, second = (place < only_second).astype(int), (place >= images - only_first).astype(int)
        gap = lead(predictions(first, labels), predictions(second, labels), "val/accuracy", trials)
        assert gap is not None
        assert (gap.low <= 0 <= gap.high) == gap.verdict.startswith("within"), "as the interval beside it"
        return gap.verdict

    assert found(510, 500, 1).startswith("within the noise")
    assert found(570, 500, 1).startswith("more than the noise")
    assert found(570, 500, 24).startswith("no more than the best of so many")
    assert found(800, 500, 1000).startswith("more than the noise")
    assert found(500, 800, 1000).startswith("more than the noise"), "a loss is no luck"
    assert found(4, 0, 9, images=144).startswith("within the noise")


@pytest.mark.parametrize(("images", "trials"), [(144, 10), (5000, 24)])
def test_best_of_equally_good_trials_rarely_leads_by_more_than_noise(images: int, trials: int) -> None:
    labels, more = np.zeros(images, int), 0
    for _ in range(150):
        wrong = (RNG.random((trials + 1, images)) > 0.9).astype(int)
        best = wrong[wrong[1:].sum(1).argmin() + 1]
        found = lead(predictions(best, labels), predictions(wrong[0], labels), "val/accuracy", trials)
        assert found is not None
        more += found.verdict.startswith("more than")
    assert more <= binom.ppf(0.99, 150, 0.05)


def test_models_of_other_images_are_not_compared() -> None:
    labels = np.arange(10)
    one = predictions(labels, labels)
    other = Predictions(one.ids + 1, labels, one.probabilities, one.classes)
    assert lead(one, other, "val/accuracy") is None


@pytest.mark.parametrize("objective", ["val/f1_macro", "val/balanced_accuracy"])
def test_a_lead_is_one_in_the_objective(objective: str) -> None:
    from sklearn.metrics import balanced_accuracy_score, f1_score

    labels = RNG.integers(10, size=500)
    one, two = (np.where(RNG.random(500) < share, labels, RNG.integers(10, size=500)) for share in (0.9, 0.7))
    found = lead(predictions(one, labels), predictions(two, labels), objective)
    scores = [
        f1_score(labels, answers, average="macro")
        if objective == "val/f1_macro"
        else balanced_accuracy_score(labels, answers)
        for answers in (one, two)
    ]
    assert found is not None and found.difference == pytest.approx(scores[0] - scores[1])
    assert found.low < found.difference < found.high and found.p < 0.001
    reverse = lead(predictions(two, labels), predictions(one, labels), objective)
    assert reverse is not None and reverse.p == pytest.approx(found.p, abs=1e-3)


def test_the_choice_that_works_is_found_and_the_others_are_not() -> None:
    found = effects(study(60, 1, 0.05))
    assert found is not None and found.trials == 60 and found.explained > 0.6
    adam = found.table.set_index("parameter").loc["optimizer.name"]
    assert (adam["level"], adam["reference"]) == ("adam", "sgd")
    assert adam["low"] < 0.05 < adam["high"] and adam["low"] > 0.03
    others = found.table[found.table["parameter"] != "optimizer.name"]
    assert ((others["low"] < 0) & (others["high"] > 0)).mean() > 0.7
    assert set(others["parameter"]) == {"optimizer.lr", "augmentation.rotation"}


def test_intervals_of_no_effect_hold_zero_nineteen_times_in_twenty() -> None:
    held = [
        row["low"] < 0 < row["high"]
        for seed in range(40)
        for _, row in effects(study(24, seed, 0.0)).table.iterrows()  # type: ignore[union-attr]
    ]
    assert np.mean(held) > 0.93


def test_few_or_equal_trials_have_no_effects() -> None:
    assert effects(study(7, 0, 0.1)) is None
    assert effects(study(20, 0, 0.1).assign(score=0.5)) is None
    assert effects(study(20, 0, 0.1).assign(score=np.nan)) is None


def test_without_a_control_a_choice_stands_beside_the_most_frequent() -> None:
    found = effects(study(40, 2, 0.05).assign(control=False))
    assert found is not None and found.table["reference"].str.endswith("(the most frequent)").all()


def test_importances_stand_above_chance_only_where_something_matters() -> None:
    found = importances(study(60, 1, 0.05))
    above = found[found["importance"] > found["chance"]]
    assert list(above["parameter"])[:1] == ["optimizer.name"]
    assert importances(study(3, 1, 0.05)).empty


def test_the_front_is_what_nobody_beats() -> None:
    cost, score = np.array([1.0, 2.0, 3.0, 2.0, 1.0]), np.array([0.5, 0.7, 0.6, 0.7, 0.4])
    front = pareto(cost, score)
    assert front[0] and not front[2] and not front[4] and front.sum() == 2


def test_repeats_of_a_recipe_are_one_row_with_students_interval() -> None:
    runs = study(6, 0, 0.0).assign(role="final", score=[0.8, 0.82, 0.84, 0.7, 0.71, 0.9])
    runs["optimizer.name"] = ["adam"] * 3 + ["sgd"] * 2 + ["adamw"]
    runs[["optimizer.lr", "augmentation.rotation"]] = 0.1
    runs["training.seed"], runs["seconds"] = range(6), 2.0
    repeats = finals(runs)
    assert [repeat.score.n for repeat in repeats] == [3, 2, 1], "one lucky seed does not lead"
    assert [repeat.score.mean for repeat in repeats] == pytest.approx([0.82, 0.705, 0.9])
    assert repeats[2].score.low is None and repeats[0].seconds == 2
    half = 4.302653 * 0.02 / np.sqrt(3)  # t(0.975, 2 degrees)
    assert (repeats[0].score.low, repeats[0].score.high) == pytest.approx((0.82 - half, 0.82 + half))
    assert finals(runs.assign(role="trial")) == []
    runs["data.folds"] = [np.nan, 0, 0] + [0] * 3  # the first is older than that field
    runs["training.execution"] = ["graphed", *["eager"] * 5]  # as where a GPU began
    assert [repeat.score.n for repeat in finals(runs)] == [3, 2, 1]
    runs["data.folds"], half = 3, half * np.sqrt(3 * (1 / 3 + 1 / 2))
    assert finals(runs)[0].score.high == pytest.approx(0.82 + half), "folds share training images"


def test_effects_are_beside_the_choice_of_a_control_that_has_no_such_score() -> None:
    frame = study(40, 2, 0.05)
    base = frame.iloc[0]
    found = effects(frame.assign(score=frame["score"].where(~frame["control"])), base)
    assert found is not None and found.trials == 39
    beside = found.table.set_index("parameter")["reference"]
    assert beside["optimizer.name"] == base["optimizer.name"] == "sgd"


def test_a_choice_that_only_the_control_has_is_no_reference() -> None:
    """No trial with a score has it, or one: the difference from it would be the prior's, or that trial's noise."""
    frame = study(40, 2, 0.05)
    frame.loc[0, "optimizer.name"] = "lamb"
    for score in (np.nan, 0.8):
        frame.loc[0, "score"] = score
        found = effects(frame, frame.iloc[0])
        assert found is not None
        references = set(found.table.set_index("parameter")["reference"].loc[["optimizer.name"]])
        assert references in ({"adam (the most frequent)"}, {"sgd (the most frequent)"})
