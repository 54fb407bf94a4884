"""The page, in a real browser: every figure drawn, nothing asked of the network, and no text of a user's is code."""

import base64
import io
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Trained
from mlflow.entities import Metric, Param
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from pipeline import experiment
from pipeline.cli.compare import page_name
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.evaluation.significance import Sample
from pipeline.experiment import ExperimentRequest
from pipeline.recipe import Recipe
from pipeline.registry.decision import CandidateResult, FinalsDecision, Winner
from pipeline.report import figures
from pipeline.report.comparison_page import studies_page
from pipeline.report.render import write
from pipeline.report.study_page import study_page
from pipeline.report.trials import choose, finished, table
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ATTACK = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
HOSTILE = ("<b>bold</b>", "</script><script>alert(3)", "a&amp;b", "$x^2$", *"456789")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Store:
    home: Path
    best: str  # run ids
    control: str


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, trained: Trained, small_recipe: Recipe, digits: TrainingData
) -> Store:
    """Studies: `odd` with all that can occur, `sad` with failures only, `bare` without trials; classes have odd names."""
    home = tmp_path_factory.mktemp("store") / "mlruns"
    trained.copy(home)  # a database that is there already
    tracker, named = MlflowTracker(home), replace(digits, classes=HOSTILE)
    parent = tracker.open_study("odd-v1-digits", f"Is it {ATTACK}?", "val/accuracy", ["optimizer.lr"])
    ids = []
    for number, (rate, name) in enumerate([(0.02, "trial 0 (control)"), (0.2, "trial 1")]):
        request = ExperimentRequest(
            recipe=small_recipe.changed({"optimizer.lr": rate, "training.epochs": 1}),
            data=named,
            device=CPU,
            name=name,
            parent_run=parent.id,
            tags=RunTags(role="trial", study="odd-v1-digits", trial=number),
        )
        ids.append(tracker.id_of(experiment.run(request, tracker).run_key))
    dice = np.random.default_rng(0)
    for number in range(2, 16):  # without files
        state = {14: State.PRUNED, 15: State.FAILED}.get(number, State.FINISHED)
        recipe = small_recipe.changed(
            {
                "optimizer.lr": float(10 ** dice.uniform(-3, -1)),
                "optimizer.name": "adam" if number % 2 else "sgd",
                "augmentation.rotation": float(dice.choice([0, 5, 10])),
                "training.clip_norm": float(number % 3),
            }
        )
        metrics = {"val/accuracy": 0.05 + number / 1000} | ({"time/training_s": 1.0 * number} if number % 5 else {})
        log(tracker, parent.id, recipe, named, number, "trial", state, metrics)
    for seed in range(4):
        recipe = small_recipe.changed({"training.seed": seed, "optimizer.lr": (0.02, 0.2)[seed % 2]})
        log(tracker, parent.id, recipe, named, seed, "final", State.FINISHED, {"val/accuracy": 0.3 + 0.1 * (seed % 2)})
    parent.end(State.FINISHED)

    parent = tracker.open_study("sad-v1-digits", "?", "val/accuracy", [])
    for number in range(2):
        log(tracker, parent.id, small_recipe, named, number, "trial", State.FAILED, {})
    parent.end(State.FINISHED)
    tracker.open_study("bare-v1-digits", "?", "val/accuracy", []).end(State.FINISHED)
    assert tracker.flush(60)
    return Store(home, best=ids[1], control=ids[0])


def log(
    tracker: MlflowTracker,
    parent: str,
    recipe: Recipe,
    data: TrainingData,
    number: int,
    role: str,
    state: State,
    metrics: dict[str, float],
) -> None:
    """A run without a training, straight into the store."""
    client = tracker.client
    tags = {"mlflow.parentRunId": parent, "role": role, "trial": str(number), "state": str(state)}
    tags |= {"reason": ATTACK} if state in (State.FAILED, State.PRUNED) else {}
    run_id = client.create_run(
        client.get_run(parent).info.experiment_id, tags=tags, run_name=f"trial {number}"
    ).info.run_id
    client.log_batch(
        run_id,
        params=[Param(name, str(value)) for name, value in recipe.flat().items()],
        metrics=[Metric(name, value, 0, 1) for name, value in metrics.items()],
    )
    client.set_terminated(run_id, "FINISHED")


def page_of(store: Store, *names: str, data_dir: Path = Path("nowhere")) -> str:
    tracker = MlflowTracker(store.home)
    studies = choose(tracker, names)
    frame = table(tracker, studies)
    links = {"trials": "http://127.0.0.1:5000/#/a?b=1&c=2"}
    if len(studies) > 1:
        return studies_page(tracker, studies, frame, links)
    return study_page(tracker, studies[0], frame, data_dir, links)


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


def body(page: str) -> str:
    """What a reader sees, without plotly's code and the figures' data."""
    return page.partition("</main>")[0].partition("<main>")[2]


@pytest.fixture(scope="module")
def odd(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "odd.html"
    write(page_of(store, "odd"), file)
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def opened(browser: Browser, file: Path, width: int, scheme: str = "light") -> tuple[Page, list[str]]:
    """A page of this width, once it is drawn; and all that it complained of or asked for."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True).new_page()  # type: ignore[arg-type]
    heard: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("dialog", lambda dialog: heard.append(f"dialog {dialog.message}"))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else heard.append(request.url)
    )
    page.goto(file.as_uri())
    until(page, "[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")
    return page, heard


def until(page: Page, condition: str) -> None:
    """Wait for what JavaScript says; the page's own policy forbids Playwright's way of it."""
    limit = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < limit, condition
        page.wait_for_timeout(50)


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_every_figure_is_drawn_and_fits_the_window(odd: Path, browser: Browser, width: int, scheme: str) -> None:
    page, heard = opened(browser, odd, width, scheme)
    assert heard == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate(
        "[...document.querySelectorAll('.plot')].map(p => {const r = p.querySelector('.main-svg').getBoundingClientRect();"
        "return [r.left, r.right, r.height, p.querySelectorAll('path, rect, image').length]})"
    )
    assert len(sizes) >= 9
    for left, right, height, marks in sizes:
        assert left >= 0 and right <= width and height > 100 and marks > 5
        assert right - left > 0.75 * min(width, 1100)
    legends = page.evaluate(
        "[...document.querySelectorAll('.legend')].map(l => {const r = l.getBoundingClientRect(), p = "
        "l.closest('.plot').getBoundingClientRect(); return [r.top - p.top, r.right - p.right, r.height]})"
    )
    assert len(legends) >= 6
    for top, right, height in legends:
        assert top >= 0 and right <= 0 and 10 < top + height < 60, "above what is drawn"
    ink = page.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    assert (ink == "rgb(214, 214, 214)") == (scheme == "dark")


def test_a_figure_follows_the_window(odd: Path, browser: Browser) -> None:
    page, _ = opened(browser, odd, 1400)
    page.set_viewport_size({"width": 390, "height": 900})
    until(page, "document.querySelector('.plot .main-svg').getBoundingClientRect().width < 390")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_texts_of_users_stay_texts(odd: Path, browser: Browser) -> None:
    page, heard = opened(browser, odd, 1400)
    assert heard == []
    assert f"Is it {ATTACK}?" in page.inner_text("main")
    assert page.locator("td", has_text="onerror").first.inner_text() == ATTACK
    labels = page.locator(".ytick text").all_inner_texts() + page.locator(".ytick text").all_text_contents()
    assert "<b>bold</b>" in labels, "a class's name, letter by letter"
    assert page.locator("main img[src='x']").count() == 0
    assert body(odd.read_text()).count("<script") == 0


def test_the_answer_is_in_numbers_that_the_store_has(store: Store, odd: Path) -> None:
    runs = {run: MlflowTracker(store.home).client.get_run(run).data.metrics for run in (store.best, store.control)}
    best, base = (runs[run]["val/accuracy"] for run in (store.best, store.control))
    assert best > base, "the fixture's second rate is the better one"
    said = body(odd.read_text())
    assert f"Trial 1 is the best of 14 finished trials: val/accuracy {best:.4f}" in said
    assert f"{100 * (best - base):+.2f} points (95 % interval" in said and "n = 144 validation images" in said
    assert "lr 0.2" in said
    assert "16 trials: 14 finished, 1 pruned, 1 failed" in said
    for title in ("Best trials", "Finals", "Search history", "Which parameters matter", "Parallel coordinates"):
        assert f"<h2>{title}" in said
    for title in ("Effect of each choice", "Learning curves", "F1 by class", "Where the best and the control disagree"):
        assert f"<h2>{title}" in said
    for title in ("Calibration", "Cost against score", "What was pruned or failed"):
        assert f"<h2>{title}" in said
    assert 'href="http://127.0.0.1:5000/#/a?b=1&amp;c=2"' in said
    assert "0.4000" in said.split("<h2>Finals")[1].split("</section>")[0], "the mean of two seeds"


def test_the_page_is_one_small_file_that_asks_for_nothing(odd: Path) -> None:
    page = odd.read_text()
    assert len(page.encode()) < 10e6
    assert "default-src 'none'" in page
    assert not re.search(r"<(link|iframe|object)\b|<script[^>]+src=", body(page) + page.partition("<main>")[0])


def test_images_are_the_ones_that_the_caption_says(odd: Path, digits: TrainingData) -> None:
    found = re.findall(r'base64,([^"]+)"><figcaption>.*?\(no\. (\d+)\)', body(odd.read_text()))
    assert len(found) > 3
    places = {int(number): place for place, number in enumerate(digits.validation_ids.tolist())}
    for code, number in found:
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB"))
        assert np.array_equal(image, digits.validation.images[places[int(number)]].permute(1, 2, 0).numpy())


def test_images_of_other_data_are_not_shown_as_those(store: Store) -> None:
    client = MlflowTracker(store.home).client
    tag = client.get_run(store.best).data.tags["data_digest"]
    client.set_tag(store.best, "data_digest", "0" * 64)
    said = body(page_of(store, "odd"))
    client.set_tag(store.best, "data_digest", tag)
    assert "is not in" in said and "The images can&#x27;t be shown" in said
    assert "(no. " in said and "data:image/png" not in said


def test_data_that_is_not_there_is_said_and_not_fetched(store: Store, tmp_path: Path) -> None:
    tracker = MlflowTracker(store.home)
    [study] = choose(tracker, ["odd"])
    frame = table(tracker, [study])
    frame["data.dataset"] = "cifar10"
    said = body(study_page(tracker, study, frame, tmp_path, {}))
    assert "The images can&#39;t be shown" in said and "says where" in said
    assert not list(tmp_path.iterdir())


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
    assert "what tells the best 5 of 24 trials, ranked as the search does" in page.text_content("main")
    assert "What marks the best 6 of 24 trials by rank: " in said and "optimizer adam (83%, of the others 39%)" in said
    assert (
        "Effects are on val/accuracy after epoch 2 and not on the final score, as 18 trials were pruned and 6 finished"
        in said
    )
    [adam] = re.findall(r"<td>optimizer.name</td>.*?</tr>", body(file.read_text()))
    assert re.findall(r">([^<>]+)</td>", adam)[:5] == ["optimizer.name", "adam", "sgd", "12", "7"]
    assert float(re.findall(r">([^<>]+)</td>", adam)[5]) == pytest.approx(20, abs=1)


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
    said = body(page_of(halved, "halved"))
    assert '<div class="answer"><p>Finals: the winner is trial 0 (control), a tie with trial 1: cheaper' in said
    assert f"trial {top} was not in these finals" in said.split("</div>")[0], "it scored best"
    assert f"image-classifier@champion is a run of this study: trial 5, {runs['run_id'][5]}." in said
    finals = said.split("<h2>Finals")[1].split("</section>")[0]
    assert finals.index(">winner<") < finals.index("ties with the winner")
    assert "+1.20" in finals and "-1.30 to +3.70" in finals
    decision.model_copy(update={"evidence": frozenset({"gone"})}).store(tracker, study)
    assert "1 of the runs that decided them are gone, deleted in MLflow" in body(page_of(halved, "halved"))


def test_only_failures_make_a_page_that_says_why(store: Store, browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "sad.html"
    write(page_of(store, "sad"), file)
    page, heard = opened(browser, file, 390)
    assert heard == []
    assert "No trial finished, so there is no answer yet." in page.inner_text(".answer")
    assert page.locator("td", has_text="onerror").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_one_finished_trial_without_a_control_is_enough(trained: Trained, browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "tiny.html"
    write(page_of(Store(trained.home, trained.finished, ""), "tiny"), file)
    page, heard = opened(browser, file, 1400)
    assert heard == []
    assert "Trial 0 is the best of 1 finished trial: " in page.inner_text(".answer")
    assert "nothing to compare it with" in page.inner_text(".answer")


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


def test_a_study_beside_itself_under_another_name_leads_by_nothing(trained: Trained) -> None:
    tracker = MlflowTracker(trained.home)
    [study] = choose(tracker, ["tiny"])
    frame = table(tracker, [study])
    twin = replace(study, name="twin-v1-digits")
    both = pd.concat([frame, frame.assign(study=twin.name)], ignore_index=True)
    said = body(studies_page(tracker, [study, twin], both, {}))
    assert "tiny-v1-digits has the highest score, as high as that of twin-v1-digits" in said
    assert "+0.00 points (95 % interval +0.00 to +0.00, n = 144 validation images" in said


@pytest.mark.parametrize("name", ["history", "per_class", "cost", "spread"])
def test_figures_take_the_table_and_say_what_is_seen(name: str, store: Store) -> None:
    tracker = MlflowTracker(store.home)
    frame = table(tracker, choose(tracker, ["odd", "sad"]))
    for some in (frame, frame[frame["study"] == "odd-v1-digits"], frame[frame["study"] == "sad-v1-digits"]):
        figure = getattr(figures, name)(some)
        assert len(figure.layout.meta) > 15 and figure.layout.meta.endswith(".")


def test_a_page_that_cannot_be_written_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"`--output .*(Not a directory|File exists); name another file"):
        write("x", tmp_path / "file" / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names_of_pages_are_legal_and_short() -> None:
    assert page_name(["attention-v1-digits"]) == "attention-v1-digits.html"
    assert page_name(["a-v1-x", "b-v1-x"]) == "a-v1-x+b-v1-x.html"
    assert page_name(["../../etc/x y"]) == "etc-x-y.html"
    long = [page_name([f"study{n}-v1-cifar10" for n in range(count)]) for count in (20, 21)]
    assert len(set(long)) == 2 and all(len(name) < 130 for name in long)
