"""MLflow's pages in a real browser show what a study's links promise, and its server comes and goes cleanly."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest
import torch
from playwright.sync_api import Page, expect, sync_playwright

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.experiment import ExperimentRequest
from pipeline.recipe import Recipe
from pipeline.tracking import queries
from pipeline.tracking.server import (
    FOLDED_SECTIONS,
    HOST,
    OPEN_SECTIONS,
    shared_view,
    start_server,
    stop_server,
    study_links,
)
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update"]
PATIENCE_MS = 60_000


@dataclass(frozen=True)
class Site:
    """A server that shows a study of two trials."""

    uri: str
    server: subprocess.Popen[bytes]
    port: int
    experiment: str
    links: dict[str, str]
    accuracies: dict[str, float]  # by run id, best first


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, small_recipe: Recipe, digits: TrainingData) -> Iterator[Site]:
    home = tmp_path_factory.mktemp("mlruns")
    tracker = MlflowTracker(home)
    parent = tracker.open_study("tiny-v1-digits", "Which rate is best?", "val/accuracy", ["optimizer.lr"])
    accuracies = {}
    for trial, rate in enumerate([0.0001, 0.1]):  # the better one last
        request = ExperimentRequest(
            recipe=small_recipe.changed({"optimizer.lr": rate}),
            data=digits,
            device=torch.device("cpu"),
            name=f"trial {trial}",
            parent_run=parent.id,
            tags=RunTags(role="trial", study="tiny-v1-digits", trial=trial),
        )
        outcome = experiment.run(request, tracker)
        assert outcome.state is State.FINISHED
        accuracies[tracker.id_of(outcome.run_key)] = outcome.metrics["val/accuracy"]
    parent.end(State.FINISHED)
    assert tracker.flush(30)
    accuracies = dict(sorted(accuracies.items(), key=lambda item: -item[1]))
    first, second = accuracies.values()
    assert first > second, "the order on the page tells nothing where the trials are equal"

    port = free_port()
    server = start_server(tracker.uri, home, port)
    [study] = queries.studies(tracker)
    links = study_links(
        f"http://{HOST}:{port}", study.experiment, study.objective, study.view, queries.best_run_ids(tracker, study, 10)
    )
    yield Site(tracker.uri, server, port, study.experiment, links, accuracies)
    stop_server(server)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if not CHROMIUM:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")
    with sync_playwright() as playwright:
        arguments = [f"--{name}" for name in [*QUIET, "disable-sync"]]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1600, "height": 950})
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        yield page
        browser.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def query(link: str) -> dict[str, list[str]]:
    """What follows the ? in an address whose page is named behind the #."""
    return parse_qs(urlsplit(link).fragment.partition("?")[2], strict_parsing=True)


def family(leader: int) -> list[psutil.Process]:
    """The processes of a server's session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def test_view_shows_trials_best_first_with_searched_params() -> None:
    key, value = shared_view("val/f1_macro", ["optimizer.lr", "schedule.name"])
    form, _, packed = json.loads(value)["state"].partition(";")
    view = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert form == "deflate"
    assert view["searchFilter"] == "tags.role = 'trial'"
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`val/f1_macro`", False)
    columns = view["selectedColumns"]
    assert len(columns) == len(set(columns))
    assert {"metrics.`val/f1_macro`", "params.`optimizer.lr`", "params.`schedule.name`", "tags.`state`"} <= set(columns)
    assert columns.index("params.`schedule.name`") < columns.index("metrics.`val/loss`"), "seen without scrolling"
    assert len(value) <= 5000
    assert shared_view("val/f1_macro", ["optimizer.lr", "schedule.name"])[0] == key
    assert shared_view("val/accuracy", ["optimizer.lr", "schedule.name"])[0] != key


def test_the_links_name_experiment_order_view_and_runs() -> None:
    links = study_links("http://here:1", "7", "val/accuracy", "abc", ["r1", "r2"])
    assert list(links) == ["trials", "charts", "comparison"]
    for link in links.values():
        assert query(link)["workflowType"] == ["machine_learning"]
        assert " " not in link and '"' not in link
    assert links["trials"].startswith("http://here:1/#/experiments/7/runs?")
    assert query(links["trials"])["viewStateShareKey"] == ["abc"]
    assert query(links["charts"])["compareRunsMode"] == ["CHART"]
    assert query(links["charts"])["viewStateShareKey"] == ["abc"]
    assert json.loads(query(links["comparison"])["runs"][0]) == ["r1", "r2"]
    assert json.loads(query(links["comparison"])["experiments"][0]) == ["7"]


def test_without_a_view_the_trials_are_sorted_by_the_address() -> None:
    for link in study_links("http://here:1", "7", "val/accuracy", None, []).values():
        assert query(link)["orderByKey"] == ["metrics.`val/accuracy`"] and query(link)["orderByAsc"] == ["false"]


@pytest.mark.parametrize("runs", [[], ["r1"]])
def test_fewer_than_two_runs_are_not_compared(runs: list[str]) -> None:
    assert "comparison" not in study_links("http://here:1", "7", "val/accuracy", "abc", runs)


def test_trials_link_lists_trials_best_first(site: Site, page: Page) -> None:
    page.goto(site.links["trials"])
    scores = page.locator('[role=gridcell][col-id="metrics.`val/accuracy`"]')
    expect(scores).to_have_count(2)
    assert [float(text) for text in scores.all_inner_texts()] == pytest.approx(list(site.accuracies.values()), abs=1e-6)
    names = page.locator('[role=gridcell][col-id="attributes.`Run Name`"] a')
    assert names.all_inner_texts() == ["trial 1", "trial 0"]
    rates = page.locator('[role=gridcell][col-id="params.`optimizer.lr`"]')
    assert rates.all_inner_texts() == ["0.1", "0.0001"]


def test_charts_link_draws_scores_and_f1_of_classes_first(site: Site, page: Page) -> None:
    page.goto(site.links["charts"])
    expect(page.locator(".js-plotly-plot").first).to_be_visible()
    headers = page.get_by_test_id("experiment-view-compare-runs-section-header")
    expect(headers.filter(has_text="System metrics")).to_be_visible()
    names = [text.split("\n")[0] for text in headers.all_inner_texts()]
    assert names == [*OPEN_SECTIONS, *FOLDED_SECTIONS], "a section of metrics that the view doesn't know?"
    charts = page.locator(".js-plotly-plot").first.locator("xpath=ancestor::*[contains(., 'val/f1_macro')][1]")
    assert charts.inner_text().index("val/accuracy") < charts.inner_text().index("val/f1_macro")
    expect(page.get_by_test_id("saved-views-trigger")).to_have_text("Trials, best first")


def test_comparison_link_compares_the_best_trials(site: Site, page: Page) -> None:
    page.goto(site.links["comparison"])
    expect(page.get_by_text("Comparing 2 Runs")).to_be_visible()
    for run_id in site.accuracies:
        expect(page.get_by_role("link", name=run_id)).to_be_visible()
    expect(page.get_by_text("optimizer.lr").first).to_be_visible()


def test_runs_figure_is_shown_on_its_page(site: Site, page: Page) -> None:
    best = next(iter(site.accuracies))
    page.goto(f"http://{HOST}:{site.port}/#/experiments/{site.experiment}/runs/{best}/artifacts/confusion_matrix.png")
    page.wait_for_function("[...document.images].some(i => i.src.startsWith('blob:') && i.naturalWidth > 300)")


def test_the_server_listens_on_this_machine_only(site: Site) -> None:
    processes = family(site.server.pid)
    listening = {
        connection.laddr[:2]
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {(HOST, site.port)}


def test_database_address_is_in_no_process_argument(site: Site) -> None:
    assert "mlflow.db" not in " ".join(word for process in family(site.server.pid) for word in process.cmdline())


@pytest.mark.parametrize("talks", [True, False])
def test_port_in_use_is_refused_at_once(talks: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with socket.socket() as other:
        if talks:
            port = request.getfixturevalue("site").port
        else:
            other.bind((HOST, 0))
            other.listen()
            port = other.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(UserError, match=rf"^`--port {port}`: .*choose another port"):
            start_server(f"sqlite:///{tmp_path}/mlflow.db", tmp_path, port)
        assert time.monotonic() - started < 1
    assert list(tmp_path.iterdir()) == []


def test_server_that_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(UserError, match=rf"did not start on port {port}: .*server\.log") as caught:
        start_server("nosuch://maria:hunter2@127.0.0.1/runs", tmp_path, port)
    assert "hunter2" not in str(caught.value) + (tmp_path / "server.log").read_text()
    assert not listens(port)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


START = """
import sys
from pathlib import Path
from pipeline.tracking.server import start_server
start_server(f"sqlite:///{sys.argv[1]}/mlflow.db", Path(sys.argv[1]), int(sys.argv[2]))
"""


def test_ctrl_c_during_start_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", START, str(tmp_path), str(free_port())]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as starting:
        while not ((tmp_path / "server.log").exists() and (tmp_path / "server.log").stat().st_size):
            assert starting.poll() is None
            time.sleep(0.05)
        [leader] = psutil.Process(starting.pid).children()
        starting.send_signal(signal.SIGINT)
        assert starting.wait(30) != 0
    assert family(leader.pid) == []


def test_killed_server_leaves_nothing(site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    server = start_server(site.uri, tmp_path, port)
    assert capfd.readouterr() == ("", "")
    assert [process.pid for process in family(server.pid)] == [server.pid], "one process"
    server.kill()
    server.wait()
    stop_server(server)
    assert family(server.pid) == [] and not listens(port)


def test_stop_leaves_no_process_with_a_browser_connected(site: Site, page: Page) -> None:
    """The last test of the site."""
    page.goto(site.links["trials"])
    stop_server(site.server)
    assert family(site.server.pid) == [] and not listens(site.port)
