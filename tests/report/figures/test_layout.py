"""Every figure of a page is drawn in a real browser and fits the window."""

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from playwright.sync_api import Browser

from pipeline.report.analysis import Effects
from pipeline.report.figures import parameters
from pipeline.report.figures.layout import as_label, joined, score_floor, set_integer_ticks
from report.helpers import opened, until


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


def test_names_of_users_are_cut_and_are_no_html() -> None:
    assert as_label("a<b>$x$\nc") == "a&lt;b&gt;&#36;x&#36;\\nc"
    assert as_label("x" * 20 + "y" * 20, 9) == "xxxx…yyy"
    assert [joined(list("abc"[:count])) for count in range(4)] == ["", "a", "a and b", "a, b and c"]


def test_axis_of_scores_leaves_out_few_poor_ones() -> None:
    good = [0.9 + n / 1000 for n in range(20)]
    assert score_floor(pd.DataFrame({"score": [0.1, *good]})) == pytest.approx(0.9, abs=0.01)
    assert score_floor(pd.DataFrame({"score": good})) is None
    assert score_floor(pd.DataFrame({"score": [0.1, *good[:5]]})) is None, "too few to call one poor"


def test_ticks_are_integers_up_to_ten() -> None:
    figure = go.Figure()
    for values, dtick in (([1, 10], 1), ([1, 11], None), ([pd.NA], 1)):
        set_integer_ticks(figure, pd.Series(values, dtype="Int64"))
        assert figure.layout.xaxis.dtick == dtick


def test_titles_of_effects_fit_a_narrow_window(browser: Browser, tmp_path: Path) -> None:
    """The name of the measure is in the caption: at the axis it was cut at both ends."""
    heads = ["parameter", "level", "reference", "n", "pruned", "effect", "low", "high"]
    table = pd.DataFrame([("optimizer.name", "adam", "sgd", 9, 1, 0.02, 0.01, 0.03)], columns=heads)
    figure = parameters.effect(Effects(table, 0.5, 20), "val/balanced_accuracy of the short trials")
    assert str(figure.layout.meta).startswith("By val/balanced_accuracy of the short trials, 1 of 1 choices differ")
    figure.update_layout(width=320)
    file = tmp_path / "effects.html"
    figure.write_html(file)
    page = browser.new_page(viewport={"width": 360, "height": 400})
    page.goto(file.as_uri())
    until(page, "document.querySelector('.main-svg .xtitle')")
    box = page.evaluate("(r => [r.left, r.right])(document.querySelector('.xtitle').getBoundingClientRect())")
    assert box[0] >= 0 and box[1] <= 328
