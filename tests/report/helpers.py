"""What the tests of the pages share: a store's page as HTML, and as a browser draws it."""

import time
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Metric, Param
from playwright.sync_api import Browser, Page

from pipeline.data.prepare import TrainingData
from pipeline.recipe import Recipe
from pipeline.report.comparison_page import studies_page
from pipeline.report.study_page import study_page
from pipeline.report.trials import choose, table
from pipeline.tracking.tags import Role, RunTags, State
from pipeline.tracking.tracker import MlflowTracker

ATTACK = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


@dataclass(frozen=True)
class Store:
    home: Path
    best: str  # run ids
    control: str


def log(
    tracker: MlflowTracker,
    parent: str,
    recipe: Recipe,
    data: TrainingData,
    number: int,
    role: Role,
    state: State,
    metrics: dict[str, float],
) -> None:
    """A run without a training, straight into the store."""
    client = tracker.client
    study = client.get_run(parent)
    tags = RunTags(
        role=role,
        study=RunTags.of(study).study,
        parent_run=parent,
        state=state,
        reason=ATTACK if state in (State.FAILED, State.PRUNED) else None,
        trial=number,
        trial_run="0" * 32 if role == "final" else None,
        recipe_digest=recipe.digest(),
        data_digest=data.digest,
        split_digest="0" * 64,
    ).to_mlflow()
    run_id = client.create_run(study.info.experiment_id, tags=tags, run_name=f"trial {number}").info.run_id
    client.log_batch(
        run_id,
        params=[Param(name, str(value)) for name, value in recipe.flat().items()],
        metrics=[Metric(name, value, 0, 1) for name, value in metrics.items()],
    )
    client.set_terminated(run_id, "FINISHED")


def trial_row(number: int, score: float, control: bool = False, **more: object) -> dict[str, object]:
    """A trial as `trials.table_of` takes it."""
    row = {"study": "s", "trial": number, "run_id": f"run{number}", "role": "trial", "state": "finished"}
    row |= {"control": control, "objective": "val/accuracy", "score": score, "epochs": 2, "seconds": 3.0}
    return row | {"optimizer.name": "adam" if number % 2 else "sgd", "optimizer.lr": number / 8} | more


def page_of(store: Store, *names: str, data_dir: Path = Path("nowhere")) -> str:
    tracker = MlflowTracker(store.home)
    studies = choose(tracker, names)
    frame = table(tracker, studies)
    links = {"trials": "http://127.0.0.1:5000/#/a?b=1&c=2"}
    if len(studies) > 1:
        return studies_page(tracker, studies, frame, links)
    return study_page(tracker, studies[0], frame, data_dir, links)


def body(page: str) -> str:
    """What a reader sees, without plotly's code and the figures' data; white space counts once, as in HTML."""
    return " ".join(page.partition("</main>")[0].partition("<main>")[2].split())


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
