"""A page is one file that asks for nothing of the network; no text of a user's is code."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from pipeline.errors import UserError
from pipeline.report.render import write
from report.helpers import ATTACK, body, opened


def test_texts_of_users_stay_texts(odd: Path, browser: Browser) -> None:
    page, heard = opened(browser, odd, 1400)
    assert heard == []
    assert f"Is it {ATTACK}?" in page.inner_text("main")
    assert page.locator("td", has_text="onerror").first.inner_text() == ATTACK
    labels = page.locator(".ytick text").all_inner_texts() + page.locator(".ytick text").all_text_contents()
    assert "<b>bold</b>" in labels, "a class's name, letter by letter"
    assert page.locator("main img[src='x']").count() == 0
    assert body(odd.read_text()).count("<script") == 0


def test_the_page_is_one_small_file_that_asks_for_nothing(odd: Path) -> None:
    page = odd.read_text()
    assert len(page.encode()) < 10e6
    assert "default-src 'none'" in page
    assert not re.search(r"<(link|iframe|object)\b|<script[^>]+src=", body(page) + page.partition("<main>")[0])


def test_a_page_that_cannot_be_written_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"`--output .*(Not a directory|File exists); name another file"):
        write("x", tmp_path / "file" / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
