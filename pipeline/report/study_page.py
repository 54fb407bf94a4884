"""A study as one page: its answer, and everything that it rests on; templates/study.html has its order and its words."""

import base64
import io
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from PIL import Image

from pipeline.errors import UserError, escape_control
from pipeline.registry.decision import FinalsDecision, find_winner
from pipeline.report import figures
from pipeline.report.analysis import Lead, effects, finals, importances, lead
from pipeline.report.render import render
from pipeline.report.trials import (
    Predictions,
    aliases,
    best_trials,
    challenger,
    changes,
    control,
    early,
    feasible,
    finished,
    histories,
    predictions,
    ranked,
    searched,
)
from pipeline.search.importances import num_top
from pipeline.tracking import queries
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.run_data import LocatedData, RunData, find_data
from pipeline.tracking.tracker import MlflowTracker

_Find = Callable[[RunData], LocatedData]  # `run_data.find_data`, with where to look

MOST_BEST = 10  # trials that are listed
MOST_UNFINISHED = 40
MOST_IMAGES = 12  # of each kind of disagreement
MOST_REASONS = 5
MOST_AXES = 8  # of the parallel coordinates
_TAGS = {"commit": "mlflow.source.git.commit", "torch": "torch", "hardware": "hardware"}
_TAGS |= {"data": "data_digest", "split": "split_digest"}


@dataclass(frozen=True, eq=False)
class Comparison:
    """A study's best trial, or its runner-up, and its control; with the predictions of both, None where they are gone."""

    best: pd.Series
    label: str  # best or runner-up
    control: pd.Series | None
    best_predictions: Predictions | None
    control_predictions: Predictions | None
    lead: Lead | None

    @property
    def has_control(self) -> bool:
        """Whether there is a control, and another trial than it to compare with it."""
        return self.control is not None and self.control["run_id"] != self.best["run_id"]


def study_page(
    tracker: MlflowTracker,
    study: StudyRuns,
    frame: pd.DataFrame,
    data_dir: Path,
    links: Mapping[str, str],
    dataset: str | None = None,
    word: Callable[[str], str] = str,
) -> str:
    """The HTML of one study, from `trials.table`; images come from where its data set lies, see `run_data.find_data`,
    and are never downloaded. `word` as `render` takes it.
    """
    comparison = compare_with_control(tracker, frame)
    decision, verdict = finals_verdict(tracker, study)
    trials = frame[frame["role"] == "trial"]
    drawn = {"history": figures.history(frame)}
    data: dict[str, Any] = {
        "title": study.name,
        "question": tracker.client.get_run(study.parent).data.tags.get("mlflow.note.content", ""),
        "verdict": verdict,
        "champions": champions(tracker, frame),
        "links": links,
        "states": trials["state"].value_counts().to_dict(),
        "num_infeasible": int((trials["infeasible"] != "").sum()),
        "no_answer": "" if comparison else queries.no_best_run(tracker, study).problems[0].rule,
        "objective": study.objective,
        "seconds": trials["seconds"].sum(),
        "decision": decision and _decision(frame, decision),
        "repeats": _repeats(frame),
        "best_trials": best_trials(frame, MOST_BEST),
        "comparison": comparison,
        "unfinished": _unfinished(frame),
        "provenance": _provenance(tracker, comparison),
        "written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    }
    if comparison:
        data |= _results(tracker, frame, comparison, drawn)
        find = partial(find_data, data_dir=data_dir, dataset=dataset, download=False)
        data |= _disagreement(tracker, comparison, find, drawn)
    return render("study.html", drawn, word, **data)


def _results(
    tracker: MlflowTracker, frame: pd.DataFrame, comparison: Comparison, drawn: dict[str, go.Figure]
) -> dict[str, Any]:
    """What needs at least one feasible trial, but for the disagreement; its figures go to `drawn`."""
    done, shares, order = feasible(frame), importances(frame), ranked(frame)
    if len(shares):
        drawn["importance"] = figures.importance(shares)
        drawn["parallel"] = figures.parallel(frame, list(shares["parameter"][:MOST_AXES]))
    compared = [comparison.best, *([] if comparison.control is None else [comparison.control])]
    pruned = frame[frame["state"] == "pruned"]["run_id"].tail(figures.LINES)
    run_ids = list(dict.fromkeys([*(run["run_id"] for run in compared), *pruned]))
    curves = histories(tracker, run_ids, str(comparison.best["objective"]))
    drawn["learning_curves"] = figures.learning_curves(frame, curves)
    drawn["per_class"] = figures.per_class(frame)
    known = {f"the {comparison.label}": comparison.best_predictions}
    known |= {"the control": comparison.control_predictions} if comparison.has_control else {}
    if stored := {label: run for label, run in known.items() if run is not None}:
        drawn["calibration"] = figures.calibration(stored)
    sized = "model/parameters" in done and done["model/parameters"].nunique() > 1
    costs = {f"cost{place}": measure for place, measure in enumerate(figures.COSTS if sized else ["time/training_s"])}
    drawn |= {name: figures.cost(frame, measure) for name, measure in costs.items()}
    return {
        "num_ranked": len(order),
        "num_finished": len(done),
        "num_equal": int((done["score"] == done["score"].max()).sum()) - 1,
        "num_top": num_top(len(order)),
        "costs": list(costs),
        **_effects(tracker, frame, drawn),
    }


def compare_with_control(tracker: MlflowTracker, frame: pd.DataFrame, runner_up: bool = True) -> Comparison | None:
    """A study's best trial and its control; the best is its `runner_up` where the control is it. None: none feasible."""
    chosen, base = challenger(frame), control(frame)
    if chosen is None:
        return None
    best, label = chosen if runner_up else (feasible(frame).iloc[0], "best")
    is_control = base is not None and base["run_id"] == best["run_id"]
    one = predictions(tracker, best["run_id"])
    two = one if is_control else predictions(tracker, base["run_id"]) if base is not None else None
    others = len(ranked(frame)) - 1  # pruned ones were candidates too
    gap = lead(one, two, best["objective"], others) if one and two and not is_control else None
    return Comparison(best, label, base, one, two, gap)


def finals_verdict(tracker: MlflowTracker, study: StudyRuns) -> tuple[FinalsDecision | None, str]:
    """What a study's finals decided, and that in a line: a winner or a tie; no decision where it no longer holds."""
    try:
        decision, chosen = FinalsDecision.load(tracker, study), find_winner(tracker, study)
    except UserError as error:
        return None, f"{escape_control(error.lines[0])}."
    if chosen:
        return decision, f"Finals: the winner is {chosen.summary}."
    return decision, "Finals: no winner, every recipe diverged or was infeasible with some seed." if decision else ""


def champions(tracker: MlflowTracker, frame: pd.DataFrame) -> list[str]:
    """A line for each run of these that the registry has under an alias."""
    known = aliases(tracker)
    return [
        f"{known[row['run_id']]} is a run of this study: "
        f"{'final of ' if row['role'] == 'final' else ''}trial {row['trial']}, {row['run_id']}."
        for _, row in frame[frame["run_id"].isin(list(known))].iterrows()
    ]


# ----------------------------------------------------------------------------------------------------------- sections


def _repeats(frame: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """The rows of `analysis.finals`, each with its trial's number and what it changes in the control."""
    base, runs = control(frame), frame.set_index("run_id", drop=False)
    names = [name for name in searched(frame) if name != "training.seed"]
    return [
        row.to_dict()
        | {"trial": runs["trial"][row["run_id"]], "changes": changes(runs.loc[row["run_id"]], base, names)}
        for _, row in finals(frame).iterrows()
    ]


def _decision(frame: pd.DataFrame, decision: FinalsDecision) -> dict[str, Any]:
    """What finals measured and decided: the rules, and the candidates, best mean first."""
    base, names, chosen, rows = control(frame), searched(frame), decision.winner, []
    for row in decision.ranked:
        tied = "ties with the winner" if chosen and row.trial in chosen.tied else "behind"
        verdict = "winner" if chosen and row.digest == chosen.digest else row.stopped or tied
        trial = frame[frame["run_id"] == row.trial_run]
        recipe = row.name + "".join(f": {changes(run, base, names)}" for _, run in trial.iterrows())
        rows.append({"result": row, "verdict": verdict, "recipe": recipe})
    return {"candidates": rows, "rules": decision.rules}


def _effects(tracker: MlflowTracker, frame: pd.DataFrame, drawn: dict[str, go.Figure]) -> dict[str, Any]:
    """What each choice adds: to the score, or where most were pruned to the score after `early_epoch`."""
    trained = frame[frame["epochs"] > 0]  # an infeasible trial may have been refused before
    num_pruned, epoch, measure = int((trained["state"] == "pruned").sum()), None, "the score"
    if num_pruned > len(finished(frame)):  # the few that finished were selected by what is to be explained
        epoch, frame = early(tracker, frame)
        measure = f"{frame['objective'].iloc[0]} after epoch {epoch}"
    found = effects(frame)
    if found:
        drawn["effects"] = figures.effect(found, measure)
    return {
        "effects": found,
        "choices": found.table.to_dict("records") if found else [],
        "early_epoch": epoch,
        "effects_measure": measure,
        "num_measured": len(finished(frame)),
        "num_pruned": num_pruned,
    }


def _disagreement(
    tracker: MlflowTracker, comparison: Comparison, find: _Find, drawn: dict[str, go.Figure]
) -> dict[str, Any]:
    """How many images both, one or none have right, and those that only one has; {} where they can't be compared."""
    best, base = comparison.best_predictions, comparison.control_predictions
    if not comparison.has_control or best is None or base is None or comparison.lead is None:
        return {"right": {}}
    drawn["confusion"] = figures.confusion_difference(best, base)
    best_right, base_right = best.answers == best.labels, base.answers == base.labels
    images = _images(tracker, comparison.best, best, find)
    groups = {f"Right by the {comparison.label} alone": best_right & ~base_right}
    groups["Right by the control alone"] = base_right & ~best_right
    confidence = np.maximum(best.probabilities.max(1), base.probabilities.max(1))
    runs, shown = {comparison.label: best, "control": base}, {}
    for title, chosen in groups.items():
        places = np.flatnonzero(chosen)
        surest = places[np.argsort(-confidence[places], kind="stable")][:MOST_IMAGES]
        if len(places):
            pictures = list(_pictures(surest, runs, None if isinstance(images, str) else images))
            shown[title] = {"count": len(places), "pictures": pictures}
    both, either = int((best_right & base_right).sum()), int((best_right | base_right).sum())
    return {
        "right": {"images": len(best_right), "both": both, "neither": len(best_right) - either},
        "images_missing": images if isinstance(images, str) else "",
        "disagreements": shown,
    }


def _images(tracker: MlflowTracker, run: pd.Series, stored: Predictions, find: _Find) -> np.ndarray | str:
    """uint8 (N, S, S, 3) of a run's validation images, in the order of its predictions; or why there are none."""
    run_id = str(run["run_id"])
    try:
        digest = tracker.client.get_run(run_id).data.tags["data_digest"]
        names = (str(run["data.dataset"]), int(run["data.image_size"]))
        data = find(RunData(f"run {run_id}", *names, digest, queries.data_places(tracker, run_id))).images
    except (UserError, KeyError, ValueError) as error:
        reason = error.lines[0] if isinstance(error, UserError) else "the run does not say which"
        return f"The images can't be shown, only their numbers in the training part: {reason}."
    return data.train.images[stored.ids].permute(0, 2, 3, 1).numpy()


def _pictures(
    places: np.ndarray, runs: Mapping[str, Predictions], images: np.ndarray | None
) -> Iterator[dict[str, Any]]:
    """The image at each place as a data URL, None without images, and the lines below it."""
    for place in places:
        first = next(iter(runs.values()))
        lines = [f"{first.classes[first.labels[place]]} (no. {first.ids[place]})"]
        for label, run in runs.items():
            lines.append(f"{label}: {run.classes[run.answers[place]]} {run.probabilities[place].max():.0%}")
        yield {"source": None if images is None else _png(images[place]), "lines": lines}


def _png(image: np.ndarray) -> str:
    out = io.BytesIO()
    picture = Image.fromarray(image)
    picture.thumbnail((96, 96))
    picture.save(out, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _unfinished(frame: pd.DataFrame) -> dict[str, Any]:
    """The pruned, failed and interrupted trials, by state, and why they ended; {} where there are none."""
    trials = frame[frame["role"] == "trial"]
    rows = trials[~trials["state"].isin(["finished", "running"])].sort_values(["state", "trial"], kind="stable")
    if rows.empty:
        return {}
    base, names = control(frame), searched(frame)
    rows = rows.assign(
        reason=rows["reason"].replace("", "no reason given"),
        value=rows.apply(lambda row: row.get(row["objective"], np.nan), axis=1),
        changes=rows.apply(changes, axis=1, args=(base, names)),
    )
    reasons = rows["reason"].value_counts()
    return {
        "trials": rows.head(MOST_UNFINISHED).to_dict("records"),
        "states": rows["state"].value_counts().to_dict(),
        "time_share": rows["seconds"].sum() / frame["seconds"].sum() if frame["seconds"].sum() else None,
        "reasons": reasons.head(MOST_REASONS).to_dict(),
        "num_other_reasons": max(len(reasons) - MOST_REASONS, 0),
    }


def _provenance(tracker: MlflowTracker, comparison: Comparison | None) -> dict[str, str]:
    if comparison is None:
        return {}
    tags = tracker.client.get_run(comparison.best["run_id"]).data.tags
    return {name: tags[tag][:60] for name, tag in _TAGS.items() if tags.get(tag)}
