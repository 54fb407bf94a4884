"""A study as one page: its answer, and everything that it rests on; templates/study.html has its order and its words."""

import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pipeline.errors import UserError, escape_control
from pipeline.evaluation.calibration import reweighting_line
from pipeline.evaluation.robustness import PREFIX
from pipeline.recipe import value_label
from pipeline.registry.card import settings
from pipeline.registry.decision import FinalsDecision, find_winner
from pipeline.registry.finals import recipe_of
from pipeline.registry.robustness import stored as stored_robustness
from pipeline.report.analysis import MIN_TRIALS_OF_LEVEL, effects, finals, importances
from pipeline.report.best_trials import best_trials, changes
from pipeline.report.control_comparison import Comparison, compare_with_control
from pipeline.report.disagreement import FindData, disagreement
from pipeline.report.figures import classes, parameters, scores
from pipeline.report.figures.robustness import robustness
from pipeline.report.render import render
from pipeline.report.stored import aliases, histories
from pipeline.report.trials import (
    control,
    early,
    ended,
    feasible,
    finished,
    last_values,
    ranked,
    searched,
    state_words,
    trial_rows,
)
from pipeline.search.importances import num_top
from pipeline.tracking import queries
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.run_data import find_data
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker

log = logging.getLogger(__name__)

Section = tuple[dict[str, Any], dict[str, go.Figure]]  # what the template knows by name, and the figures

MAX_BEST = 10  # trials that are listed
MAX_UNFINISHED = 40
MAX_REASONS = 5
MAX_PRUNED_BY_CLASS = 20  # curves, the last ones: each costs a request for each class
MAX_PARALLEL_AXES = 8


def study_page(
    tracker: MlflowTracker,
    study: StudyRuns,
    frame: pd.DataFrame,
    data_dir: Path,
    links: Mapping[str, str],
    dataset: str | None = None,
    word: Callable[[str], str] = str,
    next_steps: Mapping[str, str] = {},
) -> str:
    """The HTML of one study, from `trials.table`; images come from where its data set lies, see `run_data.find_data`,
    and are never downloaded. `word` as `render` takes it; `next_steps`: what to do next -> the command.
    """
    comparison = compare_with_control(tracker, frame)
    decision, verdict = finals_verdict(tracker, study)
    trials = trial_rows(frame)
    values: dict[str, Any] = {
        "title": study.name,
        "question": RunTags.of(tracker.client.get_run(study.parent)).note or "",
        "setting": _setting(tracker, frame),
        "recipe": _control_recipe(tracker, frame),
        "verdict": verdict,
        "champions": champions(tracker, frame),
        "links": links,
        "next_steps": next_steps,
        "planned": study.planned_trials if study.is_open else None,
        "states": state_words(trials).value_counts().to_dict(),
        "num_ended": len(ended(frame)),
        "num_infeasible": int((trials["infeasible"] != "").sum()),
        "no_answer": "" if comparison else queries.no_best_run(tracker, study).problems[0].rule,
        "objective": study.objective,
        "seconds": trials["seconds"].sum(),
        "decision": decision and _decision(frame, decision),
        "repeats": _repeats(frame),
        "best_trials": best_trials(frame, MAX_BEST),
        "comparison": comparison,
        "best_short": _best_short(frame),
        "unfinished": _unfinished(frame),
        "provenance": _provenance(tracker, frame, comparison, decision) if comparison else [],
        "written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    }
    figures = {"history": scores.history(frame)}
    if comparison:
        find = partial(find_data, data_dir=data_dir, dataset=dataset, download=False)
        for more_values, more_figures in (
            _parameters(tracker, frame),
            _results(tracker, frame, comparison),
            _robustness(tracker, frame, comparison, decision),
            _disagreement(tracker, comparison, find),
        ):
            values |= more_values
            figures |= more_figures
    return render("study.html", figures, word, **values)


def finals_verdict(tracker: MlflowTracker, study: StudyRuns) -> tuple[FinalsDecision | None, str]:
    """What a study's finals decided, and that in a line: a winner or a tie; no decision where it no longer holds."""
    try:
        decision, winner = FinalsDecision.load(tracker, study), find_winner(tracker, study)
    except UserError as error:
        return None, f"{escape_control(error.lines[0])}."
    if winner:
        return decision, f"Finals: the winner is {winner.summary}."
    return decision, "Finals: no winner, every recipe diverged or was infeasible with some seed." if decision else ""


def champions(tracker: MlflowTracker, frame: pd.DataFrame) -> list[str]:
    """A line for each run of the table that the registry has under an alias."""
    names = aliases(tracker)
    return [
        f"{' and '.join(names[row['run_id']])} is a run of this study: {_described(row)}, {row['run_id']}."
        for _, row in frame[frame["run_id"].isin(list(names))].iterrows()
    ]


def _described(run: pd.Series) -> str:
    """`trial 3`, `final of trial 3`, or what else it is, as an ensemble."""
    if pd.isna(run["trial"]):
        return str(run["role"])
    return f"{'final of ' if run['role'] == 'final' else ''}trial {run['trial']}"


# ----------------------------------------------------------------------------------------------------------- sections


def _repeats(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """What finals measured of each recipe, with its trial's number and what it changes in the control."""
    base, runs = control(frame), {row["run_id"]: row for _, row in frame.iterrows()}
    names = [name for name in searched(frame) if name != "training.seed"]
    rows = [(repeats, runs[repeats.run_id]) for repeats in finals(frame)]
    return [{"repeats": repeats, "trial": run["trial"], "changes": changes(run, base, names)} for repeats, run in rows]


def _decision(frame: pd.DataFrame, decision: FinalsDecision) -> dict[str, Any]:
    """What finals measured and decided: the rules, and the candidates, best mean first."""
    base, names, winner, candidates = control(frame), searched(frame), decision.winner, []
    for result in decision.ranked:
        tied = "ties with the winner" if winner and result.trial in winner.tied else "behind"
        verdict = "winner" if winner and result.digest == winner.digest else result.stopped or tied
        trial = frame[frame["run_id"] == result.trial_run]
        recipe = result.name + "".join(f": {changes(run, base, names)}" for _, run in trial.iterrows())
        candidates.append({"result": result, "verdict": verdict, "recipe": recipe})
    return {"candidates": candidates, "rules": decision.rules, "folds": decision.folds}


def _parameters(tracker: MlflowTracker, frame: pd.DataFrame) -> Section:
    """Which parameters matter, and what each choice adds: to the score, or where most were pruned to an early one."""
    figures, shares, rank = {}, importances(frame), ranked(frame)
    if len(shares):
        figures["importance"] = parameters.importance(shares)
        figures["parallel"] = parameters.parallel(frame, list(shares["parameter"][:MAX_PARALLEL_AXES]))
    # An infeasible trial may have been refused before its first epoch.
    num_pruned, num_finished = int((trial_rows(frame, State.PRUNED)["epochs"] > 0).sum()), len(finished(frame))
    base, is_early, measure = control(frame), num_pruned > num_finished, "the score"
    if is_early:  # the few that finished were selected by what is to be explained
        measure, frame = early(tracker, frame)
    estimated = effects(frame, base)
    if estimated:
        figures["effects"] = parameters.effect(estimated, measure)
    return {
        "num_ranked": len(rank),
        "num_top": num_top(len(rank)),
        "effects": estimated,
        "choices": estimated.table.to_dict("records") if estimated else [],
        "min_trials_of_level": MIN_TRIALS_OF_LEVEL,
        "is_early": is_early,
        "effects_measure": measure,
        "num_measured": len(finished(frame)),
        "num_pruned": num_pruned,
    }, figures


def _results(tracker: MlflowTracker, frame: pd.DataFrame, comparison: Comparison) -> Section:
    """Learning curves, classes, calibration and cost."""
    done = feasible(frame)
    pruned = trial_rows(frame, State.PRUNED)["run_id"].tail(scores.MAX_PRUNED_CURVES)
    run_ids = list(dict.fromkeys([*comparison.run_ids, *pruned]))
    curves = histories(tracker, run_ids, str(comparison.best["objective"]))
    figures = {"learning_curves": scores.learning_curves(frame, curves), "per_class": classes.per_class(frame)}
    figures |= _class_curves(tracker, frame, comparison)
    reweighted = []
    if comparison.stored_predictions:
        figures["calibration"] = classes.calibration(comparison.stored_predictions)
        for name, run in comparison.stored_predictions.items():
            row = comparison.control if name == "the control" else comparison.best
            if row is not None and (line := reweighting_line(row.to_dict(), run.probabilities, run.labels)):
                reweighted.append(f"{name.capitalize()}: {line}.")
    costs = {f"cost{n}": measure for n, measure in enumerate(scores.costs(frame))}
    figures |= {name: scores.cost(frame, measure) for name, measure in costs.items()}
    num_equal = int((done["score"] == done["score"].max()).sum()) - 1
    return {"num_finished": len(done), "num_equal": num_equal, "costs": list(costs), "reweighted": reweighted}, figures


def _class_curves(tracker: MlflowTracker, frame: pd.DataFrame, comparison: Comparison) -> dict[str, go.Figure]:
    """F1 by class and epoch; none where the best trial has it of its last epoch alone."""
    best = comparison.best
    pruned = trial_rows(frame, State.PRUNED)["run_id"].tail(MAX_PRUNED_BY_CLASS)
    run_ids = [*comparison.run_ids, *pruned]
    curves = {metric: histories(tracker, run_ids, metric) for metric in classes.weakest_metrics(best)}
    is_complete = [(curve["run_id"] == best["run_id"]).sum() == best["epochs"] for curve in curves.values()]
    return {"class_curves": classes.curves(frame, best, curves)} if curves and all(is_complete) else {}


def _robustness(
    tracker: MlflowTracker, frame: pd.DataFrame, comparison: Comparison, decision: FinalsDecision | None
) -> Section:
    """Of the finals' winner, the best trial or the control: the first of them that was measured."""
    means = frame.set_index("run_id").get(f"{PREFIX}mean", pd.Series(dtype=float)).dropna()
    shown = {decision.winner.run_id: "the winner"} if decision and decision.winner else {}
    shown.setdefault(str(comparison.best["run_id"]), f"the {comparison.label}")
    base = None if comparison.control is None else str(comparison.control["run_id"])
    names = shown | ({base: "the control"} if base and base not in shown else {})
    for run_id, name in names.items():
        try:
            found = stored_robustness(tracker, run_id) if run_id in means else None
        except UserError as error:
            log.warning(error.lines[0])
            continue
        if found:
            control_mean = means.get(base) if base != run_id else None
            return {}, {"robustness": robustness(found, name, control_mean)}
    return {}, {}


def _disagreement(tracker: MlflowTracker, comparison: Comparison, find: FindData) -> Section:
    best, base = comparison.best_predictions, comparison.control_predictions
    disagreeing = disagreement(tracker, comparison, find)
    figures = {"confusion": classes.confusion_difference(best, base)} if disagreeing and best and base else {}
    return {"disagreement": disagreeing}, figures


def _unfinished(frame: pd.DataFrame) -> dict[str, Any]:
    """The pruned, failed and interrupted trials, by state, and why they ended; {} where there are none."""
    trials = trial_rows(frame)
    rows = ended(frame)
    rows = rows[rows["state"] != State.FINISHED].sort_values(["state", "trial"], kind="stable")
    if rows.empty:
        return {}
    base, names = control(frame), searched(frame)
    rows = rows.assign(
        state=state_words(rows),
        reason=rows["reason"].replace("", "no reason given"),
        value=last_values(rows),
        changes=rows.apply(changes, axis=1, args=(base, names)),
    )
    reasons = rows["reason"].value_counts()
    return {
        "trials": rows.head(MAX_UNFINISHED).to_dict("records"),
        "states": rows["state"].value_counts().to_dict(),
        "time_share": rows["seconds"].sum() / trials["seconds"].sum() if trials["seconds"].sum() else None,
        "reasons": reasons.head(MAX_REASONS).to_dict(),
        "num_other_reasons": max(len(reasons) - MAX_REASONS, 0),
    }


def _setting(tracker: MlflowTracker, frame: pd.DataFrame) -> str:
    """What was trained: `Network improved, 6 epochs, ...`; what trials differ in as `32 to 64`."""
    trials = trial_rows(frame)
    if trials.empty:
        return ""
    run = tracker.client.get_run(trials["run_id"].iloc[0])
    network, epochs, batch = (_values(trials, f) for f in ("model.network", "training.epochs", "training.batch_size"))
    parts = [f"Network {network}", f"{epochs} epoch{'' if epochs == '1' else 's'}", f"batches of {batch}"]
    if size := queries.data_size(run):
        images = f"{size.training:,} training and {size.validation:,} validation images"
        parts.append(f"{images} of {size.classes:,} classes")
    where = f", on {device}" if (device := RunTags.of(run).device) else ""
    return f"{', '.join(parts)}{where}."


def _values(trials: pd.DataFrame, field: str) -> str:
    values = sorted(trials[field].dropna().unique())
    return " to ".join(dict.fromkeys(value_label(value) for value in [*values[:1], *values[-1:]]))


def _control_recipe(tracker: MlflowTracker, frame: pd.DataFrame) -> dict[str, str]:
    """The settings of the base recipe by section, also where the control has not ended; {} where its run lacks them."""
    trials = trial_rows(frame)
    for run_id in trials["run_id"][trials["control"]].head(1):
        try:
            return settings(recipe_of(tracker, tracker.client.get_run(run_id)))
        except UserError as error:
            log.warning(error.lines[0])
    return {}


def _best_short(frame: pd.DataFrame) -> pd.Series | None:
    """The first of the short trials by rank; None where there is none."""
    rows = ranked(frame)
    return next((row for _, row in rows[rows["short"]].iterrows()), None)


def _provenance(
    tracker: MlflowTracker, frame: pd.DataFrame, comparison: Comparison, decision: FinalsDecision | None
) -> list[str]:
    """What the best trial, and the finals' winner, were made by and of; a line each."""
    names = {str(comparison.best["run_id"]): "The best trial" if comparison.label == "best" else "The runner-up"}
    if decision and decision.winner and decision.winner.run_id in set(frame["run_id"]):
        names[decision.winner.run_id] = "The finals' winner"
    return [f"{name}, run {run_id}: {_origin(tracker, run_id)}." for run_id, name in names.items()]


def _origin(tracker: MlflowTracker, run_id: str) -> str:
    tags = RunTags.of(tracker.client.get_run(run_id))
    values = {"commit": tags.commit, "torch": tags.torch, "hardware": tags.hardware}
    values |= {"data": tags.data_digest, "split": tags.split_digest}
    after = {"commit": tags.uncommitted}
    return "; ".join(f"{name} {value[:60]}{after.get(name, '')}" for name, value in values.items() if value)
