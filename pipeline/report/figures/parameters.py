"""Searched parameters: which matter, what the best trials have, and what each choice adds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.recipe import field_label, value_label
from pipeline.report.analysis import Effects
from pipeline.report.figures.layout import (
    BEST,
    CONTROL,
    FAINT,
    add_row_label,
    as_label,
    joined,
    set_axes,
    set_named_rows,
    with_caption,
)
from pipeline.report.trials import ranked

QUARTER_COLOURS = ("#0072B2", "#56B4E9", "#8fb8d6", "#b4b4b4")  # the best first
MAX_LINES = 60  # of each quarter
MAX_PARAMETERS, MAX_EFFECTS = 12, 16
MIN_BEST = 4  # trials of the best quarter, from which it is said what marks them
LOG_RATIO = 30  # an axis whose ends differ by more has a log scale


def importance(shares: pd.DataFrame) -> go.Figure:
    """Bars of `analysis.importances`, with what chance alone gives."""
    top = shares.head(MAX_PARAMETERS)[::-1]
    figure, rows = go.Figure(), list(range(len(top)))
    above_chance = top["importance"] > top["chance"]
    figure.add_bar(
        x=top["importance"],
        y=rows,
        orientation="h",
        width=0.45,
        name="importance",
        showlegend=False,
        marker={"color": [BEST if above else FAINT for above in above_chance]},
        hovertemplate="%{x:.1%}<extra></extra>",
    )
    figure.add_scatter(
        x=top["chance"],
        y=rows,
        mode="markers",
        name="95 % of shuffled ranks stay below",
        marker={"symbol": "line-ns", "size": 16, "line": {"width": 2, "color": CONTROL}},
        hovertemplate="chance: %{x:.1%}<extra></extra>",
    )
    set_named_rows(figure, [as_label(name, 40) for name in top["parameter"]], 38)
    figure.update_xaxes(tickformat=".0%", title="share of importance", rangemode="tozero")
    names = joined(list(shares["parameter"][shares["importance"] > shares["chance"]])) or "none"
    caption = f"Above what chance gives: {names}, of {len(shares)} parameters"
    drawn = f"; the {len(top)} largest are drawn" if len(top) < len(shares) else ""
    return with_caption(figure, f"{caption}; about {0.05 * len(shares):.1f} would be by chance alone{drawn}.")


def parallel(frame: pd.DataFrame, names: Sequence[str]) -> go.Figure:
    """Each finished or pruned trial as a line through its parameters, from top to bottom; the best by rank in blue."""
    rows = ranked(frame)
    names = [name for name in names if rows[name].nunique() > 1][:MAX_PARAMETERS]
    figure, scales = go.Figure(), [_scaled(rows[name]) for name in names]
    quarters = np.arange(len(rows)) * 4 // max(len(rows), 1)
    for quarter in (3, 2, 1, 0):
        indices = np.flatnonzero(quarters == quarter)[:MAX_LINES]
        lines = [_line(rows.iloc[i], {name: x[i] for name, (x, _) in zip(names, scales, strict=True)}) for i in indices]
        x, y, hover_texts = ([item for line in lines for item in line[part]] for part in range(3))
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines+markers",
            name=("best quarter", "second", "third", "last quarter")[quarter],
            line={"color": QUARTER_COLOURS[quarter], "width": 1.8 if quarter == 0 else 1},
            marker={"size": 4},
            opacity=0.9 if quarter == 0 else 0.7,
            hovertext=hover_texts,
            hoverinfo="text",
            connectgaps=False,
            legendrank=quarter,
        )
    for height, name, (_, ticks) in zip(range(len(names), 0, -1), names, scales, strict=True):
        add_row_label(figure, height, f"<b>{as_label(name, 40)}</b>", shift=15)
        for position, tick in ticks.items():
            figure.add_annotation(
                x=position, y=height, text=as_label(tick, 12), showarrow=False, yshift=-11, font_size=10
            )
    set_axes(figure, "", "", 90 + 58 * max(len(names), 1))
    figure.update_layout(margin={"l": 8, "b": 8})
    figure.update_xaxes(visible=False, range=[-0.06, 1.06])
    figure.update_yaxes(visible=False, range=[0.5, len(names) + 0.6])
    return with_caption(figure, _parallel_caption(rows, names, quarters))


def _line(row: pd.Series, positions: Mapping[str, float | None]) -> tuple[list[Any], list[Any], list[str]]:
    """x, y and hover texts of a trial's line, with a gap at its end; it passes by the axes that have no position."""
    when = "as a short trial, after" if row["short"] else "when pruned after"
    early = f" {when} epoch {row['epochs']}" if pd.isna(row["score"]) else ""
    trial = f"trial {row['trial']}, {row[row['objective']]:.4f}{early}"
    points = [(x, len(positions) - axis, name) for axis, (name, x) in enumerate(positions.items()) if x is not None]
    texts = [f"{trial}: {as_label(field_label(name))} {as_label(value_label(row[name]))}" for _, _, name in points]
    return [*(x for x, _, _ in points), None], [*(y for _, y, _ in points), None], [*texts, ""]


def _parallel_caption(rows: pd.DataFrame, names: Sequence[str], quarters: np.ndarray) -> str:
    """What most of the best quarter have, and fewer of the others."""
    best, others, gains = rows[quarters == 0], rows[quarters > 0], []
    if len(best) < MIN_BEST:
        return f"Too few trials ({len(best)} in the best quarter) to say what marks them."
    for name in names:
        values = best[name].dropna()
        if len(values) > 1 and (values.map(type).eq(str).all() or values.nunique() < 3):
            value = values.mode().iloc[0]
            share, of_others = float((best[name] == value).mean()), float((others[name] == value).mean())
            line = f"{field_label(name)} {value_label(value)} ({share:.0%}, of the others {of_others:.0%})"
            gains.append((share - of_others, line))
    marks = [line for gain, line in sorted(gains, reverse=True)[:3] if gain > 0.15]
    group = f"the best {len(best)} of {len(rows)} trials by rank"
    return f"What marks {group}: {joined(marks)}." if marks else f"No single choice marks {group}."


def _scaled(values: pd.Series) -> tuple[list[float | None], dict[float, str]]:
    """Where in [0, 1] each value lies, and the labels of the axis; by the logarithm over a wide range."""
    known = values.dropna()
    if all(isinstance(value, (int, float, np.number)) and not isinstance(value, bool) for value in known):
        numbers = values.astype(float)
        low, high = float(numbers.min()), float(numbers.max())
        if low > 0 and high / low > LOG_RATIO:
            numbers = numbers.map(math.log)
        scaled = (numbers - numbers.min()) / (numbers.max() - numbers.min())
        ends = {0.0: value_label(low), 1.0: value_label(high)}
        return [None if np.isnan(position) else float(position) for position in scaled], ends
    ranks = {value: index for index, value in enumerate(sorted(known.unique(), key=str))}
    last = max(len(ranks) - 1, 1)
    positions = [None if pd.isna(value) else ranks[value] / last for value in values]
    return positions, {rank / last: value_label(value) for value, rank in ranks.items()}


def effect(effects: Effects, measure: str = "the score") -> go.Figure:
    """Dots with intervals: what a choice adds to `measure`, compared with its reference, the clearest first."""
    table = effects.table.assign(clear=lambda t: t["effect"].abs() / ((t["high"] - t["low"]) / 2).clip(1e-12))
    top = table.nlargest(MAX_EFFECTS, "clear")[::-1]
    figure, is_clear = go.Figure(), _excludes_zero(top)
    for clear, colour, name in ((True, BEST, "interval leaves 0 out"), (False, FAINT, "interval holds 0")):
        rows = np.flatnonzero(is_clear == clear)
        if len(rows):
            _add_intervals(figure, top.iloc[rows], rows, colour, name)
    names = [
        f"{as_label(field_label(row['parameter']), 28)} <b>{as_label(row['level'], 22)}</b>, "
        f"not {as_label(row['reference'].replace(' (the most frequent)', '*'), 22)}"
        for _, row in top.iterrows()
    ]
    set_named_rows(figure, names, 38)
    figure.add_vline(x=0, line_width=1, line_color=FAINT)
    figure.update_xaxes(title="points (95 % interval)")
    num_clear, trials = int(_excludes_zero(table).sum()), f"{effects.trials} trials"
    caption = (
        f"{num_clear} of {len(table)} choices differ from what they are compared with by more than the noise of {trials}"
        if num_clear
        else f"None of {len(table)} choices differs from what it is compared with by more than the noise of {trials}"
    )
    drawn = f"; the {len(top)} clearest are drawn" if len(top) < len(table) else ""
    return with_caption(figure, f"By {measure}, {caption[:1].lower()}{caption[1:]}{drawn}.")


def _excludes_zero(rows: pd.DataFrame) -> pd.Series:
    return (rows["low"] > 0) | (rows["high"] < 0)


def _add_intervals(figure: go.Figure, rows: pd.DataFrame, y: np.ndarray, colour: str, name: str) -> None:
    figure.add_scatter(
        x=100 * rows["effect"],
        y=y,
        mode="markers",
        name=name,
        marker={"color": colour, "size": 9},
        error_x={
            "array": 100 * (rows["high"] - rows["effect"]),
            "arrayminus": 100 * (rows["effect"] - rows["low"]),
            "thickness": 1.5,
            "width": 3,
        },
        customdata=rows[["n", "pruned"]],
        hovertemplate="%{x:+.2f} points; n = %{customdata[0]}; %{customdata[1]} pruned<extra></extra>",
    )
