"""plotly's figures of a study, from the table of its trials; `figure.layout.meta` says in a sentence what is to be seen.

They fit a page of 360 pixels and one of 1,400: names stand above their rows and not beside them. Colours are those of
Okabe and Ito (2008), which the colour-blind tell apart, on a ground of any shade. Names from users are cut and escaped:
plotly takes some for HTML.
"""

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.errors import escape_control
from pipeline.evaluation.scores import reliability
from pipeline.report.analysis import Effects, pareto
from pipeline.report.trials import (
    F1,
    Predictions,
    challenger,
    control,
    feasible,
    finished,
    ranked,
    short,
    show,
    weakest_class,
    with_control,
)

BEST, CONTROL, GOOD, BAD, OTHER, FAINT = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8c8c8c"
CYCLE = (BEST, CONTROL, GOOD, BAD, "#E69F00", OTHER)
SHADES = ("#b4b4b4", "#8fb8d6", "#56B4E9", "#0072B2")  # of quarters, the best last
LINES = 60  # of pruned trials; and of each quarter in the parallel coordinates
ROWS, CLASSES = 12, 20  # parameters, classes in one figure
FEWEST_IN_BIN = 10  # images
HEATED = 10  # trials beside the control
COSTS = {
    "time/training_s": "training time, s",
    "model/parameters": "parameters",
    "model/latency_ms": "latency of one image, ms",
}


def text(name: object, most: int = 26) -> str:
    """A user's name as a figure takes it: on one line, its middle cut out if need be, no HTML."""
    line = escape_control(str(name))
    if len(line) > most:
        line = f"{line[: most // 2]}…{line[len(line) - most // 2 + 1 :]}"
    return html.escape(line, quote=False).replace("$", "&#36;")  # no formula


def history(frame: pd.DataFrame) -> go.Figure:
    """Score by trial, the best so far, infeasible ones hollow, and where those stood that were stopped; failed at the foot."""
    figure, parts = go.Figure(), []
    several = frame["study"].nunique() > 1
    for colour, (study, runs) in zip(_colours(frame), _studies(frame), strict=True):
        done = feasible(runs).sort_values("trial")
        label = text(study) if several else "finished"
        figure.add_scatter(
            x=done["trial"],
            y=done["score"],
            mode="markers",
            name=label,
            marker={"color": colour, "size": 7, "opacity": 0.75},
            hovertemplate="trial %{x}: %{y:.4f}<extra></extra>",
        )
        figure.add_scatter(
            x=done["trial"],
            y=done["score"].cummax(),
            mode="lines",
            name="best so far",
            showlegend=not several,
            line={"color": colour, "shape": "hv", "width": 1.5},
            hoverinfo="skip",
        )
        if len(done):
            top = feasible(runs).iloc[0]
            parts.append(f"{study}: best {top['score']:.4f} at trial {top['trial']}" if several else _found(done, top))
    done = finished(frame)
    broken = done[done["infeasible"] != ""]
    if len(broken):
        figure.add_scatter(**_infeasible(broken, broken["trial"], "trial %{x}: %{y:.4f}"))
    unfinished = frame[(frame["role"] == "trial") & frame["score"].isna()]
    metric = unfinished["objective"].iloc[0] if len(unfinished) else ""
    stopped = unfinished[unfinished[metric].notna()] if metric in unfinished else unfinished[:0]
    for state, symbol in (("pruned", "x-thin"), ("failed", "triangle-down"), ("interrupted", "square-open")):
        some = stopped[stopped["state"] == state]
        if len(some):
            figure.add_scatter(
                x=some["trial"],
                y=some[metric],
                mode="markers",
                name=state,
                marker={"color": FAINT, "symbol": symbol, "size": 8, "line": {"width": 2, "color": FAINT}},
                customdata=some["epochs"],
                hovertemplate="trial %{x}: %{y:.4f} after epoch %{customdata}<extra></extra>",
            )
    base = None if several else control(frame)
    if base is not None:
        _level(figure, base["score"], "control")
    _axes(figure, "trial", _objective(frame), 360)
    _whole(figure, frame["trial"].max())
    if not several and (low := _floor(frame)) is not None:
        figure.update_yaxes(range=[low, None], autorangeoptions=None)
        parts.append(f"Lower values than {low:.3f} are cut off")
    if not parts:
        states = frame["state"].value_counts()
        parts = [
            f"No {'feasible ' * bool(len(broken))}trial finished: "
            f"{_listed([f'{count} {state}' for state, count in states.items()])}"
        ]
    if len(stopped):
        low, high = stopped["epochs"].min(), stopped["epochs"].max()
        when = f"after epoch {low}" if low == high else f"after epochs {low} to {high}"
        parts.append(f"Grey: where trials that did not finish stood when they ended, {when}: not yet a score")
    return _said(figure, ". ".join(parts) + ".")


def _infeasible(rows: pd.DataFrame, x: pd.Series, hover: str) -> dict[str, Any]:
    return {
        "x": x,
        "y": rows["score"],
        "mode": "markers",
        "name": "infeasible",
        "marker": {"color": FAINT, "symbol": "circle-open", "size": 8},
        "customdata": rows["infeasible"],
        "hovertemplate": hover + ", %{customdata}<extra></extra>",
    }


def _found(done: pd.DataFrame, top: pd.Series) -> str:
    half = done["score"].iloc[len(done) // 2 :]
    first = done["score"].iloc[: len(done) // 2]
    trials = f"{len(done)} finished trial{'s' * (len(done) != 1)}"
    line = f"The best of {trials}, {top['score']:.4f}, came at trial {top['trial']}"
    if len(first) > 2:
        line += f"; the median rose from {first.median():.4f} in the first half of them to {half.median():.4f} in the second"
        line = line.replace("rose", "fell") if half.median() < first.median() else line
    return line


def _floor(frame: pd.DataFrame) -> float | None:
    """Where the axis of scores begins, if a few poor trials would press the others together."""
    scores = frame["score"].dropna()
    if len(scores) < 8:
        return None
    low, middle, high = scores.quantile([0.0, 0.1, 1.0])
    return float(middle - 0.3 * (high - middle)) if high > middle and high - low > 3 * (high - middle) else None


def importance(shares: pd.DataFrame) -> go.Figure:
    """Bars of `analysis.importances`, with what chance alone gives."""
    top = shares.head(ROWS)[::-1]
    figure, rows = go.Figure(), list(range(len(top)))
    above = top["importance"] > top["chance"]
    figure.add_bar(
        x=top["importance"],
        y=rows,
        orientation="h",
        width=0.45,
        name="importance",
        showlegend=False,
        marker={"color": [BEST if yes else FAINT for yes in above]},
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
    _named_rows(figure, [text(name, 40) for name in top["parameter"]], 38)
    figure.update_xaxes(tickformat=".0%", title="share of importance", rangemode="tozero")
    names = list(shares["parameter"][shares["importance"] > shares["chance"]])
    said = f"Above what chance gives: {_listed(names) or 'none'}, of {len(shares)} parameters"
    return _said(figure, f"{said}; about {0.05 * len(shares):.1f} would be by chance alone.")


def parallel(frame: pd.DataFrame, names: Sequence[str]) -> go.Figure:
    """Each finished or pruned trial as a line through its parameters, from top to bottom; the best by rank in blue."""
    done = ranked(frame)
    metric = str(frame["objective"].iloc[0])
    names = [name for name in names if done[name].nunique() > 1][:ROWS]
    figure, rows, ticks = go.Figure(), [], []
    for name in names:
        places, ends = _places(done[name])
        rows.append(places)
        ticks.append(ends)
    quarter = np.arange(len(done)) * 4 // max(len(done), 1)
    for which in (3, 2, 1, 0):
        chosen = np.flatnonzero(quarter == which)[:LINES]
        x, y, said = [], [], []
        for index in chosen:
            row = done.iloc[index]
            known = [n for n, places in enumerate(rows) if places[index] is not None]  # a line passes by the others
            x += [*(rows[n][index] for n in known), None]
            y += [*(len(rows) - n for n in known), None]
            said += [
                *(f"{_where(row, metric)}: {text(short(names[n]))} {text(show(row[names[n]]))}" for n in known),
                "",
            ]
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines+markers",
            name=("best quarter", "second", "third", "last quarter")[which],
            line={"color": SHADES[3 - which], "width": 1.8 if which == 0 else 1},
            marker={"size": 4},
            opacity=0.9 if which == 0 else 0.7,
            hovertext=said,
            hoverinfo="text",
            connectgaps=False,
            legendrank=which,
        )
    heights = range(len(rows), 0, -1)
    for height, name, ends in zip(heights, names, ticks, strict=True):
        _label(figure, height, f"<b>{text(name, 40)}</b>", shift=15)
        for place, label in ends.items():
            figure.add_annotation(x=place, y=height, text=text(label, 12), showarrow=False, yshift=-11, font_size=10)
    _axes(figure, "", "", 90 + 58 * max(len(rows), 1))
    figure.update_layout(margin={"l": 8, "b": 8})
    figure.update_xaxes(visible=False, range=[-0.06, 1.06])
    figure.update_yaxes(visible=False, range=[0.5, len(rows) + 0.6])
    return _said(figure, _common(done, names, quarter))


def _common(done: pd.DataFrame, names: Sequence[str], quarter: np.ndarray) -> str:
    """What most of the best quarter have, and fewer of the others."""
    best, rest, found = done[quarter == 0], done[quarter > 0], []
    for name in names:
        values = best[name].dropna()
        if len(values) > 1 and (values.map(type).eq(str).all() or values.nunique() < 3):
            value = values.mode().iloc[0]
            share, other = float((best[name] == value).mean()), float((rest[name] == value).mean())
            found.append((share - other, f"{short(name)} {show(value)} ({share:.0%}, of the others {other:.0%})"))
    told = [line for gain, line in sorted(found, reverse=True)[:3] if gain > 0.15]
    few = f"the best {len(best)} of {len(done)} trials by rank"
    return f"What marks {few}: {_listed(told)}." if told and len(best) > 3 else f"No single choice marks {few}."


def _where(row: pd.Series, metric: str) -> str:
    pruned = f" when pruned after epoch {row['epochs']}" if pd.isna(row["score"]) else ""
    return f"trial {row['trial']}, {row[metric]:.4f}{pruned}"


def _places(values: pd.Series) -> tuple[list[float | None], dict[float, str]]:
    """Where in [0, 1] each value stands, and the names on the axis; by the logarithm over a wide range."""
    known = values.dropna()
    if all(isinstance(value, (int, float, np.number)) and not isinstance(value, bool) for value in known):
        numbers = values.astype(float)
        low, high = float(numbers.min()), float(numbers.max())
        if low > 0 and high / low > 30:
            numbers = numbers.map(math.log)
        span = (numbers - numbers.min()) / (numbers.max() - numbers.min())
        return [None if np.isnan(place) else float(place) for place in span], {0.0: show(low), 1.0: show(high)}
    order = {value: index for index, value in enumerate(sorted(known.unique(), key=str))}
    step = max(len(order) - 1, 1)
    return [None if pd.isna(v) else order[v] / step for v in values], {i / step: show(v) for v, i in order.items()}


def learning_curves(frame: pd.DataFrame, histories: pd.DataFrame) -> go.Figure:
    """The objective by epoch, from `trials.histories`: the best trial, the control, and pruned ones in grey."""
    figure, base = go.Figure(), control(frame)
    curves = dict(iter(histories.groupby("run_id")))
    pruned = [run_id for run_id in frame["run_id"][frame["state"] == "pruned"] if run_id in curves]
    x, y = [], []
    for run_id in pruned:
        x += [*curves[run_id]["epoch"], None]
        y += [*curves[run_id]["value"], None]
    if pruned:
        line = {"color": FAINT, "width": 1}
        figure.add_scatter(x=x, y=y, mode="lines+markers", name="pruned", opacity=0.6, line=line, marker={"size": 3})
    chosen = {} if base is None else {f"control (trial {base['trial']})": (base, CONTROL)}
    if (other := challenger(frame)) and (base is None or other[0]["run_id"] != base["run_id"]):
        chosen[f"{other[1]} (trial {other[0]['trial']})"] = (other[0], BEST)
    chosen = {label: (row, colour) for label, (row, colour) in chosen.items() if row["run_id"] in curves}
    for label, (row, colour) in chosen.items():
        figure.add_scatter(
            x=curves[row["run_id"]]["epoch"],
            y=curves[row["run_id"]]["value"],
            mode="lines+markers",
            name=label,
            line={"color": colour, "width": 2.5},
            marker={"size": 5},
            hovertemplate="epoch %{x}: %{y:.4f}<extra></extra>",
        )
    _axes(figure, "epoch", _objective(frame), 360)
    _whole(figure, histories["epoch"].max())
    said = f"Grey: {len(pruned)} pruned trial{'s' * (len(pruned) != 1)}" if pruned else "No trial was pruned"
    if len(chosen) == 2:
        one, two = (curves[row["run_id"]].set_index("epoch")["value"] for row, _ in chosen.values())
        gap = (two - one).dropna()
        ahead = (
            f"The {other[1] if other else ''} was ahead of the control in {int((gap > 0).sum())} of {len(gap)} epochs"
        )
        said = f"{ahead}. {said}"
    return _said(figure, f"{said}.")


def effect(found: Effects, of: str = "the score", most: int = 16) -> go.Figure:
    """Dots with intervals: what a choice adds to `of` beside the control's, the clearest first."""
    table = found.table.assign(clear=lambda t: t["effect"].abs() / ((t["high"] - t["low"]) / 2).clip(1e-12))
    top = table.nlargest(most, "clear")[::-1]
    clear = (top["low"] > 0) | (top["high"] < 0)
    figure = go.Figure()
    for sure, colour, label in ((True, BEST, "interval leaves 0 out"), (False, FAINT, "interval holds 0")):
        rows = np.flatnonzero(clear == sure)
        some = top.iloc[rows]
        if len(some):
            figure.add_scatter(
                x=100 * some["effect"],
                y=rows,
                mode="markers",
                name=label,
                marker={"color": colour, "size": 9},
                error_x={
                    "array": 100 * (some["high"] - some["effect"]),
                    "arrayminus": 100 * (some["effect"] - some["low"]),
                    "thickness": 1.5,
                    "width": 3,
                },
                customdata=some[["n", "pruned"]],
                hovertemplate="%{x:+.2f} points; n = %{customdata[0]}; %{customdata[1]} pruned<extra></extra>",
            )
    names = [
        f"{text(short(row['parameter']), 28)} "
        f"<b>{text(row['level'], 22)}</b>, not {text(row['reference'].replace(' (the most frequent)', '*'), 22)}"
        for _, row in top.iterrows()
    ]
    _named_rows(figure, names, 38)
    figure.add_vline(x=0, line_width=1, line_color=FAINT)
    figure.update_xaxes(title=f"{of}, points (95 % interval)")
    total = int(((table["low"] > 0) | (table["high"] < 0)).sum())
    said = (
        f"{total} of {len(table)} choices differ from the control's by more than the noise of {found.trials} trials"
        if total
        else f"None of {len(table)} choices can be told from the control's by {found.trials} trials"
    )
    return _said(figure, f"{said}; the {len(top)} clearest are drawn." if len(top) < len(table) else f"{said}.")


def per_class(frame: pd.DataFrame) -> go.Figure:
    """F1 of each class for the best trials and the control, the weakest class on top."""
    base = control(frame)
    rows = with_control(finished(frame).head(HEATED), base)
    names = [name for name in frame.columns if name.startswith(F1) and rows[name].notna().any()]
    values = rows[names].astype(float)
    names = list(values.mean().sort_values().index)[:CLASSES]
    heads = [f"{row['trial']}" + ("<br>control" if row["control"] else "") for _, row in rows.iterrows()]
    shown = values[names].to_numpy().T
    figure = go.Figure()
    figure.add_heatmap(
        z=shown,
        x=list(range(len(heads))),
        y=list(range(len(names))),
        colorscale="Cividis",
        texttemplate="%{z:.2f}",
        textfont={"size": 10},
        showscale=False,
        xgap=1,
        ygap=1,
        hovertemplate="F1 %{z:.4f}<extra></extra>",
    )
    _axes(figure, "trial, the best first", "", 75 + 28 * max(len(names), 3))
    _cells(figure, heads, [text(name.removeprefix(F1), 16) for name in names])
    if rows.empty or not names:
        return _said(figure, "No run has F1 by class.")
    best = rows.iloc[0]
    weakest, f1 = weakest_class(best)
    said = f"The best trial's weakest class is {weakest}, F1 {f1:.3f}"
    if base is not None and best["run_id"] != base["run_id"]:
        moved = (best[names].astype(float) - base[names].astype(float)).sort_values()
        said += f"; beside the control it gains most in {moved.index[-1].removeprefix(F1)} ({moved.iloc[-1]:+.3f}) and "
        said += f"{'loses most' if moved.iloc[0] < 0 else 'least'} in {moved.index[0].removeprefix(F1)} ({moved.iloc[0]:+.3f})"
    return _said(figure, said + ".")


def confusion_difference(best: Predictions, base: Predictions) -> go.Figure:
    """The best's confusion matrix less the control's, in images; blue where the best does better."""
    classes = len(best.classes)
    cells = np.zeros((classes, classes), int)
    np.add.at(cells, (best.labels, best.answers), 1)
    np.add.at(cells, (base.labels, base.answers), -1)
    chosen = np.sort(np.argsort(-(np.abs(cells).sum(0) + np.abs(cells).sum(1)), kind="stable")[:CLASSES])
    part = cells[np.ix_(chosen, chosen)]
    worse = np.where(np.eye(len(chosen), dtype=bool), -part, part)
    figure, labels = go.Figure(), [text(best.classes[index], 12) for index in chosen]
    places, most = list(range(len(chosen))), max(int(np.abs(worse).max()), 1)
    figure.add_heatmap(
        z=worse,
        x=places,
        y=places,
        text=np.where(part == 0, "", np.char.mod("%+d", part)),
        texttemplate="%{text}",
        customdata=part,
        hovertemplate="%{customdata:+d} images<extra></extra>",
        colorscale=[[0, BEST], [0.5, "#f4f4f4"], [1, CONTROL]],
        zmin=-most,
        zmax=most,
        showscale=False,
        xgap=1,
        ygap=1,
    )
    _axes(figure, "predicted class", "true class", 110 + 27 * max(len(places), 3))
    _cells(figure, labels, labels, tickangle=-60)
    off = cells - np.diag(np.diag(cells))
    saved, lost = (np.unravel_index(off.argmin(), off.shape), np.unravel_index(off.argmax(), off.shape))
    pairs = [f"{best.classes[i]} taken for {best.classes[j]}: {off[i, j]:+d}" for i, j in (saved, lost) if off[i, j]]
    said = f"Largest changes from the control, of {len(best.labels):,} images: {'; '.join(pairs)}"
    said = said if pairs else "No confusion is more frequent by the one than by the other"
    return _said(figure, said + ".")


def calibration(runs: dict[str, Predictions]) -> go.Figure:
    """Accuracy by confidence in 15 bins, the size of a dot being its images; (label -> predictions), the best first."""
    figure, parts = go.Figure(), []
    line = {"color": FAINT, "dash": "dash", "width": 1}
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", showlegend=False, line=line, hoverinfo="skip")
    for colour, (label, run) in zip(CYCLE, runs.items(), strict=False):
        measured = reliability(run.probabilities, run.labels)
        full = measured.count >= min(FEWEST_IN_BIN, measured.count.max())
        figure.add_scatter(
            x=measured.confidence[full],
            y=measured.accuracy[full],
            mode="lines+markers",
            name=text(label),
            line={"color": colour, "width": 1.5},
            marker={"size": 5 + 15 * np.sqrt(measured.count[full] / len(run.labels)), "opacity": 0.8},
            customdata=measured.count[full],
            hovertemplate="said %{x:.1%}, right %{y:.1%} of %{customdata} images<extra></extra>",
        )
        excess = float(run.probabilities.max(1).mean() - (run.answers == run.labels).mean())
        way = "overconfident" if excess > 0 else "underconfident"
        parts.append(f"{label} is {way} by {abs(100 * excess):.1f} points on average, ECE {measured.ece:.3f}")
    _axes(figure, "confidence", "accuracy", 360)
    figure.update_xaxes(tickformat=".0%", range=[0, 1.04])
    figure.update_yaxes(tickformat=".0%", range=[0, 1.04])
    said, images = "; ".join(parts), len(next(iter(runs.values())).labels)
    rest = f"{images:,} images in 15 bins, those with fewer than {FEWEST_IN_BIN} left out"
    return _said(figure, f"{said[:1].upper()}{said[1:]} ({rest}).")


def cost(frame: pd.DataFrame, measure: str = "time/training_s") -> go.Figure:
    """Score against one of COSTS; the feasible trials that no other beats at less cost are joined (Pareto front)."""
    measured = finished(frame)
    measured = measured[measured[measure].notna()] if measure in measured else measured[:0]
    done, broken = feasible(measured), measured[measured["infeasible"] != ""]
    figure, base, several = go.Figure(), control(frame), frame["study"].nunique() > 1
    _axes(figure, COSTS.get(measure, measure), _objective(frame), 360)
    if len(broken):
        figure.add_scatter(**_infeasible(broken, broken[measure], "%{y:.4f} at %{x:,.4g}"))
    if done.empty:
        return _said(figure, "No feasible trial has this cost.")
    for colour, (study, runs) in zip(_colours(frame) if several else [FAINT], _studies(done), strict=False):
        marker = {"color": colour, "size": 7, "opacity": 0.7}
        figure.add_scatter(**_dots(runs, measure), name=text(study) if several else "finished", marker=marker)
    edge = done[pareto(done[measure].to_numpy(), done["score"].to_numpy())].sort_values(measure)
    line, dots = {"color": FAINT if several else BEST, "width": 1.5, "shape": "hv"}, {"size": 9, "color": BEST}
    if several:
        dots = {"size": 12, "color": FAINT, "symbol": "circle-open"}
    figure.add_scatter(**_dots(edge, measure, "lines+markers"), name="Pareto front", marker=dots, line=line)
    if not several and base is not None and base["run_id"] in set(done["run_id"]):
        ring = {"color": CONTROL, "size": 14, "symbol": "circle-open", "line": {"width": 2}}
        figure.add_scatter(**_dots(done[done["run_id"] == base["run_id"]], measure), name="control", marker=ring)
    if done[measure].min() > 0 and done[measure].max() > 10 * done[measure].min():
        figure.update_xaxes(type="log", dtick=1)
    if not several and (low := _floor(frame)) is not None:
        figure.update_yaxes(range=[low, None])
    cheap, top = edge.iloc[0], edge.iloc[-1]
    if len(edge) == 1:
        return _said(figure, f"Of {len(done)} that finished {_named(top, several)} is both the best and the cheapest.")
    share, lost = cheap[measure] / top[measure], 100 * (top["score"] - cheap["score"])
    said = (
        f"{len(edge)} of {len(done)} finished trials are on the front. Its cheapest, {_named(cheap, several)}, costs "
    )
    said += f"{share:.0%} of what its best, {_named(top, several)}, costs, and scores {lost:.2f} points less"
    return _said(figure, f"{said}.")


def _named(row: pd.Series, several: bool) -> str:
    return f"trial {row['trial']}{' of ' + str(row['study']) if several else ''}"


def _dots(rows: pd.DataFrame, measure: str, mode: str = "markers") -> dict[str, Any]:
    return {
        "x": rows[measure],
        "y": rows["score"],
        "mode": mode,
        "customdata": [
            f"{text(study, 40)}, trial {trial}" for study, trial in zip(rows["study"], rows["trial"], strict=True)
        ],
        "hovertemplate": "%{customdata}: %{y:.4f} at %{x:,.4g}<extra></extra>",
    }


def spread(frame: pd.DataFrame) -> go.Figure:
    """The finished scores of several studies side by side."""
    figure = go.Figure()
    groups = [(study, finished(runs)) for study, runs in _studies(frame)]
    names: list[str] = []
    for colour, (study, done) in reversed(list(zip(_colours(frame), groups, strict=True))):  # the first on top
        figure.add_box(
            x=done["score"],
            y=[len(names)] * len(done),
            orientation="h",
            boxpoints="all",
            jitter=0.4,
            pointpos=0,
            width=0.4,
            marker={"color": colour, "size": 5, "opacity": 0.6},
            line={"width": 1.5},
            fillcolor="rgba(0,0,0,0)",
            showlegend=False,
            customdata=done["trial"],
            hovertemplate="trial %{customdata}: %{x:.4f}<extra></extra>",
        )
        names.append(f"{text(study, 40)}, n = {len(done)}")
    _named_rows(figure, names, 74)
    figure.update_layout(margin_t=8)
    figure.update_xaxes(title=_objective(frame))
    medians = {study: done["score"].median() for study, done in groups if len(done)}
    said = "; ".join(f"{study}: median {median:.4f}" for study, median in medians.items()) or "No trial finished"
    return _said(figure, said + ".")


# ---------------------------------------------------------------------------------------------------- how they look


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


def _axes(figure: go.Figure, x: str, y: str, height: int) -> None:
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


def _whole(figure: go.Figure, most: int) -> None:
    """No ticks between whole numbers."""
    figure.update_xaxes(dtick=1 if most <= 10 else None)


def _named_rows(figure: go.Figure, names: Sequence[str], pitch: int) -> None:
    """Rows 0, 1, ... from the foot, each with its name above it, at the left edge."""
    _axes(figure, "", "", 100 + pitch * max(len(names), 1))
    figure.update_layout(margin_l=8)
    figure.update_yaxes(visible=False, range=[-0.5, len(names) - 0.2])
    for row, name in enumerate(names):
        _label(figure, row, name, shift=pitch * 0.36)


def _cells(figure: go.Figure, across: Sequence[str], down: Sequence[str], tickangle: int = 0) -> None:
    """The names of a heat map's columns and rows, which take the room that they need."""
    figure.update_layout(margin_t=8)
    figure.update_xaxes(tickvals=list(range(len(across))), ticktext=across, tickangle=tickangle)
    figure.update_yaxes(tickvals=list(range(len(down))), ticktext=down, autorange="reversed")
    for axis in (figure.update_xaxes, figure.update_yaxes):
        axis(automargin=True, showgrid=False, zeroline=False)


def _label(figure: go.Figure, row: float, name: str, shift: float = 12) -> None:
    figure.add_annotation(
        xref="paper", x=0, y=row, yshift=shift, text=name, showarrow=False, xanchor="left", font_size=11, align="left"
    )


def _level(figure: go.Figure, score: float, name: str) -> None:
    line = {"color": CONTROL, "dash": "dash", "width": 1}
    words = {"text": name, "font": {"color": CONTROL, "size": 11}}
    figure.add_hline(y=score, line=line, annotation=words, annotation_position="bottom right")


def _said(figure: go.Figure, sentence: str) -> go.Figure:
    return figure.update_layout(meta=sentence)


def _objective(frame: pd.DataFrame) -> str:
    return ", ".join(text(name) for name in frame["objective"].unique())


def _studies(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(str(study), runs) for study, runs in frame.groupby("study", sort=False)]


def _colours(frame: pd.DataFrame) -> list[str]:
    return [CYCLE[index % len(CYCLE)] for index in range(frame["study"].nunique())]


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
