"""Scores: by trial, by epoch, by cost, and by study."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pipeline.errors import counted
from pipeline.report.analysis import pareto
from pipeline.report.figures.layout import (
    BEST,
    CONTROL,
    FAINT,
    as_label,
    by_study,
    joined,
    objective_label,
    score_floor,
    set_axes,
    set_integer_ticks,
    set_named_rows,
    study_colours,
    with_caption,
)
from pipeline.report.trials import (
    LATENCY,
    challenger,
    control,
    ended,
    feasible,
    infeasible,
    last_values,
    latency,
    networks,
    state_words,
)
from pipeline.tracking.tags import State

MAX_PRUNED_CURVES = 60
SHORT_MEANS = "a quarter of the epochs with the whole schedule, so above a full one at equal epoch"
TIME = "time/training_s"
COSTS = {
    TIME: "training time, s",
    "model/parameters": "parameters",
    LATENCY: "latency of one image, ms",
}
_SYMBOLS: dict[str, str] = {
    "short": "x-thin",
    State.PRUNED: "cross-thin",
    State.FAILED: "triangle-down",
    State.INTERRUPTED: "square-open",
}

# ------------------------------------------------------------------------------------------------------------ by trial


def history(frame: pd.DataFrame) -> go.Figure:
    """Score by trial, the best so far, and in grey infeasible and short ones, and where others ended."""
    figure, several, unfinished = go.Figure(), frame["study"].nunique() > 1, _unfinished(frame)
    for colour, (study, runs) in zip(study_colours(frame), by_study(frame), strict=True):
        _add_finished(figure, runs, as_label(study) if several else "finished", colour, with_best=not several)
    broken = infeasible(frame)
    _add_infeasible(figure, broken, broken["trial"], "trial %{x}: %{y:.4f}")
    _add_unfinished(figure, unfinished)
    if not several and (base := control(frame)) is not None:
        line = {"color": CONTROL, "dash": "dash", "width": 1}
        annotation = {"text": "control", "font": {"color": CONTROL, "size": 11}}
        figure.add_hline(y=base["score"], line=line, annotation=annotation, annotation_position="bottom right")
    set_axes(figure, "trial", objective_label(frame), 360)
    set_integer_ticks(figure, frame["trial"])
    floor = None if several else score_floor(frame)
    if floor is not None:
        figure.update_yaxes(range=[floor, None], autorangeoptions=None)
    return with_caption(figure, _history_caption(frame, unfinished, floor))


def _add_finished(figure: go.Figure, runs: pd.DataFrame, name: str, colour: str, with_best: bool) -> None:
    """One study's feasible scores, and the best so far, which the legend names if `with_best`."""
    done = feasible(runs).sort_values("trial")
    figure.add_scatter(
        x=done["trial"],
        y=done["score"],
        mode="markers",
        name=name,
        marker={"color": colour, "size": 7, "opacity": 0.75},
        hovertemplate="trial %{x}: %{y:.4f}<extra></extra>",
    )
    figure.add_scatter(
        x=done["trial"],
        y=done["score"].cummax(),
        mode="lines",
        name="best so far",
        showlegend=with_best,
        line={"color": colour, "shape": "hv", "width": 1.5},
        hoverinfo="skip",
    )


def _add_infeasible(figure: go.Figure, rows: pd.DataFrame, x: pd.Series, hover: str) -> None:
    if len(rows):
        figure.add_scatter(
            x=x,
            y=rows["score"],
            mode="markers",
            name="infeasible",
            marker={"color": FAINT, "symbol": "circle-open", "size": 8},
            customdata=rows["infeasible"],
            hovertemplate=hover + ", %{customdata}<extra></extra>",
        )


def _unfinished(frame: pd.DataFrame) -> pd.DataFrame:
    """The trials that ended without a score and whose objective was measured, with a column `value`: the last one."""
    rows = ended(frame)
    rows = rows[rows["score"].isna()]
    return rows.assign(value=last_values(rows)).dropna(subset="value")


def _add_unfinished(figure: go.Figure, unfinished: pd.DataFrame) -> None:
    for state, symbol in _SYMBOLS.items():
        rows = unfinished[state_words(unfinished) == state]
        if len(rows):
            figure.add_scatter(
                x=rows["trial"],
                y=rows["value"],
                mode="markers",
                name=str(state),
                marker={"color": FAINT, "symbol": symbol, "size": 8, "line": {"width": 2, "color": FAINT}},
                customdata=rows["epochs"],
                hovertemplate="trial %{x}: %{y:.4f} after epoch %{customdata}<extra></extra>",
            )


def _history_caption(frame: pd.DataFrame, unfinished: pd.DataFrame, floor: float | None) -> str:
    scored = {study: done for study, runs in by_study(frame) if len(done := feasible(runs))}
    if frame["study"].nunique() > 1:
        tops = {study: done.iloc[0] for study, done in scored.items()}
        parts = [f"{study}: best {top['score']:.4f} at trial {top['trial']}" for study, top in tops.items()]
    else:
        parts = [_progress(done) for done in scored.values()]
    if floor is not None:
        parts.append(f"Lower values than {floor:.3f} are cut off")
    if not parts:
        states = joined([f"{count} {state}" for state, count in state_words(frame).value_counts().items()])
        parts = [f"{_none_finished(frame)}: {states}" if states else _none_finished(frame)]
    short = state_words(unfinished) == "short"
    if short.any():
        parts.append(
            f"Grey crosses: {counted(int(short.sum()), 'short trial')}, {_when(unfinished[short])}: {SHORT_MEANS}"
        )
    if not short.all():
        others = unfinished[~short]
        parts.append(f"Grey: where trials that did not finish stood when they ended, {_when(others)}: no score")
    return ". ".join(parts) + "."


def _when(rows: pd.DataFrame) -> str:
    low, high = rows["epochs"].min(), rows["epochs"].max()
    return f"after epoch {low}" if low == high else f"after epochs {low} to {high}"


def _none_finished(frame: pd.DataFrame) -> str:
    return f"No {'feasible ' * bool(len(infeasible(frame)))}trial finished"


def _progress(done: pd.DataFrame) -> str:
    """How good the best of the finished trials is, best first, and whether the search improved."""
    top, scores = done.iloc[0], done.sort_values("trial")["score"]
    first, second = scores.iloc[: len(scores) // 2], scores.iloc[len(scores) // 2 :]
    line = f"The best of {counted(len(done), 'finished trial')}, {top['score']:.4f}, came at trial {top['trial']}"
    if len(first) < 3:
        return line
    verb = "fell" if second.median() < first.median() else "rose"
    return (
        f"{line}; the median {verb} from {first.median():.4f} in the first half of them to {second.median():.4f} in "
        "the second"
    )


# ------------------------------------------------------------------------------------------------------------ by epoch


def learning_curves(frame: pd.DataFrame, histories: pd.DataFrame) -> go.Figure:
    """The objective by epoch, from `stored.histories`: the best trial, the control, and pruned ones in grey."""
    figure = go.Figure()
    named, grey = add_curves(figure, frame, histories)
    set_axes(figure, "epoch", objective_label(frame), 360)
    set_integer_ticks(figure, histories["epoch"])
    caption = f"Grey: {grey}" if grey else "No trial was short or pruned"
    if len(named) == 2:
        of_control, of_other = (curve.set_index("epoch")["value"] for curve in named.values())
        difference = (of_other - of_control).dropna()
        epochs = f"{int((difference > 0).sum())} of {len(difference)} epochs"
        caption = f"The {list(named)[1]} was ahead of the control in {epochs}. {caption}"
    return with_caption(figure, f"{caption}.")


def add_curves(
    figure: go.Figure, frame: pd.DataFrame, histories: pd.DataFrame, **options: Any
) -> tuple[dict[str, pd.DataFrame], str]:
    """Draw a metric by epoch: short and pruned trials in grey, the control, and the best or the runner-up; `options` of
    each trace.

    Returns what is drawn of the last two by name, and what is grey: `7 short trials` and what these are, or nothing.
    """
    base, curves = control(frame), dict(iter(histories.groupby("run_id")))
    rows = frame[(frame["state"] == State.PRUNED) & frame["run_id"].isin(curves)]
    pruned = [curves[run_id] for run_id in rows["run_id"]]
    state = " or ".join(sorted(set(state_words(rows)), reverse=True))
    if pruned:
        x = [epoch for curve in pruned for epoch in [*curve["epoch"], None]]
        y = [value for curve in pruned for value in [*curve["value"], None]]
        line, marker = {"color": FAINT, "width": 1}, {"size": 3}
        style = {"name": state, "legendgroup": "pruned", "opacity": 0.6, "line": line, "marker": marker}
        figure.add_scatter(x=x, y=y, mode="lines+markers", **style, **options)
    named = {} if base is None else {"control": (base, CONTROL)}
    if (other := challenger(frame)) and (base is None or other[0]["run_id"] != base["run_id"]):
        named[other[1]] = (other[0], BEST)
    named = {label: (row, colour) for label, (row, colour) in named.items() if row["run_id"] in curves}
    for label, (row, colour) in named.items():
        figure.add_scatter(
            x=curves[row["run_id"]]["epoch"],
            y=curves[row["run_id"]]["value"],
            mode="lines+markers",
            name=f"{label} (trial {row['trial']})",
            legendgroup=label,
            line={"color": colour, "width": 2.5},
            marker={"size": 5},
            hovertemplate="epoch %{x}: %{y:.4f}<extra></extra>",
            **options,
        )
    grey_trials = counted(len(pruned), f"{state} trial") if pruned else ""
    if rows["short"].any():
        grey_trials += f"; a short one has {SHORT_MEANS}"
    return {label: curves[row["run_id"]] for label, (row, _) in named.items()}, grey_trials


# ------------------------------------------------------------------------------------------------------------- by cost


def costs(frame: pd.DataFrame) -> list[str]:
    """Those of COSTS that are worth a figure: the time, and what differs by the networks of the feasible trials."""
    frame, done = frame.assign(**{LATENCY: latency(frame)}), feasible(frame).index
    return [name for name in COSTS if name == TIME or (name in frame and frame.loc[done, name].nunique() > 1)]


def cost(frame: pd.DataFrame, measure: str = TIME) -> go.Figure:
    """Score against one of COSTS; the feasible trials that no other beats at less cost are joined (Pareto front).

    Trials with the same network and number of epochs have no front: of what they cost too much is other work's.
    """
    frame = frame.assign(**{LATENCY: latency(frame)})
    measured = frame[frame[measure].notna()] if measure in frame else frame[:0]
    done, broken = feasible(measured), infeasible(measured)
    figure, base, several = go.Figure(), control(frame), frame["study"].nunique() > 1
    set_axes(figure, COSTS.get(measure, measure), objective_label(frame), 360)
    if len(broken):
        _add_infeasible(figure, broken, broken[measure], "%{y:.4f} at %{x:,.4g}")
    if done.empty:
        return with_caption(figure, "No feasible trial has this cost.")
    for colour, (study, runs) in zip(study_colours(frame) if several else [FAINT], by_study(frame), strict=True):
        marker, name = {"color": colour, "size": 7, "opacity": 0.7}, as_label(study) if several else "finished"
        figure.add_scatter(**_dots(done[done["run_id"].isin(runs["run_id"])], measure), name=name, marker=marker)
    kinds = len(set(zip(networks(done), done["epochs"], strict=True)))
    front = done[pareto(done[measure].to_numpy(), done["score"].to_numpy()) & (kinds > 1)].sort_values(measure)
    line, dots = {"color": FAINT if several else BEST, "width": 1.5, "shape": "hv"}, {"size": 9, "color": BEST}
    if several:
        dots = {"size": 12, "color": FAINT, "symbol": "circle-open"}
    if len(front):
        figure.add_scatter(**_dots(front, measure, "lines+markers"), name="Pareto front", marker=dots, line=line)
    if not several and base is not None and base["run_id"] in set(done["run_id"]):
        ring = {"color": CONTROL, "size": 14, "symbol": "circle-open", "line": {"width": 2}}
        figure.add_scatter(**_dots(done[done["run_id"] == base["run_id"]], measure), name="control", marker=ring)
    if done[measure].min() > 0 and done[measure].max() > 10 * done[measure].min():
        figure.update_xaxes(type="log", dtick="D2")  # ticks at 1, 2 and 5 times a power of ten
    if not several and (floor := score_floor(frame)) is not None:
        figure.update_yaxes(range=[floor, None])
    return with_caption(figure, _front_caption(front, len(done), measure, several))


def _front_caption(front: pd.DataFrame, num_finished: int, measure: str, several: bool) -> str:
    """What the cheapest of the front, the first, costs and scores, compared with the best, the last."""
    if front.empty:
        trials = f"{counted(num_finished, 'finished trial')} with one network and one number of epochs"
        return f"No front, of {trials}: costs differ by other settings and by other work on the machine."
    cheapest, best = front.iloc[0], front.iloc[-1]
    names = [f"trial {row['trial']}{f' of {row.study}' if several else ''}" for row in (cheapest, best)]
    if len(front) == 1:
        return f"Of {num_finished} that finished {names[1]} is both the best and the cheapest."
    return (
        f"{len(front)} of {num_finished} finished trials are on the front. Its cheapest, {names[0]}, costs "
        f"{cheapest[measure] / best[measure]:.0%} of what its best, {names[1]}, costs, and scores "
        f"{100 * (best['score'] - cheapest['score']):.2f} points less."
    )


def _dots(rows: pd.DataFrame, measure: str, mode: str = "markers") -> dict[str, Any]:
    return {
        "x": rows[measure],
        "y": rows["score"],
        "mode": mode,
        "customdata": [
            f"{as_label(study, 40)}, trial {trial}" for study, trial in zip(rows["study"], rows["trial"], strict=True)
        ],
        "hovertemplate": "%{customdata}: %{y:.4f} at %{x:,.4g}<extra></extra>",
    }


# ------------------------------------------------------------------------------------------------------------ by study


def spread(frame: pd.DataFrame) -> go.Figure:
    """The feasible scores of several studies side by side."""
    figure = go.Figure()
    groups = [(study, feasible(runs)) for study, runs in by_study(frame)]
    names: list[str] = []
    for colour, (study, done) in reversed(list(zip(study_colours(frame), groups, strict=True))):  # the first on top
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
        names.append(f"{as_label(study, 40)}, n = {len(done)}")
    set_named_rows(figure, names, 74)
    figure.update_layout(margin_t=8)
    figure.update_xaxes(title=objective_label(frame))
    medians = {study: done["score"].median() for study, done in groups if len(done)}
    parts = [f"{study}: median {median:.4f}" for study, median in medians.items()]
    return with_caption(figure, f"{'; '.join(parts) or _none_finished(frame)}.")
