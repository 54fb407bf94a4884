"""The runs of studies as a table: one function for notebooks, and what everything else here reads from it."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.disk import is_new
from pipeline.errors import UserError
from pipeline.evaluation.scores import CLASS_F1
from pipeline.report.stored import histories
from pipeline.sections.model import TRAINING_ONLY
from pipeline.tracking import queries
from pipeline.tracking.intact import control_runs
from pipeline.tracking.queries import StudyRuns, find_study
from pipeline.tracking.tags import Role, RunTags, State, StoredRun
from pipeline.tracking.tracker import MlflowTracker

log = logging.getLogger(__name__)

COLUMNS = (
    *("study", "trial", "run_id", "role", "state", "reason", "infeasible", "control", "objective", "score"),
    *("started", "seconds", "epochs", "short", "full_of"),
)
LATENCY = "model/latency_ms"
INFINITE = 1e300  # MLflow stores infinity as 1.8e308


def trials(*names: str, home: Path | str = "mlruns", uri: str | None = None) -> pd.DataFrame:
    """One row per run of the named studies, or of all in the store; `attention` means the last run of attention's.

    Columns: study, trial (number), run_id, role (`trial`, `final` for a repeat with another seed, or another), state
    (finished, pruned, failed, interrupted, running), reason, infeasible (which constraints of its study it breaks; empty
    for a feasible one), control (the base recipe's trial), objective (a metric's name), score (the objective of a finished
    run, else NaN), started (UTC), seconds (of its epochs), epochs (trained), short (whether it is a short trial, which is
    pruned), full_of (the number of the short trial whose recipe it trains in full); then every recipe field by its dotted
    name (`optimizer.lr`; NaN where its kind has none; of a short trial `training.epochs` in full) and every metric's last
    value (`val/f1_macro`). `home` is the folder mlruns, `uri` another MLflow database or server.
    Raises UserError where there is no such store or study.
    """
    home = Path(home)
    if is_new(uri, home / "mlflow.db"):
        raise UserError(f"no runs yet in {uri or home}", remedy="`study NAME --dataset digits` makes some")
    tracker = MlflowTracker(home, uri)
    return table(tracker, choose(tracker, names) if names else queries.studies(tracker))


def choose(tracker: MlflowTracker, names: Sequence[str]) -> list[StudyRuns]:
    """The study that each name means, each once; which of several is meant is logged. UserError where there is none."""
    chosen: dict[str, StudyRuns] = {}
    for name in names:
        study, line = find_study(tracker, name)
        chosen[study.parent] = study
        if line:
            log.warning(line)
    return list(chosen.values())


def table(tracker: MlflowTracker, studies: Sequence[StudyRuns]) -> pd.DataFrame:
    """See `trials`."""
    return table_of([row for study in studies for row in _rows(tracker, study)])


def table_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """See `trials`; a row may lack what was not measured."""
    frame = pd.DataFrame(rows, columns=None if rows else list(COLUMNS))
    frame = frame.reindex(columns=[*COLUMNS, *(name for name in frame.columns if name not in COLUMNS)])
    frame["infeasible"] = frame["infeasible"].astype(object).fillna("")
    frame["short"] = frame["short"].astype(object).fillna(False)
    params = sorted(name for name in frame.columns if "." in name and "/" not in name)
    metrics = sorted(name for name in frame.columns if "/" in name)
    frame = frame[[*COLUMNS, *params, *metrics]]
    kinds: dict[str, Any] = {"trial": "Int64", "epochs": "Int64", "control": bool, "score": float, "seconds": float}
    kinds |= {"short": bool, "full_of": "Int64"}
    return frame.astype(kinds).copy()  # in one piece, or pandas warns where a column is added


def _rows(tracker: MlflowTracker, study: StudyRuns) -> list[dict[str, Any]]:
    runs = queries.children(tracker, study)
    # Between a run's start and its end it may have been stopped for hours.
    epochs_s = histories(tracker, [run.info.run_id for run in runs], "time/epoch_s").groupby("run_id")["value"].sum()
    controls = {run.info.run_id for run in control_runs([run for run in runs if RunTags.of(run).role == "trial"])}
    return [
        _row(run, study) | {"control": run.info.run_id in controls, "seconds": epochs_s.get(run.info.run_id, np.nan)}
        for run in runs
    ]


def _row(run: StoredRun, study: StudyRuns) -> dict[str, Any]:
    tags, info = RunTags.of(run), run.info
    score = run.data.metrics.get(study.objective, np.nan) if tags.state == State.FINISHED else np.nan
    return {
        "study": study.name,
        "trial": pd.NA if tags.trial is None else tags.trial,
        "run_id": info.run_id,
        "role": tags.role,
        "state": str(tags.state or info.status.lower()),
        "reason": tags.reason or "",
        "infeasible": study.broken_by(run),
        "objective": study.objective,
        "score": score if abs(score) < INFINITE else np.nan,
        "started": pd.Timestamp(info.start_time, unit="ms", tz="UTC"),
        "epochs": max((m.step for m in run.data._metric_objs if m.key == study.objective), default=0),
        "short": tags.short_of is not None,
        "full_of": pd.NA if tags.full_of is None else tags.full_of,
        **{name: _value(name, text) for name, text in run.data.params.items()},
        **({} if tags.short_of is None else {"training.epochs": tags.short_of}),
        **run.data.metrics,
    }


def _value(name: str, text: str) -> Any:
    """A parameter as it was before MLflow made it a text; lists, and what names data, stay one."""
    if name == "data.dataset":
        return text
    if text in ("True", "False"):
        return text == "True"
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (int, float)) else text


# ----------------------------------------------------------------------------------------------- rows of the table


def trial_rows(frame: pd.DataFrame, state: State | None = None) -> pd.DataFrame:
    """The trials of this state, or all; without finals and reproductions."""
    rows = with_role(frame, "trial")
    return rows if state is None else rows[rows["state"] == state]


def ended(frame: pd.DataFrame) -> pd.DataFrame:
    """The trials that no longer run, whatever became of them."""
    rows = trial_rows(frame)
    return rows[rows["state"] != "running"]


def state_words(rows: pd.DataFrame) -> pd.Series:
    """Each run's state for a reader: a short trial was not pruned, and one that finished was trained at full length."""
    words = rows["state"].mask(rows["short"] & (rows["state"] == State.PRUNED), "short")
    return words.replace(str(State.FINISHED), "full")


def with_role(frame: pd.DataFrame, role: Role) -> pd.DataFrame:
    """The runs of this role."""
    return frame[frame["role"] == role]


def finished(frame: pd.DataFrame) -> pd.DataFrame:
    """The trials that have a score: the feasible ones best first, then the others."""
    rows = trial_rows(frame).dropna(subset="score")
    order = rows.assign(infeasible=rows["infeasible"] != "")
    order = order.sort_values(["infeasible", "score", "trial"], ascending=[True, False, True], kind="stable")
    return rows.loc[order.index]


def feasible(frame: pd.DataFrame) -> pd.DataFrame:
    """Those of the trials with a score that may win, best first."""
    rows = finished(frame)
    return rows[rows["infeasible"] == ""]


def infeasible(frame: pd.DataFrame) -> pd.DataFrame:
    """Those that may not, best first."""
    rows = finished(frame)
    return rows[rows["infeasible"] != ""]


def last_values(rows: pd.DataFrame) -> pd.Series:
    """The objective as each run measured it last; NaN where it did not."""
    return pd.Series([row.get(row["objective"], np.nan) for _, row in rows.iterrows()], rows.index, dtype=float)


def ranked(frame: pd.DataFrame) -> pd.DataFrame:
    """One study's finished and pruned trials, best first, with a column `rank`.

    By score; a short trial is credited with what those trained both ways gained on average, as the search does
    (`local_search.ranked`). Then those without a score: other pruned ones, and short ones where none was trained both ways,
    by the epochs that they reached and their last value. Most of a study's trials are pruned: what marks the good ones
    can't be seen without the others. A short trial is left out where its recipe finished in full.
    """
    done, metric = feasible(frame), str(frame["objective"].iloc[0])
    pruned = trial_rows(frame, State.PRUNED)
    pruned = pruned[(pruned["infeasible"] == "") & pruned[metric].notna()] if metric in pruned else pruned[:0]
    short = pruned[pruned["short"]]
    in_short = done["full_of"].map(short.set_index("trial")[metric]).astype(float) if len(short) else np.nan
    gain = (done["score"] - in_short).mean()
    left_out = pruned["short"] & pruned["trial"].isin(done["full_of"].dropna())
    rows = frame.loc[[*done.index, *pruned.index[~left_out]]]
    last = rows[metric] if metric in rows else rows["score"]
    score = rows["score"].fillna((last + gain).where(rows["short"].astype(bool)))
    keys = pd.DataFrame(
        {"epochs": rows["epochs"].astype(float).where(score.isna(), np.inf), "score": score.fillna(last)}
    )
    keys = keys.assign(trial=rows["trial"])
    keys = keys.sort_values(["epochs", "score", "trial"], ascending=[False, False, True], kind="stable").drop(
        columns="trial"
    )
    return rows.loc[keys.index].assign(rank=(keys != keys.shift()).any(axis=1).cumsum())


def early(tracker: MlflowTracker, frame: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """A score that the trials of one study share whatever became of them, in words, and its table with that as the score.

    That of the short trials that ran to their end, where there are short ones; else the value after the epoch at which
    pruning began, of every trial that reached it.
    """
    rows, metric = trial_rows(frame), str(frame["objective"].iloc[0])
    if rows["short"].any():
        ended = rows["short"] & (rows["state"] == State.PRUNED)
        return f"{metric} of the short trials", rows.assign(score=rows[metric].where(ended))
    pruned_after = trial_rows(frame, State.PRUNED)["epochs"]
    epoch = int(pruned_after[pruned_after > 0].min())
    curves = histories(tracker, list(rows["run_id"][rows["epochs"] > epoch]), metric)
    values = curves[curves["epoch"] == epoch].set_index("run_id")["value"]
    score = rows["run_id"].map(values).fillna(rows[metric].where(rows["epochs"] == epoch))
    return f"{metric} after epoch {epoch}", rows.assign(score=score.where(score.abs() < INFINITE))


def control(frame: pd.DataFrame) -> pd.Series | None:
    """The finished trial of the base recipe: what the others are compared with."""
    done = finished(frame)
    controls = done[done["control"]]
    return None if controls.empty else controls.iloc[0]


def challenger(frame: pd.DataFrame) -> tuple[pd.Series, str] | None:
    """What is compared with the control, and its name: the best trial, or the runner-up where the control is the best.

    None where no trial is feasible.
    """
    done = feasible(frame)
    if done.empty:
        return None
    others = done[~done["control"]]
    if len(others) and done.iloc[0]["control"]:
        return others.iloc[0], "runner-up"
    return done.iloc[0], "best"


def param_names(frame: pd.DataFrame) -> list[str]:
    """The recipe fields among the columns, without where the data lies: moved, it is the same."""
    return [name for name in frame.columns if "." in name and "/" not in name and name != "data.dataset"]


def searched(frame: pd.DataFrame) -> list[str]:
    """The recipe fields that differ between trials."""
    rows = trial_rows(frame)
    return [name for name in param_names(frame) if rows[name].nunique() > 1]


def networks(frame: pd.DataFrame) -> pd.Series:
    """A number of each run's network; equal where one prediction costs the same: layers, image size and precision are."""
    model = {name for name in param_names(frame) if name.startswith("model.")}
    model -= {f"model.{name}" for name in TRAINING_ONLY}
    names = [name for name in param_names(frame) if name in model | {"data.image_size", "training.precision"}]
    return frame.groupby(names, dropna=False).ngroup() if names else pd.Series(0, frame.index)


def latency(frame: pd.DataFrame) -> pd.Series:
    """Each run's latency in ms: the shortest that was measured of its network, as other work on the machine adds to it.

    NaN where all have the same network, and so the same latency.
    """
    numbers = networks(frame)
    if LATENCY not in frame or numbers.nunique() < 2:
        return pd.Series(np.nan, frame.index)
    return frame[LATENCY].groupby(numbers).transform("min")


def class_f1(row: pd.Series) -> pd.Series:
    """A run's F1 by class, by metric; empty where it has none."""
    return row[[name for name in row.index if str(name).startswith(CLASS_F1)]].astype(float).dropna()


def weakest_class(row: pd.Series) -> tuple[str, float]:
    """The class with the lowest F1, and it; ("", NaN) where the run has none."""
    f1 = class_f1(row)
    return (str(f1.idxmin()).removeprefix(CLASS_F1), float(f1.min())) if len(f1) else ("", float("nan"))


def with_control(rows: pd.DataFrame, base: pd.Series | None) -> pd.DataFrame:
    """The rows, and the control's below them where it isn't among them."""
    if base is None or base["run_id"] in set(rows["run_id"]):
        return rows
    # Without its own types, all columns become objects, with booleans of numpy in them.
    return pd.concat([rows, base.to_frame().T.infer_objects()])
