"""The command `compare`."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import NO_RETRIES, Trained, run_forked, run_pipeline

from cli.helpers import assert_refused
from pipeline.cli.compare import after_compare, page_name
from pipeline.tracking import queries
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker


def test_server_that_goes_away_is_one_line(fading_server: str, tmp_path: Path) -> None:
    done = run_forked("compare", "attention", "--tracking-uri", fading_server, cwd=tmp_path, **NO_RETRIES)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: MLflow: does not answer any more (API request to {fading_server}/")
    assert line.endswith("; once it does, the same command resumes")


def test_compare_prints_the_best_trials_and_writes_a_page(trained: Trained, tmp_path: Path) -> None:
    done = run_pipeline("compare", "tiny", "--output", str(tmp_path / "t.html"), cwd=trained.home.parent, COLUMNS="100")
    assert done.returncode == 0, done.stderr
    table, _, links = done.stdout.partition("page: ")
    assert "tiny-v1-digits: best 1 of 2 trials, 1 full, 1 pruned" in table
    assert re.search(r"^ *0( \(control\))? +0\.\d{4} .+ \(0\.\d{3}\) +\d+\.\d s +[\d,]+ *$", table, re.MULTILINE)
    assert max(map(len, table.splitlines()[1:])) <= 100
    assert links.startswith(f"{tmp_path / 't.html'} (") and "#/experiments/1/runs?workflowType=" in links
    assert "pipeline finals tiny" in links and "pipeline promote tiny" in links
    assert (tmp_path / "t.html").read_text().startswith("<!DOCTYPE html>")

    wrong = run_forked("compare", "tiny", "tinny", cwd=trained.home.parent)
    assert wrong.returncode == 2 and "tinny" in wrong.stderr
    folder = run_forked("compare", "tiny", "--output", str(tmp_path), cwd=trained.home.parent)
    assert folder.returncode == 2 and "is a folder; name a file" in folder.stderr
    assert not (trained.home / "reports").exists()


def test_names_of_pages_are_legal_and_short() -> None:
    assert page_name(["attention-v1-digits"]) == "attention-v1-digits.html"
    assert page_name(["a-v1-x", "b-v1-x"]) == "a-v1-x+b-v1-x.html"
    assert page_name(["../../etc/x y"]) == "etc-x-y.html"
    long = [page_name([f"study{n}-v1-cifar10" for n in range(count)]) for count in (20, 21)]
    assert len(set(long)) == 2 and all(len(name) < 130 for name in long)


def test_next_step_follows_what_is_decided_and_promoted() -> None:
    study = StudyRuns("s-v1-digits", "", "", "val/accuracy", None)
    assert [*after_compare(study, False, []).values()] == ["finals s-v1-digits", "promote s-v1-digits"]
    assert [*after_compare(study, True, []).values()] == ["promote s-v1-digits"]
    assert [*after_compare(study, True, ["m@previous"]).values()] == ["promote s-v1-digits"]
    predict = "predict IMAGE --model models:/m@champion"
    assert [*after_compare(study, True, ["m@champion", "m@other"]).values()] == [predict]
    stopped = replace(study, is_open=True)
    assert [*after_compare(stopped, True, ["m@champion"]).values()] == ["study s", predict]


def test_unfinished_study_names_its_plan_and_what_resumes_it(trained: Trained, tmp_path: Path) -> None:
    """On the terminal and on the page, which also has the other steps as the user types them."""
    trained.copy(tmp_path / "mlruns")
    tracker = MlflowTracker(tmp_path / "mlruns")
    [study] = queries.find_studies(tracker, "tiny")
    tracker.client.set_tag(study.parent, "state", "interrupted")
    tracker.client.set_tag(study.parent, "planned_trials", "24")
    done = run_forked("compare", "tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "best 1 of 2 trials, 1 full, 1 pruned, 24 planned" in done.stdout
    page = (tmp_path / "mlruns" / "reports" / "tiny-v1-digits.html").read_text()
    for command in ("study tiny", "finals tiny-v1-digits", "promote tiny-v1-digits", "ui"):
        assert f"<code>python -m pipeline {command}</code>" in page
        assert f"python -m pipeline {command}" in done.stdout
    assert "1 full, 1 pruned, 24 planned; " in " ".join(page.split())


def test_compare_needs_trials(trained: Trained, tmp_path: Path) -> None:
    trained.copy(tmp_path / "mlruns")
    tracker = MlflowTracker(tmp_path / "mlruns")
    tracker.open_study("bare-v1-digits", "?", "val/accuracy", []).end(State.FINISHED)
    assert tracker.flush(30)
    bare = run_forked("compare", "tiny bare", cwd=tmp_path)
    assert (
        bare.returncode == 2
        and "error: bare-v1-digits: has no trials yet; `python -m pipeline study NAME` runs some" in bare.stderr
    )
    assert not bare.stdout and not (tmp_path / "mlruns" / "reports").exists()


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            ["compare", "attention"],
            ["no runs yet in mlruns; `python -m pipeline study NAME --dataset digits` makes some"],
        ),
        (["compare", " "], ["NAME: needs a study; type `python -m pipeline compare NAME`"]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
