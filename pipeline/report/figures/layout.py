"""How the figures look: colours, axes, labels and captions."""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.errors import escape_control

BEST, CONTROL, FAINT = "#0072B2", "#D55E00", "#8c8c8c"
CYCLE = (BEST, CONTROL, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def as_label(name: object, max_length: int = 26) -> str:
    """A user's name as a figure takes it: on one line, its middle cut out if need be, no HTML."""
    line = escape_control(str(name))
    if len(line) > max_length:
        line = f"{line[: max_length // 2]}…{line[len(line) - max_length // 2 + 1 :]}"
    return html.escape(line, quote=False).replace("$", "&#36;")  # no formula


def joined(items: Sequence[str]) -> str:
    """`a, b and c`; empty of none."""
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def with_caption(figure: go.Figure, caption: str) -> go.Figure:
    """The figure, with a sentence that says what is to be seen."""
    return figure.update_layout(meta=caption)


def objective_label(frame: pd.DataFrame) -> str:
    """The objectives of a table's studies."""
    return ", ".join(as_label(name) for name in frame["objective"].unique())


def by_study(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(name, its rows) of each study."""
    return [(str(study), runs) for study, runs in frame.groupby("study", sort=False)]


def study_colours(frame: pd.DataFrame) -> list[str]:
    """One of each study."""
    return [CYCLE[index % len(CYCLE)] for index in range(frame["study"].nunique())]


def score_floor(frame: pd.DataFrame) -> float | None:
    """Where the axis of scores begins, if a few poor trials would press the others together."""
    scores = frame["score"].dropna()
    if len(scores) < 8:
        return None
    low, middle, high = scores.quantile([0.0, 0.1, 1.0])
    return float(middle - 0.3 * (high - middle)) if high > middle and high - low > 3 * (high - middle) else None


def set_axes(figure: go.Figure, x: str, y: str, height: int) -> None:
    """The figure's layout, with these titles of the axes; height in pixels."""
    figure.update_layout(
        template=template(dark=False),
        height=height,
        margin={"l": 62, "r": 12, "t": 44, "b": 44},
        legend={"orientation": "h", "xref": "container", "yref": "container", "x": 0, "y": 1, "yanchor": "top"},
        legend_font_size=11,
        showlegend=True,
        dragmode=False,
        hovermode="closest",
    )
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y)


def set_integer_ticks(figure: go.Figure, values: pd.Series) -> None:
    """No ticks between integers; plotly sees to it beyond 10. Missing values don't count."""
    figure.update_xaxes(dtick=1 if values.dropna().le(10).all() else None)


def set_named_rows(figure: go.Figure, names: Sequence[str], pitch: int) -> None:
    """Rows 0, 1, ... from the bottom, `pitch` pixels each, with their names above them at the left edge."""
    set_axes(figure, "", "", 100 + pitch * max(len(names), 1))
    figure.update_layout(margin_l=8)
    figure.update_yaxes(visible=False, range=[-0.5, len(names) - 0.2])
    for row, name in enumerate(names):
        add_row_label(figure, row, name, shift=pitch * 0.36)


def add_row_label(figure: go.Figure, row: float, name: str, shift: float) -> None:
    """A name at the left edge, `shift` pixels above its row."""
    figure.add_annotation(
        xref="paper", x=0, y=row, yshift=shift, text=name, showarrow=False, xanchor="left", font_size=11, align="left"
    )


def heatmap_of_scores(scores: np.ndarray, name: str) -> go.Figure:
    """Scores in [0, 1], (rows, columns), as colours and numbers; `name` says what they are to whoever points at one."""
    rows, columns = scores.shape
    figure = go.Figure()
    figure.add_heatmap(
        z=scores,
        x=list(range(columns)),
        y=list(range(rows)),
        colorscale="Cividis",
        texttemplate="%{z:.2f}",
        textfont={"size": 10},
        showscale=False,
        xgap=1,
        ygap=1,
        hovertemplate=f"{name} %{{z:.4f}}<extra></extra>",
    )
    return figure


def set_heatmap_labels(figure: go.Figure, columns: Sequence[str], rows: Sequence[str], tickangle: int = 0) -> None:
    """The names of a heat map's columns and rows, which take the space that they need."""
    figure.update_layout(margin_t=8)
    figure.update_xaxes(tickvals=list(range(len(columns))), ticktext=columns, tickangle=tickangle)
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=rows, autorange="reversed")
    for update_axes in (figure.update_xaxes, figure.update_yaxes):
        update_axes(automargin=True, showgrid=False, zeroline=False)


def template(dark: bool) -> dict[str, Any]:
    """Colours of text and grid on a ground that shows through; the page chooses by the reader's scheme."""
    ink, grid = ("#d6d6d6", "#3a3d42") if dark else ("#333333", "#e6e6e6")
    axis = {"gridcolor": grid, "zerolinecolor": grid, "linecolor": grid, "title": {"standoff": 8}}
    return {
        "layout": {
            "font": {"color": ink, "family": "system-ui, sans-serif", "size": 12},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
            "annotationdefaults": {"bgcolor": "rgba(23,25,28,.7)" if dark else "rgba(255,255,255,.7)", "borderpad": 0},
            "hoverlabel": {"bgcolor": "#24272b" if dark else "#ffffff", "font": {"color": ink}},
        }
    }
