"""The parts that a page is made of: one HTML file that opens offline and asks the network nothing."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from pipeline.errors import UserError, escape_control
from pipeline.report import figures

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light dark; --ink: #222; --dim: #666; --line: #ddd; --ground: #fff; --soft: #f5f6f7; --link: #0b62a8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --dim: #9aa0a6; --line: #3a3d42; --ground: #17191c; --soft: #202327; --link: #7ab8f0 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1100px; margin: 0 auto; padding: 16px 20px 60px }
h1 { font-size: 1.5rem; margin: .6em 0 .1em; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2em 0 .2em; padding-top: .8em; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.2em 0 .2em }
p { margin: .4em 0; max-width: 76ch; overflow-wrap: anywhere }
a { color: var(--link) } nav a { margin-right: .9em; display: inline-block }
nav { font-size: .9rem; margin: .6em 0 }
.dim, details, figcaption { color: var(--dim); font-size: .88rem }
.answer { background: var(--soft); border-left: 4px solid #0072B2; padding: .5em 1em; margin: 1em 0 }
.plot { width: 100%; overflow: hidden } .said { margin-top: 0 }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 0 32px }
.two > * { min-width: 0 }
.scroll { overflow-x: auto; margin: .6em 0 }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .25em .8em .25em 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { color: var(--dim); font-weight: 600 } td.n, th.n { text-align: right; white-space: nowrap }
td.wide { min-width: 300px; overflow-wrap: anywhere }
@media (max-width: 700px) { td.wide { min-width: 520px } }
.pictures { display: flex; flex-wrap: wrap; gap: 10px; margin: .4em 0 1em }
.pictures figure { margin: 0; width: 96px } .pictures img { width: 96px; height: 96px; image-rendering: pixelated }
.pictures figcaption { font-size: .75rem; line-height: 1.3; overflow-wrap: anywhere }
summary { cursor: pointer }
"""
# Plotly draws with the reader's colours, and again when they change.
_SCRIPT = """
const dark = matchMedia('(prefers-color-scheme: dark)');
function draw() {
  for (const [id, figure] of Object.entries(FIGURES)) {
    const layout = Object.assign({}, figure.layout, {template: TEMPLATES[dark.matches ? 1 : 0]});
    Plotly.react(id, figure.data, layout, {responsive: true, displayModeBar: false});
  }
}
draw();
dark.addEventListener('change', draw);
"""


class Page:
    """Collects parts and figures."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._titles: list[str] = []
        self._figures: dict[str, str] = {}

    def head(self, name: str, question: str, said: Sequence[str], links: Mapping[str, str]) -> None:
        listed = "".join(f'<a href="{escape(link)}">{text(what)}</a>' for what, link in links.items())
        lines = "".join(paragraph(line) for line in said)
        self._parts.append(
            f'<h1>{text(name)}</h1>{paragraph(question) if question else ""}<div class="answer">{lines}</div>'
        )
        if listed:
            self._parts.append(f"<nav>In MLflow (<code>make ui</code> opens it): {listed}</nav>")
        self._parts.append("")  # where the table of contents goes

    def counts(self, frame: pd.DataFrame) -> None:
        trials = frame[frame["role"] == "trial"]
        states = ", ".join(f"{count} {state}" for state, count in trials["state"].value_counts().items())
        said = f"{count(len(trials), 'trial')}: {states}; {hours(trials['seconds'].sum())} in all."
        self._parts[-1] = dim(said)
        self._parts.append("")

    def part(self, title: str, *content: str) -> None:
        self._titles.append(title)
        self._parts.append(f'<section id="s{len(self._titles)}"><h2>{text(title)}</h2>{"".join(content)}</section>')

    def figure(self, figure: go.Figure) -> str:
        """Its place on the page, with what is to be seen below it."""
        number = f"f{len(self._figures) + 1}"
        height, said = figure.layout.height, figure.layout.meta
        figure = go.Figure(figure).update_layout(template=None, meta=None)
        self._figures[number] = str(figure.to_json())
        return f'<div class="plot" id="{number}" style="height:{height}px"></div><p class="said">{text(said)}</p>'

    def html(self, title: str) -> str:
        contents = "".join(f'<a href="#s{n}">{text(name)}</a>' for n, name in enumerate(self._titles, 1))
        place = self._parts.index("")
        parts = [*self._parts[:place], f"<nav>{contents}</nav>", *self._parts[place + 1 :]]
        drawn = ",".join(f'"{name}":{figure}' for name, figure in self._figures.items())
        both = json.dumps([figures.template(dark=False), figures.template(dark=True)])
        # In a script only "<" can end it; in JSON it may be written so.
        values = f"const FIGURES = {{{drawn}}}, TEMPLATES = {both};".replace("<", "\\u003c")
        return (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{text(title)}</title><style>{_STYLE}</style></head><body><main>{''.join(parts)}</main>"
            f"<script>{get_plotlyjs()}</script><script>{values}{_SCRIPT}</script></body></html>\n"
        )


def write(page: str, file: Path) -> None:
    """Whole or not at all; UserError where it can't be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".html")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as out:
            out.write(page)
        os.chmod(name, 0o644)
        os.replace(name, file)
    except OSError as error:
        raise UserError(f"OUTPUT {file}: {error.strerror}; name another file") from None


def text(value: object) -> str:
    """A value as HTML shows it: nothing in it is markup, and it is one line."""
    return escape(escape_control(str(value)))


def paragraph(line: str) -> str:
    """A line of text."""
    return f"<p>{text(line)}</p>"


def dim(line: str) -> str:
    """A line of small print."""
    return f'<p class="dim">{text(line)}</p>'


def method(line: str) -> str:
    """How something was computed, shown when asked for."""
    return f"<details><summary>How it was computed</summary><p>{text(line)}</p></details>"


def columns(parts: Iterable[str]) -> str:
    """HTML parts side by side, where the window is wide enough."""
    return f'<div class="two">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def number(value: object, form: str) -> str:
    """A number as `form` writes it; nothing where there is none, or it isn't finite."""
    return form.format(value) if isinstance(value, (int, float, np.number)) and np.isfinite(value) else ""


def count(number: int, what: str) -> str:
    """`1 trial`, `1,200 trials`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def hours(seconds: float) -> str:
    """`2.5 h`, or `12.0 min` below an hour."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], wide: Iterable[int] = (), numbers: Iterable[int] = ()
) -> str:
    """Text cells under text heads; columns by number: `wide` ones may break lines, those of `numbers` stand to the right."""
    kinds = dict.fromkeys(wide, ' class="wide"') | dict.fromkeys(numbers, ' class="n"')
    head = "".join(f"<th{kinds.get(column, '')}>{text(name)}</th>" for column, name in enumerate(heads))
    body = "".join(
        f"<tr>{''.join(f'<td{kinds.get(column, str())}>{text(cell)}</td>' for column, cell in enumerate(row))}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
