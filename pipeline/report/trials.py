"""The runs of studies as a table: one function for notebooks, and what everything else here reads from it."""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.errors import UserError
from pipeline.recipe import KIND
from pipeline.tracking import queries
from pipeline.tracking.intact import control_runs
from pipeline.tracking.queries import StudyRuns, find_study
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker

log = logging.getLogger(__name__)

COLUMNS = (
    *("study", "trial", "run_id", "role", "state", "reason", "infeasible", "control", "objective", "score"),
    *("started", "seconds", "epochs"),
)
F1 = "val/f1/"


def trials(*names: str, home: Path | str = "mlruns", uri: str | None = None) -> pd.DataFrame:
    """One row per run of the named studies, or of all in the store; `attention` means the last run of attention's.

    Columns: study, trial (number), run_id, role (`trial`, `final` for a repeat with another seed, or another), state
    (finished, pruned, failed, interrupted, running), reason, infeasible (which constraints of its study it breaks; empty
    for a feasible one), control (the base recipe's trial), objective (a metric's name), score (the objective of a finished
    run, else NaN), started (UTC), seconds (of the whole run), epochs (trained); then every recipe field by its dotted name
    (`optimizer.lr`; NaN where its kind has none) and every metric's last value (`val/f1_macro`). `home` is the folder
    mlruns, `uri` another MLflow database or server.
    Raises UserError where there is no such store or study.
    """
    home = Path(home)
    if uri is None and not (home / "mlflow.db").exists():
        raise UserError(f"no runs yet in {home}", remedy="`study NAME --dataset digits` makes some")
    tracker = MlflowTracker(home, uri)
    return table(tracker, choose(tracker, names) if names else queries.studies(tracker))


def choose(tracker: MlflowTracker, names: Sequence[str]) -> list[StudyRuns]:
    """The study that each name means, each once; which of several is meant is logged. UserError where there is none."""
    found: dict[str, StudyRuns] = {}
    for name in names:
        study, line = find_study(tracker, name)
        found[study.parent] = study
        if line:
            log.warning(line)
    return list(found.values())


def table(tracker: MlflowTracker, studies: Sequence[StudyRuns]) -> pd.DataFrame:
    """See `trials`."""
    return table_of([row for study in studies for row in _rows(queries.children(tracker, study), study)])


def table_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """See `trials`; a row may lack what was not measured."""
    frame = pd.DataFrame(rows, columns=None if rows else list(COLUMNS))
    frame = frame.reindex(columns=[*COLUMNS, *(name for name in frame.columns if name not in COLUMNS)])
    frame["infeasible"] = frame["infeasible"].astype(object).fillna("")
    params = sorted(name for name in frame.columns if "." in name and "/" not in name)
    metrics = sorted(name for name in frame.columns if "/" in name)
    frame = frame[[*COLUMNS, *params, *metrics]]
    kinds: dict[str, Any] = {"trial": "Int64", "epochs": "Int64", "control": bool, "score": float, "seconds": float}
    return frame.astype(kinds).copy()  # in one piece, or pandas warns where a column is added


def _rows(runs: Sequence[Any], study: StudyRuns) -> list[dict[str, Any]]:
    """Of MLflow's runs; nothing of them is asked for again."""
    base = {run.info.run_id for run in control_runs([run for run in runs if run.data.tags["role"] == "trial"])}
    return [_row(run, study) | {"control": run.info.run_id in base} for run in runs]


def _row(run: Any, study: StudyRuns) -> dict[str, Any]:
    tags, info = run.data.tags, run.info
    state = tags.get("state", info.status.lower())
    trial = tags.get("trial", "")
    role = tags["role"]
    score = run.data.metrics.get(study.objective, np.nan) if state == State.FINISHED else np.nan
    return {
        "study": study.name,
        "trial": int(trial) if trial.isdecimal() else pd.NA,
        "run_id": info.run_id,
        "role": role,
        "state": state,
        "reason": tags.get("reason", ""),
        "infeasible": study.broken_by(run),
        "objective": study.objective,
        "score": score if abs(score) < 1e300 else np.nan,  # MLflow keeps infinity as 1.8e308
        "started": pd.Timestamp(info.start_time, unit="ms", tz="UTC"),
        "seconds": (info.end_time - info.start_time) / 1000 if info.end_time else np.nan,
        "epochs": max((m.step for m in run.data._metric_objs if m.key == study.objective), default=0),
        **{name: _value(name, text) for name, text in run.data.params.items()},
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


# ------------------------------------------------------------------------------------------- what the table says


def finished(frame: pd.DataFrame) -> pd.DataFrame:
    """The trials that have a score: the feasible ones best first, then the others."""
    found = frame[(frame["role"] == "trial") & frame["score"].notna()]
    order = found.assign(infeasible=found["infeasible"] != "")
    order = order.sort_values(["infeasible", "score", "trial"], ascending=[True, False, True], kind="stable")
    return found.loc[order.index]


def feasible(frame: pd.DataFrame) -> pd.DataFrame:
    """Those of the trials with a score that may win, best first."""
    found = finished(frame)
    return found[found["infeasible"] == ""]


def ranked(frame: pd.DataFrame) -> pd.DataFrame:
    """One study's finished and pruned feasible trials, best first, as Optuna's sampler ranks them; with a column `rank`.

    Finished ones by their score, then pruned ones by the epochs that they reached, then by their last value. Most of a
    study's trials are pruned: what marks the good ones can't be seen without the others.
    """
    done, metric = feasible(frame), str(frame["objective"].iloc[0])
    pruned = frame[(frame["role"] == "trial") & (frame["state"] == "pruned") & (frame["infeasible"] == "")]
    pruned = pruned[pruned[metric].notna()] if metric in pruned else pruned[:0]
    if len(pruned):
        pruned = pruned.sort_values(["epochs", metric, "trial"], ascending=[False, False, True], kind="stable")
    rows = frame.loc[[*done.index, *pruned.index]]
    missed = rows["score"].isna()
    keys = pd.DataFrame({"epochs": rows["epochs"].where(missed, 0), "score": rows["score"]})
    keys["score"] = rows["score"].fillna(rows[metric]) if missed.any() else rows["score"]
    return rows.assign(rank=(keys != keys.shift()).any(axis=1).cumsum())


def early(tracker: MlflowTracker, frame: pd.DataFrame) -> tuple[int, pd.DataFrame]:
    """The epoch at which pruning began in one study, and its table with the value after that epoch as the score.

    Every trial that reached it has one, whatever became of it, so pruning leaves nothing out.
    """
    trials, metric = frame[frame["role"] == "trial"], str(frame["objective"].iloc[0])
    epoch = int(trials["epochs"][(trials["state"] == "pruned") & (trials["epochs"] > 0)].min())
    found = histories(tracker, list(trials["run_id"][trials["epochs"] > epoch]), metric)
    later = found[found["epoch"] == epoch].set_index("run_id")["value"]
    score = trials["run_id"].map(later).fillna(trials[metric].where(trials["epochs"] == epoch))
    return epoch, trials.assign(score=score.where(score.abs() < 1e300))


def control(frame: pd.DataFrame) -> pd.Series | None:
    """The finished trial of the base recipe: what the others are compared with."""
    found = finished(frame)
    found = found[found["control"]]
    return None if found.empty else found.iloc[0]


def challenger(frame: pd.DataFrame) -> tuple[pd.Series, str] | None:
    """What is set beside the control, and its name: the best trial, or the runner-up where the control is the best.

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
    rows = frame[frame["role"] == "trial"]
    return [name for name in param_names(frame) if rows[name].nunique() > 1]


def weakest_class(row: pd.Series) -> tuple[str, float]:
    """The class with the lowest F1, and it; ("", NaN) where the run has none."""
    f1 = row[[name for name in row.index if str(name).startswith(F1)]].astype(float).dropna()
    return (str(f1.idxmin()).removeprefix(F1), float(f1.min())) if len(f1) else ("", float("nan"))


@dataclass(frozen=True)
class BestTrial:
    """A finished trial as the tables of the best show it; NaN where something was not measured."""

    number: int
    is_control: bool
    infeasible: str  # the constraints that it breaks
    score: float
    lead: float  # over the control's score, in points; NaN where no control finished
    f1_macro: float
    weakest_class: str
    weakest_f1: float
    epochs: int
    seconds: float  # of the whole trial
    training_s: float
    parameters: float
    latency_ms: float
    changes: str  # against the control

    @property
    def name(self) -> str:
        """`3`, `0 (control, infeasible)`."""
        marks = ["control"] * self.is_control + ["infeasible"] * bool(self.infeasible)
        return f"{self.number}" + (f" ({', '.join(marks)})" if marks else "")


def best_trials(frame: pd.DataFrame, most: int) -> list[BestTrial]:
    """At most so many finished trials of one study, feasible ones first and the best of them; below them the control."""
    base, names = control(frame), searched(frame)
    return [_best_trial(row, base, names) for _, row in with_control(finished(frame).head(most), base).iterrows()]


def with_control(rows: pd.DataFrame, base: pd.Series | None) -> pd.DataFrame:
    """These rows, and the control's below them where it isn't among them."""
    if base is None or base["run_id"] in set(rows["run_id"]):
        return rows
    return pd.concat([rows, base.to_frame().T])


def _best_trial(row: pd.Series, base: pd.Series | None, names: Sequence[str]) -> BestTrial:
    weakest, f1 = weakest_class(row)
    return BestTrial(
        number=row["trial"],
        is_control=row["control"],
        infeasible=row["infeasible"],
        score=row["score"],
        lead=np.nan if base is None else 100 * (row["score"] - base["score"]),
        f1_macro=row.get("val/f1_macro", np.nan),
        weakest_class=weakest,
        weakest_f1=f1,
        epochs=row["epochs"],
        seconds=row["seconds"],
        training_s=row.get("time/training_s", np.nan),
        parameters=row.get("model/parameters", np.nan),
        latency_ms=row.get("model/latency_ms", np.nan),
        changes=changes(row, base, names),
    )


def changes(row: pd.Series, base: pd.Series | None, names: Sequence[str]) -> str:
    """What a run has of these fields and the control has not: `rotation 10, optimizer adam, lr 0.003`."""
    if base is None:
        listed = ", ".join(f"{short(name)} {show(row[name])}" for name in names if pd.notna(row[name]))
        return listed or "no field differs between the trials"
    if row["run_id"] == base["run_id"]:
        return "the control, the base recipe"
    changed = [name for name in names if pd.notna(row[name]) and row[name] != base[name]]
    return ", ".join(f"{short(name)} {show(row[name])}" for name in changed) or "as the control"


def short(name: str) -> str:
    """A field without its section; a kind is called by its section: `optimizer.name` -> `optimizer`."""
    section, _, field = name.partition(".")
    return section if KIND.get(section) == field else field.replace("_", " ")


def show(value: Any) -> str:
    """A value in three digits; yes and no for flags."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, (int, float, np.number)) else str(value)


# ----------------------------------------------------------------------------- what only some runs are asked for


def aliases(tracker: MlflowTracker) -> dict[str, str]:
    """run id -> what the registry calls it: `image-classifier@champion`."""
    client, found = tracker.client, dict[str, list[str]]()
    for model in client.search_registered_models():
        for alias, version in model.aliases.items():
            run_id = client.get_model_version(model.name, version).run_id
            found.setdefault(str(run_id), []).append(f"{model.name}@{alias}")
    return {run_id: " and ".join(sorted(names)) for run_id, names in found.items()}


@dataclass(frozen=True, eq=False)
class Predictions:
    """A run's answers on the validation split."""

    ids: np.ndarray  # (N,) int64, places in the data set's training part
    labels: np.ndarray  # (N,) int
    probabilities: np.ndarray  # (N, C) float
    classes: tuple[str, ...]

    @property
    def answers(self) -> np.ndarray:
        """(N,) the likeliest class."""
        return self.probabilities.argmax(axis=1)


def predictions(tracker: MlflowTracker, run_id: str) -> Predictions | None:
    """What a finished run stored; None where its file is gone or can't be read."""
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        try:
            found = pq.read_table(tracker.client.download_artifacts(run_id, "predictions.parquet", folder))
            return Predictions(
                found["id"].to_numpy().copy(),  # torch wants to be able to write
                found["label"].to_numpy(),
                np.stack(found["probabilities"].to_numpy()),
                tuple(json.loads(found.schema.metadata[b"classes"])),
            )
        except Exception as error:  # whatever the store or the file's format raises: the page does without
            log.warning("run %s: its predictions can't be read (%s)", run_id, str(error).splitlines()[0][:120])
            return None


def histories(tracker: MlflowTracker, run_ids: Sequence[str], metric: str) -> pd.DataFrame:
    """Columns run_id, epoch (from 1), value: a metric's whole history for some runs, in their order."""
    points = [
        {"run_id": run_id, "epoch": point.step, "value": point.value}
        for run_id in run_ids
        for point in tracker.client.get_metric_history(run_id, metric)
    ]
    found = pd.DataFrame(points, columns=["run_id", "epoch", "value"])
    return found.sort_values("epoch", kind="stable").drop_duplicates(["run_id", "epoch"], keep="last")
