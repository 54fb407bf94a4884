"""Several studies beside each other on one page."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from pipeline.report import figures, markup
from pipeline.report.analysis import Lead, lead
from pipeline.report.study_page import Pair, best_pair, finals_verdict, lead_text
from pipeline.report.trials import finished, param_names, searched, show, weakest_class
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.tracker import MlflowTracker


def studies_page(
    tracker: MlflowTracker, studies: Sequence[StudyRuns], frame: pd.DataFrame, links: Mapping[str, str]
) -> str:
    """The HTML of several studies beside each other."""
    pairs = {study.name: best_pair(tracker, frame[frame["study"] == study.name], runner_up=False) for study in studies}
    known = {name: pair for name, pair in pairs.items() if pair}
    title = " and ".join(study.name for study in studies)
    page = markup.Page()
    verdicts = [f"{study.name}: {said}" for study in studies if (said := finals_verdict(tracker, study)[1])]
    page.head(title, "", [*_answer_of_several(known), *verdicts], links)
    page.part("Studies", _studies_table(frame, pairs))
    page.part("Scores", page.figure(figures.spread(frame)))
    page.part("Search histories", page.figure(figures.history(frame)))
    page.part("The best of each, two at a time", _leads_table(known))
    page.part("The best recipes", _recipes_table(frame, known))
    page.part("Cost against score, all studies", page.figure(figures.cost(frame)))
    return page.html(title)


def _answer_of_several(pairs: Mapping[str, Pair]) -> list[str]:
    if not pairs:
        return ["No trial of any of them finished."]
    best = max(pairs, key=lambda name: pairs[name].best["score"])
    top = pairs[best]
    equal = [name for name, pair in pairs.items() if name != best and pair.best["score"] == top.best["score"]]
    tie = f", as high as that of {' and '.join(equal)}" if equal else ""
    score = f"trial {top.best['trial']}, {top.best['objective']} {top.best['score']:.4f}"
    lines = [f"{best} has the highest score{tie}: {score}."]
    if len(pairs) > 1 and not any(_between(top, pair) for name, pair in pairs.items() if name != best):
        return ["The studies were judged by other images or another metric: their scores can't be compared."]
    for name, pair in pairs.items():
        if name == best:
            continue
        gap = _between(top, pair)
        if gap is None:
            lines.append(f"{name}'s best was judged by other images or another metric: the two can't be compared.")
        else:
            lines.append(f"Beside {name}'s best, trial {pair.best['trial']}: {lead_text(gap)}; {gap.verdict}.")
    lines.append("Each is the best of its trials, chosen on these images, with one seed: a small lead may be luck.")
    return lines


def _between(first: Pair, second: Pair) -> Lead | None:
    if first.best["objective"] != second.best["objective"] or not (first.best_answers and second.best_answers):
        return None
    return lead(first.best_answers, second.best_answers, first.best["objective"])


def _studies_table(frame: pd.DataFrame, pairs: Mapping[str, Pair | None]) -> str:
    cells = []
    for name, pair in pairs.items():
        runs = frame[(frame["study"] == name) & (frame["role"] == "trial")]
        states = runs["state"].value_counts()
        base = pair.base if pair else None
        weakest, f1 = weakest_class(pair.best) if pair else ("", np.nan)
        cells.append(
            [
                name,
                f"{len(runs)}",
                ", ".join(f"{count} {state}" for state, count in states.items()),
                f"{pair.best['score']:.4f} (trial {pair.best['trial']})" if pair else "none",
                f"{base['score']:.4f}" if base is not None else "none",
                f"{weakest} ({f1:.3f})" if weakest else "",
                markup.number(pair.best.get("time/training_s"), "{:,.1f} s") if pair else "",
                markup.number(pair.best.get("model/parameters"), "{:,.0f}") if pair else "",
                markup.hours(runs["seconds"].sum()),
            ]
        )
    heads = ["study", "trials", "how they ended", "best", "control", "best's weakest class", "its training"]
    return markup.table([*heads, "its parameters", "all trials"], cells, numbers={1, 3, 4, 6, 7, 8})


def _leads_table(pairs: Mapping[str, Pair]) -> str:
    rows = []
    for one, two in combinations(pairs, 2):
        gap = _between(pairs[one], pairs[two])
        rows.append([one, two, lead_text(gap) if gap else "not comparable", gap.verdict if gap else ""])
    return (
        markup.table(["the best of", "beside the best of", "lead", "that is"], rows, wide={2})
        if rows
        else markup.dim("Fewer than two.")
    )


def _recipes_table(frame: pd.DataFrame, pairs: Mapping[str, Pair]) -> str:
    """The fields that two studies searched, or in which their best recipes differ."""
    groups = {name: frame[frame["study"] == name] for name in pairs}
    asked = [set(searched(runs)) for runs in groups.values()]
    names, rows = param_names(frame), []
    for name in names:
        values = {study: "" if pd.isna(value := pair.best[name]) else show(value) for study, pair in pairs.items()}
        if len(set(values.values())) > 1 or sum(name in some for some in asked) > 1:
            rows.append([name, *(value + _tried(groups[study], name) for study, value in values.items())])
    if not rows:
        return markup.dim("They do not differ.")
    said = "In brackets, where a study searched the field: what the best quarter of its finished trials have."
    return markup.paragraph(
        f"{len(rows)} of {len(names)} fields differ or were searched by several. {said}"
    ) + markup.table(["field", *pairs], rows)


def _tried(runs: pd.DataFrame, name: str) -> str:
    done = finished(runs)
    values = done[name].head(max(len(done) // 4, 1)).dropna()
    if name not in searched(runs) or values.empty:
        return ""
    if all(type(value) in (int, float) for value in values):
        ends = [show(values.min()), show(values.max())]
        return f" ({' to '.join(dict.fromkeys(ends))})"
    return f" ({', '.join(f'{show(value)} {count}x' for value, count in values.value_counts().items())})"
