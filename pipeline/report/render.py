"""Plain data and figures in, one HTML file out; how it looks is in templates/."""

import base64
import io
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image
from plotly.offline import get_plotlyjs

from pipeline.disk import replacing
from pipeline.errors import UserError, counted, escape_control
from pipeline.report.figures.layout import template as figure_template


def render(template: str, figures: Mapping[str, go.Figure], word: Callable[[str], str] = str, **data: Any) -> str:
    """A page; its template finds the figures by their names, and each value of `data` by its own.

    `word` puts the commands that values name in backticks as the reader types them; they are shown as code.
    """
    environment = Environment(
        loader=PackageLoader("pipeline.report"),
        autoescape=True,
        finalize=partial(_finalize, word=word),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    environment.filters |= {"number": number, "count": counted, "hours": hours}
    return environment.get_template(template).render(
        data,
        titles=[],
        figures={name: _plain(figure) for name, figure in figures.items()},
        figure_templates=[figure_template(dark=False), figure_template(dark=True)],
        plotly_js=get_plotlyjs(),
    )


def _finalize(value: object, word: Callable[[str], str]) -> object:
    """What is printed: HTML that a macro made, or a value on one line and without control characters, commands as code."""
    if isinstance(value, Markup):
        return value
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(word(escape_control(str(value)))))))


def _plain(figure: go.Figure) -> dict[str, Any]:
    """A figure as JSON holds it, with its caption and its height."""
    traces = json.loads(str(go.Figure(figure).update_layout(template=None, meta=None).to_json()))
    return {"caption": figure.layout.meta, "height": figure.layout.height, **traces}


def number(value: object, form: str) -> str:
    """A number as `form` writes it; nothing where there is none, or it isn't finite."""
    return form.format(value) if isinstance(value, (int, float, np.number)) and np.isfinite(value) else ""


def hours(seconds: float) -> str:
    """`2.5 h`, or `12.0 min` below an hour."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def picture(image: np.ndarray, kind: Literal["PNG", "JPEG"] = "PNG") -> str:
    """uint8 (H, W, 3) as a data URL."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **({"optimize": True} if kind == "PNG" else {"quality": 85}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def write(page: str, file: Path) -> None:
    """Complete or not at all; UserError where it can't be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as new:
            new.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"`--output {file}`", str(error.strerror), "name another file") from None
