"""Every figure is drawn in a real browser, fits the window and says what is seen."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from pipeline.report import figures
from pipeline.report.trials import choose, table
from pipeline.tracking.tracker import MlflowTracker
from report.helpers import Store, opened, until


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


@pytest.mark.parametrize("name", ["history", "per_class", "cost", "spread"])
def test_figures_take_the_table_and_say_what_is_seen(name: str, store: Store) -> None:
    tracker = MlflowTracker(store.home)
    frame = table(tracker, choose(tracker, ["odd", "sad"]))
    for some in (frame, frame[frame["study"] == "odd-v1-digits"], frame[frame["study"] == "sad-v1-digits"]):
        figure = getattr(figures, name)(some)
        assert len(figure.layout.meta) > 15 and figure.layout.meta.endswith(".")
