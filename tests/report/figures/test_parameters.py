"""Figures of the searched parameters say what the table holds."""

import pandas as pd
import pytest

from pipeline.report.analysis import Effects
from pipeline.report.figures import parameters
from pipeline.report.trials import table_of
from report.helpers import trial_row


def test_importance_names_what_is_above_chance() -> None:
    shares = pd.DataFrame(
        [("optimizer.lr", 0.7, 0.5), ("loss.label_smoothing", 0.3, 0.4)], columns=["parameter", "importance", "chance"]
    )
    figure = parameters.importance(shares)
    assert list(figure.data[0].x) == [0.3, 0.7], "the first on top"
    assert figure.layout.meta == (
        "Above what chance gives: optimizer.lr, of 2 parameters; about 0.1 would be by chance alone."
    )


def test_importance_says_that_it_draws_some() -> None:
    shares = pd.DataFrame({"parameter": [f"a.p{n}" for n in range(16)], "importance": 1 / 16, "chance": 0.5})
    figure = parameters.importance(shares)
    assert len(figure.data[0].x) == 12
    assert str(figure.layout.meta).endswith("about 0.8 would be by chance alone; the 12 largest are drawn.")


def test_parallel_draws_a_line_per_trial_past_what_it_lacks() -> None:
    rows = [trial_row(n, 0.9 - n / 100, control=n == 0) for n in range(16)]
    for number, row in enumerate(rows):  # the best quarter has adam, and the last trial no momentum
        row |= {"optimizer.name": "adam" if number < 4 else "sgd", "optimizer.lr": 10.0 ** -(number % 4)}
        row["optimizer.momentum"] = float("nan") if number == 15 else number / 16
        row["val/accuracy"] = row["score"]
    frame = table_of(rows)
    figure = parameters.parallel(frame, ["optimizer.name", "optimizer.lr", "optimizer.momentum"])
    best, last = figure.data[-1], figure.data[0]
    assert (best.name, last.name) == ("best quarter", "last quarter")
    assert list(best.x)[:4] == [0, 1, 0, None] and list(best.y)[:4] == [3, 2, 1, None]
    assert list(best.x)[5] == pytest.approx(2 / 3), "a wide range is on a log scale"
    assert len(last.x) == 3 * 4 + 3, "three axes and a gap, or two"
    assert best.hovertext[0] == "trial 0, 0.9000: optimizer adam"
    assert figure.layout.meta == (
        "What marks the best 4 of 16 trials by rank: optimizer adam (100%, of the others 0%)."
    )


@pytest.mark.parametrize(
    ("trials", "line"), [(12, "Too few trials (3 in the best quarter) to say"), (16, "No single choice")]
)
def test_few_trials_are_not_said_to_have_nothing_in_common(trials: int, line: str) -> None:
    """Of twelve the best three alone may have adam; of sixteen that none of them marks is a finding."""
    rows = [trial_row(n, 0.9 - n / 100) | {"val/accuracy": 0.9 - n / 100} for n in range(trials)]
    alone = range(3) if trials == 12 else range(0, trials, 2)
    for number, row in enumerate(rows):
        row |= {"optimizer.name": "adam" if number in alone else "sgd"}
    assert str(parameters.parallel(table_of(rows), ["optimizer.name"]).layout.meta).startswith(line)


def test_a_short_trial_is_not_called_pruned_where_one_points_at_it() -> None:
    rows = [trial_row(n, 0.5) for n in range(2)]
    rows += [trial_row(n, float("nan")) | {"state": "pruned", "short": n == 2} for n in (2, 3)]
    frame = table_of([row | {"val/accuracy": 0.4} for row in rows])
    texts = {
        text.split(":")[0] for trace in parameters.parallel(frame, ["optimizer.lr"]).data for text in trace.hovertext
    }
    assert {"trial 2, 0.4000 as a short trial, after epoch 2", "trial 3, 0.4000 when pruned after epoch 2"} < texts


def test_effects_tell_clear_ones_from_the_others() -> None:
    heads = ["parameter", "level", "reference", "n", "pruned", "effect", "low", "high"]
    clear = ("optimizer.name", "adam", "sgd (the most frequent)", 9, 1, 0.02, 0.01, 0.03)
    unclear = ("optimizer.lr", "0.1", "0.2", 5, 0, 0.01, -0.01, 0.03)
    figure = parameters.effect(Effects(pd.DataFrame([clear, unclear], columns=heads), 0.5, 20))
    assert [(trace.name, list(trace.x)) for trace in figure.data] == [
        ("interval leaves 0 out", [2.0]),
        ("interval holds 0", [1.0]),
    ]
    assert figure.layout.meta == (
        "By the score, 1 of 2 choices differ from what they are compared with by more than the noise of 20 trials."
    )
    assert any(note.text == "optimizer <b>adam</b>, not sgd*" for note in figure.layout.annotations)
