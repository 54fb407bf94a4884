"""Several studies on one page, compared; templates/comparison.html has its order and its words."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import pandas as pd

from pipeline.recipe import value_label
from pipeline.report.analysis import Lead, lead
from pipeline.report.control_comparison import Comparison, compare_with_control
from pipeline.report.figures import scores
from pipeline.report.render import render
from pipeline.report.study_page import finals_verdict
from pipeline.report.trials import finished, param_names, searched, state_words, trial_rows, weakest_class
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.tags import RunTags
from pipeline.tracking.tracker import MlflowTracker


def studies_page(
    tracker: MlflowTracker,
    studies: Sequence[StudyRuns],
    frame: pd.DataFrame,
    links: Mapping[str, str],
    word: Callable[[str], str] = str,
    next_steps: Mapping[str, str] = {},
) -> str:
    """The HTML of several studies, compared; `word` as `render` takes it; `next_steps`: what to do next -> the command."""
    groups = {study.name: frame[frame["study"] == study.name] for study in studies}
    comparisons = {name: compare_with_control(tracker, runs, runner_up=False) for name, runs in groups.items()}
    scored = {name: comparison for name, comparison in comparisons.items() if comparison}
    verdicts = [f"{study.name}: {verdict}" for study in studies if (verdict := finals_verdict(tracker, study)[1])]
    figures = {"scores": scores.spread(frame), "history": scores.history(frame), "cost": scores.cost(frame)}
    return render(
        "comparison.html",
        figures,
        word,
        title=" and ".join(groups),
        rankings=[_ranking(group) for group in _comparable(tracker, scored)],
        verdicts=verdicts,
        links=links,
        next_steps=next_steps,
        studies=[_study(name, groups[name], comparison) for name, comparison in comparisons.items()],
        leads=list(_leads(scored)),
        compared=list(scored),
        fields=dict(_fields(groups, scored)),
        num_fields=len(param_names(frame)),
    )


def _comparable(tracker: MlflowTracker, scored: Mapping[str, Comparison]) -> list[dict[str, Comparison]]:
    """The studies in groups of the same metric, data set and split: only their scores can be compared."""
    groups = defaultdict[tuple[str | None, ...], dict[str, Comparison]](dict)
    for name, comparison in scored.items():
        tags = RunTags.of(tracker.client.get_run(comparison.best["run_id"]))
        groups[comparison.best["objective"], tags.data_digest, tags.split_digest][name] = comparison
    return list(groups.values())


def _ranking(group: Mapping[str, Comparison]) -> dict[str, Any]:
    """Which of comparable studies has the highest score, and its lead over each other's best, None without predictions."""
    leader = max(group, key=lambda name: group[name].best["score"])
    others = {name: other for name, other in group.items() if name != leader}
    rivals = [{"name": name, "best": other.best, "lead": _lead(group[leader], other)} for name, other in others.items()]
    return {"leader": leader, "top": group[leader].best, "rivals": rivals}


def _lead(first: Comparison, second: Comparison) -> Lead | None:
    one, two = first.best_predictions, second.best_predictions
    if first.best["objective"] != second.best["objective"] or not (one and two):
        return None
    return lead(one, two, first.best["objective"])


def _study(name: str, runs: pd.DataFrame, comparison: Comparison | None) -> dict[str, Any]:
    trials = trial_rows(runs)
    weakest, f1 = weakest_class(comparison.best) if comparison else ("", float("nan"))
    return {
        "name": name,
        "states": state_words(trials).value_counts().to_dict(),
        "seconds": trials["seconds"].sum(),
        "best": comparison and comparison.best.to_dict(),
        "control": comparison and comparison.control,
        "weakest_class": weakest,
        "weakest_f1": f1,
    }


def _leads(scored: Mapping[str, Comparison]) -> Iterator[dict[str, Any]]:
    """How far each study's best trial is before each later one's."""
    for one, two in combinations(scored, 2):
        yield {"first": one, "second": two, "lead": _lead(scored[one], scored[two])}


def _fields(groups: Mapping[str, pd.DataFrame], scored: Mapping[str, Comparison]) -> Iterator[tuple[str, list[str]]]:
    """Each field that two studies searched, or in which their best recipes differ, with its value in each study."""
    search_spaces = [set(searched(groups[name])) for name in scored]
    for name in param_names(pd.concat(groups.values())):
        values = {
            study: "" if pd.isna(value := other.best[name]) else value_label(value) for study, other in scored.items()
        }
        if len(set(values.values())) > 1 or sum(name in space for space in search_spaces) > 1:
            cells = [value + _values_of_best_quarter(groups[study], name) for study, value in values.items()]
            if any(cells):  # the best recipes' kinds may lack it
                yield name, cells


def _values_of_best_quarter(runs: pd.DataFrame, name: str) -> str:
    """In brackets; nothing where that is the best trial alone, or the study didn't search the field."""
    done = finished(runs)
    values = done[name].head(len(done) // 4).dropna()
    if name not in searched(runs) or len(done) < 8 or values.empty:
        return ""
    if all(type(value) in (int, float) for value in values):
        ends = [value_label(values.min()), value_label(values.max())]
        return f" ({' to '.join(dict.fromkeys(ends))})"
    return f" ({', '.join(f'{value_label(value)} {count}x' for value, count in values.value_counts().items())})"
