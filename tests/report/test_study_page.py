"""A study's page, in a real browser: its answer, its numbers and its images are those of the store."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Trained
from mlflow.entities import Metric, Param
from playwright.sync_api import Browser

from pipeline.evaluation.significance import Sample
from pipeline.recipe import Recipe
from pipeline.registry.decision import CandidateResult, FinalsDecision, Winner
from pipeline.report.control_comparison import compare_with_control
from pipeline.report.render import write
from pipeline.report.study_page import _parameters, _provenance, _unfinished, champions, study_page
from pipeline.report.trials import choose, finished, table, table_of
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker
from report.helpers import Store, body, opened, page_of, trial_row


@pytest.fixture(scope="module")
def halved(trained: Trained, tmp_path_factory: pytest.TempPathFactory, small_recipe: Recipe) -> Store:
    """A study as successive halving leaves it: 6 of 24 finished, the others pruned after epoch 2 or 6; adam helps."""
    home = tmp_path_factory.mktemp("halved") / "mlruns"
    trained.copy(home)
    tracker, dice = MlflowTracker(home), np.random.default_rng(0)
    parent = tracker.open_study("halved-v1-digits", "?", "val/accuracy", ["optimizer.lr"])
    experiment_id = tracker.client.get_run(parent.id).info.experiment_id
    for number in range(24):
        adam = bool(number % 2)
        choices = {"optimizer.name": "adam" if adam else "sgd", "optimizer.lr": 0.1, "optimizer.weight_decay": 0.0}
        choices["augmentation.rotation"] = float(number % 3)
        epochs = 18 if number in (0, 1, 5, 11, 13, 15) else 6 if number in (3, 7, 9) else 2
        state = State.FINISHED if epochs == 18 else State.PRUNED
        tags = {"mlflow.parentRunId": parent.id, "role": "trial", "trial": str(number), "state": str(state)}
        tags |= {"study": "halved-v1-digits", "recipe_digest": "0", "data_digest": "0", "split_digest": "0"}
        name = f"trial {number}{' (control)' if number == 0 else ''}"
        run_id = tracker.client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
        early = 0.5 + 0.2 * adam + 0.01 * dice.standard_normal()
        tracker.client.log_batch(
            run_id,
            params=[Param(name, str(value)) for name, value in small_recipe.changed(choices).flat().items()],
            metrics=[
                Metric("val/accuracy", early + 0.01 * (epoch - 2), epoch, epoch) for epoch in range(1, epochs + 1)
            ],
        )
        tracker.client.set_terminated(run_id)
    parent.end(State.FINISHED)
    assert tracker.flush(60)
    return Store(home, best=run_id, control="")


def test_the_answer_is_in_numbers_that_the_store_has(store: Store, odd: Path) -> None:
    runs = {run: MlflowTracker(store.home).client.get_run(run).data.metrics for run in (store.best, store.control)}
    best, base = (runs[run]["val/accuracy"] for run in (store.best, store.control))
    assert best > base, "the fixture's second rate is the better one"
    said = body(odd.read_text())
    assert f"Trial 1 is the best of 14 finished trials: val/accuracy {best:.4f}" in said
    assert f"{100 * (best - base):+.2f} points (95 % interval" in said and "n = 144 validation images" in said
    assert "lr 0.2" in said
    assert "16 trials: 14 full, 1 pruned, 1 failed" in said
    for title in ("Best trials", "Finals", "Search history", "Which parameters matter", "Parallel coordinates"):
        assert f"<h2>{title}" in said
    for title in ("Effect of each choice", "Learning curves", "F1 by class", "Where the best and the control disagree"):
        assert f"<h2>{title}" in said
    for title in ("Calibration", "Cost against score", "What was short, pruned or failed"):
        assert f"<h2>{title}" in said
    assert said.count("rare classes counted more") == 1
    assert "The best: rare classes counted more in training (class weights of power 0.25): the rarer half" in said
    assert 'href="http://127.0.0.1:5000/#/a?b=1&amp;c=2"' in said
    assert "The best: accuracy 0.9000 on 144 images as they are, 0.5000 (the control 0.5000) corrupted" in said
    assert "<h2>Accuracy on corrupted images" not in page_of(store, "tiny"), "where nothing was measured"
    assert "0.4000" in said.split("<h2>Finals")[1].split("</section>")[0], "the mean of two seeds"


def test_share_of_time_of_what_did_not_finish_is_of_the_trials() -> None:
    """As the number of trials beside it; finals are no trials."""
    rows = [trial_row(0, 0.5, seconds=30.0), trial_row(1, float("nan"), state="failed", seconds=10.0)]
    final = trial_row(0, 0.5, role="final", seconds=60.0) | {"run_id": "final"}
    assert _unfinished(table_of([*rows, final]))["time_share"] == 0.25


def test_running_trials_are_not_said_to_have_finished(trained: Trained) -> None:
    tracker = MlflowTracker(trained.home)
    [study] = choose(tracker, ["tiny"])
    frame = table(tracker, [study])
    running = frame.assign(state="running", score=float("nan"))
    assert "Nothing: no trial has ended yet." in body(study_page(tracker, study, running, Path("nowhere"), {}))
    one = frame.assign(state=frame["state"].replace("pruned", "running"))
    assert "Nothing: every trial that ended finished." in body(study_page(tracker, study, one, Path("nowhere"), {}))


def test_where_most_are_pruned_they_count_too_and_it_is_said_how(
    halved: Store, browser: Browser, tmp_path: Path
) -> None:
    file = tmp_path / "halved.html"
    write(page_of(halved, "halved"), file)
    page, heard = opened(browser, file, 390)
    assert heard == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    said = page.inner_text("main")
    assert "Above what chance gives: " in said
    assert "what tells the best 5 of 24 trials, ranked by score, a short trial's with" in page.text_content("main")
    assert "What marks the best 6 of 24 trials by rank: " in said and "optimizer adam (83%, of the others 39%)" in said
    effects = "Effects are on val/accuracy after epoch 2 and not on the final score, as 18 trials were short or pruned"
    assert f"{effects} and 6 finished" in said
    [adam] = re.findall(r"<td>optimizer.name</td>.*?</tr>", body(file.read_text()))
    assert re.findall(r">([^<>]+)</td>", adam)[:5] == ["optimizer.name", "adam", "sgd", "12", "7"]
    assert float(re.findall(r">([^<>]+)</td>", adam)[5]) == pytest.approx(20, abs=1)


def test_f1_by_epoch_is_drawn_of_pruned_trials_too(store: Store) -> None:
    """`tiny` has a trial that finished two epochs, and one that was pruned after the first."""
    [caption] = re.findall(r"Trial 0's weakest class, \d, has F1 [^<]*", page_of(store, "tiny").replace("&#39;", "'"))
    assert "after epoch 1 and" in caption and caption.endswith("Grey: 1 pruned trial.")


def test_what_finals_decided_comes_first(halved: Store) -> None:
    tracker = MlflowTracker(halved.home)
    [study] = choose(tracker, ["halved"])
    runs = table(tracker, [study])
    top = int(finished(runs).iloc[0]["trial"])
    score = Sample(3, 0.81, 0.01, 0.785, 0.835)
    gap = Sample(3, 0.012, 0.01, -0.013, 0.037)
    measured = {"trial_score": 0.8, "changes": {}, "epochs": 2, "prediction_flop": 1, "training_s": 2.0, "runs": ()}
    results = tuple(
        CandidateResult(
            name=f"trial {number}",
            trial=number,
            trial_run=runs["run_id"][number],
            digest=str(number),
            is_control=number == 0,
            score=score,
            difference=gap if number else None,
            p_value=0.2 if number else None,
            stopped=None,
            **measured,
        )
        for number in (0, 1)
    )
    summary = "trial 0 (control), a tie with trial 1: cheaper"
    decision = FinalsDecision(
        study=study.name,
        objective="val/accuracy",
        decided="now",
        seeds=(1, 2, 3),
        data_digest="",
        split_digest="",
        least_sd=0.01,
        rules=("the highest mean",),
        candidates=results,
        winner=Winner(trial=0, digest="0", run_id="r", seed=1, tied=(1,), reason="cheaper", summary=summary),
        evidence=frozenset(),
    )
    decision.store(tracker, study)
    client, model = tracker.client, "image-classifier"
    client.create_registered_model(model)
    version = client.create_model_version(model, "file:///nowhere", runs["run_id"][5]).version
    client.set_registered_model_alias(model, "champion", version)
    run_id = tracker.store.create_run(study.experiment, "mean", {"role": "ensemble"}, 0)
    ensemble = runs.iloc[:1].assign(run_id=run_id, role="ensemble", trial=pd.NA)
    version = client.create_model_version(model, "file:///nowhere", run_id).version
    client.set_registered_model_alias(model, "previous", version)
    assert f"image-classifier@previous is a run of this study: ensemble, {run_id}." in champions(tracker, ensemble)
    client.delete_registered_model_alias(model, "previous")
    said = body(page_of(halved, "halved"))
    assert '<div class="answer"><p>Finals: the winner is trial 0 (control), a tie with trial 1: cheaper' in said
    assert f"trial {top} was not in these finals" in said.split("</div>")[0], "it scored best"
    assert f"image-classifier@champion is a run of this study: trial 5, {runs['run_id'][5]}." in said
    finals = said.split("<h2>Finals")[1].split("</section>")[0]
    assert finals.index(">winner<") < finals.index("ties with the winner")
    assert "+1.20" in finals and "-1.30 to +3.70" in finals
    assert "all on the same validation images. Differences are paired by seed." in finals.replace("&#39;", "'")
    decision.model_copy(update={"folds": 3}).store(tracker, study)
    assert "t over 3 folds, each with a seed of its own" in body(page_of(halved, "halved"))
    decision.model_copy(update={"evidence": frozenset({"gone"})}).store(tracker, study)
    assert "1 of the runs that decided them are gone, deleted in MLflow" in body(page_of(halved, "halved"))


def test_provenance_names_what_was_not_committed_and_the_winner(halved: Store) -> None:
    tracker = MlflowTracker(halved.home)
    frame = table(tracker, choose(tracker, ["halved"]))
    comparison = compare_with_control(tracker, frame)
    assert comparison
    best, other = str(comparison.best["run_id"]), str(frame["run_id"][7])
    for run_id, dirty in ((best, "true"), (other, "false")):
        for tag, value in {"mlflow.source.git.commit": "c0ffee", "git_dirty": dirty}.items():
            tracker.client.set_tag(run_id, tag, value)
    winner = Winner(trial=7, digest="7", run_id=other, seed=1, tied=(), reason="", summary="")
    decision = FinalsDecision.model_construct(winner=winner)
    lines = _provenance(tracker, frame, comparison, decision)
    patch = "with changes that were not committed: `diff.patch` of the run"
    assert lines[0].startswith(f"The best trial, run {best}: commit c0ffee, {patch}; data 0")
    assert lines[1].startswith(f"The finals' winner, run {other}: commit c0ffee; data 0")


def test_only_failures_make_a_page_that_says_why(store: Store, browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "sad.html"
    write(page_of(store, "sad"), file)
    page, heard = opened(browser, file, 390)
    assert heard == []
    assert "No trial finished, so there is no answer yet." in page.inner_text(".answer")
    assert page.locator("td", has_text="onerror").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_trials_refused_untrained_do_not_move_effects_to_an_early_epoch(trained: Trained) -> None:
    row = {"study": "s", "role": "trial", "control": False, "objective": "val/accuracy", "val/accuracy": 0.5}
    finished = [row | {"trial": 0, "run_id": "r0", "state": "finished", "score": 0.5, "epochs": 2}]
    refused = [row | {"trial": n, "run_id": f"r{n}", "state": "pruned", "epochs": 0} for n in (1, 2)]
    found = _parameters(MlflowTracker(trained.home), table_of([*finished, *refused]))[0]
    assert (found["is_early"], found["num_pruned"], found["num_measured"]) == (False, 0, 1)


def test_page_without_a_feasible_trial_names_the_nearest(trained: Trained) -> None:
    tracker = MlflowTracker(trained.home)
    [found] = choose(tracker, ["tiny"])
    study = replace(found, constraints={"model/parameters": 1000})
    said = body(study_page(tracker, study, table(tracker, [study]), Path("nowhere"), {}))
    assert "No answer: no feasible trial; the nearest is trial 0 (model/parameters 1,770, at most 1,000)." in said
    assert "Trial 0 is infeasible and can't win: model/parameters 1,770, at most 1,000." in said
    assert "; 1 infeasible;" in said


def test_one_finished_trial_without_a_control_is_enough(trained: Trained, browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "tiny.html"
    tracker = MlflowTracker(trained.home)
    [study] = choose(tracker, ["tiny"])
    frame = table(tracker, [study])
    frame["control"] = False
    write(study_page(tracker, study, frame, Path("nowhere"), {}), file)
    page, heard = opened(browser, file, 1400)
    assert heard == []
    assert "Trial 0 is the best of 1 finished trial: " in page.inner_text(".answer")
    assert "nothing to compare it with" in page.inner_text(".answer")


def test_control_alone_in_full_is_no_verdict_on_the_search(trained: Trained) -> None:
    tracker = MlflowTracker(trained.home)
    [study] = choose(tracker, ["tiny"])
    frame = table(tracker, [study])
    frame = frame[frame["role"] == "trial"].assign(control=frame["trial"] == 0)
    alone = "It is the control, and only it is trained at full length yet"
    assert f"{alone}." in body(study_page(tracker, study, frame, Path("nowhere"), {}))
    value = frame["val/accuracy"].iloc[1]
    said = body(study_page(tracker, study, frame.assign(short=frame["trial"] == 1), Path("nowhere"), {}))
    assert f"{alone}; the best short trial, 1, has {value:.4f} after 1 epoch." in said
    assert "nothing better" not in said


def test_page_says_what_was_trained(trained: Trained) -> None:
    """Its question may name other epochs than EPOCHS=."""
    tracker = MlflowTracker(trained.home)
    [study] = choose(tracker, ["tiny"])
    frame = table(tracker, [study])
    frame = frame[frame["role"] == "trial"].assign(control=frame["trial"] == 0)
    head = body(study_page(tracker, study, frame, Path("nowhere"), {})).split('<div class="answer">')[0]
    sizes = "1,294 training and 144 validation images of 10 classes, on cpu."
    assert f"Network attention, 2 epochs, batches of 64, {sizes}" in head
    assert "The control's recipe" in head
    rows = re.findall(r"<td>(\w+)</td><td class=\"wide\">([^<]*)", head)
    assert ("optimizer", "name sgd, lr 0.1") in rows and dict(rows)["model"].startswith(
        "network attention, widths [4, 8]"
    )
    frame["training.batch_size"] = [32, 64]
    head = body(study_page(tracker, study, frame.assign(control=False), Path("nowhere"), {}))
    assert "batches of 32 to 64" in head and "The control's recipe" not in head
