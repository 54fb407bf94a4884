"""Several studies on one page, and who leads by how much."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
from conftest import Trained
from playwright.sync_api import Browser

from pipeline.report.comparison_page import _fields, _values_of_best_quarter, studies_page
from pipeline.report.control_comparison import Comparison
from pipeline.report.render import write
from pipeline.report.trials import choose, table, table_of
from pipeline.tracking.tracker import MlflowTracker
from report.helpers import Store, body, opened, page_of, trial_row


def test_studies_stand_beside_each_other(store: Store, browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "both.html"
    write(page_of(store, "odd", "sad"), file)
    page, heard = opened(browser, file, 390)
    assert heard == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    cells = page.locator("#s1 td").all_inner_texts()
    assert {"odd-v1-digits", "sad-v1-digits", "2 failed", "none"} <= set(cells)


def test_a_control_that_is_the_best_stands_as_such_beside_other_studies(store: Store) -> None:
    tracker = MlflowTracker(store.home)
    studies = choose(tracker, ["odd", "sad"])
    frame = table(tracker, studies)
    frame.loc[frame["run_id"] == store.control, "score"] = 0.95
    said = body(studies_page(tracker, studies, frame, {}))
    assert "0.9500 (trial 0)" in said and "trial 0, val/accuracy 0.9500" in said


def test_an_incomparable_study_does_not_silence_the_others(trained: Trained, tmp_path: Path) -> None:
    """Three names of one study; the third has other images, and the highest score."""
    trained.copy(tmp_path / "mlruns")
    tracker = MlflowTracker(tmp_path / "mlruns")
    [study] = choose(tracker, ["tiny"])
    frame = table(tracker, [study])
    best = tracker.client.get_run(trained.finished)
    tags = best.data.tags | {"split_digest": "0" * 64}
    other = tracker.client.create_run(study.experiment, tags=tags).info.run_id
    elsewhere = frame.assign(study="elsewhere", score=frame["score"] + 0.1, run_id=[other, *frame["run_id"][1:]])
    both = pd.concat([frame, frame.assign(study="twin"), elsewhere], ignore_index=True)
    studies = [study, replace(study, name="twin"), replace(study, name="elsewhere")]
    said = body(studies_page(tracker, studies, both, {}))
    assert "tiny-v1-digits has the highest score, as high as that of twin: trial 0" in said
    assert "Beside twin's best, trial 0: +0.00 points (95 % interval" in said
    assert "elsewhere: judged by other images or another metric than every other study, so its score can't be" in said
    assert "elsewhere has the highest score" not in said


def test_a_study_beside_itself_under_another_name_leads_by_nothing(trained: Trained) -> None:
    tracker = MlflowTracker(trained.home)
    [study] = choose(tracker, ["tiny"])
    frame = table(tracker, [study])
    twin = replace(study, name="twin-v1-digits")
    both = pd.concat([frame, frame.assign(study=twin.name)], ignore_index=True)
    said = body(studies_page(tracker, [study, twin], both, {}))
    assert "tiny-v1-digits has the highest score, as high as that of twin-v1-digits" in said
    assert "+0.00 points (95 % interval -1.34 to +1.34, n = 144 validation images, paired; exact McNemar p = 1)" in said


def test_recipes_have_no_empty_row_and_no_bracket_of_one_trial() -> None:
    """Of four trials the best quarter is the best one itself; the best recipes' schedules may have no warmup at all."""
    rows = [trial_row(n, 0.5 + n / 100) | {"schedule.warmup": float("nan") if n == 3 else n} for n in range(4)]
    few = table_of(rows)
    best = Comparison(few.iloc[3], "best", None, None, None, None)
    groups, scored = {"a": few, "b": few.assign(study="b")}, {"a": best, "b": best}
    assert dict(_fields(groups, scored)) == {"optimizer.lr": ["0.375"] * 2, "optimizer.name": ["adam"] * 2}
    many = table_of([trial_row(n, 0.5 + n / 100) for n in range(8)])
    assert _values_of_best_quarter(many, "optimizer.lr") == " (0.75 to 0.875)"
