"""A study as one page: its answer, and everything that it rests on."""

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.errors import UserError, escape_control
from pipeline.registry.decision import FinalsDecision, find_winner
from pipeline.report import figures, markup
from pipeline.report.analysis import Lead, effects, finals, importances, lead
from pipeline.report.trials import (
    Predictions,
    aliases,
    challenger,
    changes,
    control,
    early,
    finished,
    histories,
    predictions,
    ranked,
    searched,
    weakest_class,
)
from pipeline.search.importances import num_top
from pipeline.tracking import queries
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.run_data import LocatedData, RunData, find_data
from pipeline.tracking.tracker import MlflowTracker

_Find = Callable[[RunData], LocatedData]  # `run_data.find_data`, told where to look
LISTED = 10  # best trials
ENDED = 40  # pruned and failed trials that are listed
PICTURES = 12  # of each kind of disagreement
REASONS = 5
PARALLEL = 8  # parameters that make an axis
_RANK = "as the search does: finished trials by score, then pruned ones by the epochs reached, then by their last value"
_SEEDS = "best mean first; Student's t over seeds, all on the same validation images."


@dataclass(frozen=True, eq=False)
class Pair:
    """A study's best trial, or its runner-up, beside its control; with what both answered, None where it is gone."""

    best: pd.Series
    word: str  # best or runner-up
    base: pd.Series | None
    best_answers: Predictions | None
    base_answers: Predictions | None
    lead: Lead | None


def study_page(
    tracker: MlflowTracker,
    study: StudyRuns,
    frame: pd.DataFrame,
    data_dir: Path,
    links: Mapping[str, str],
    dataset: str | None = None,
) -> str:
    """The HTML of one study, from `trials.table`; images come from where its data set lies, see `run_data.find_data`, and
    are never downloaded.
    """
    note = tracker.client.get_run(study.parent).data.tags.get("mlflow.note.content", "")
    pair = best_pair(tracker, frame)
    decision, verdict = finals_verdict(tracker, study)
    page = markup.Page()
    said = [*([verdict] if verdict else []), *answer(frame, pair, decision), *champions(tracker, frame)]
    page.head(study.name, f"Question: {note}" if note else "", said, links)
    page.counts(frame)
    if decision or len(finals(frame)):
        table = _decision_table(frame, decision) if decision else _finals_table(frame)
        page.part("Finals: the same recipes with fresh seeds", table)
    page.part("Best trials", _best_table(frame, pair))
    if pair is None:
        page.part("Search history", page.figure(figures.history(frame)))
    else:
        _results(page, tracker, frame, pair, partial(find_data, data_dir=data_dir, dataset=dataset, download=False))
    page.part("What was pruned or failed, and why", _ended(frame))
    page.part("Provenance", _provenance(tracker, pair))
    return page.html(study.name)


def _results(page: markup.Page, tracker: MlflowTracker, frame: pd.DataFrame, pair: Pair, find: _Find) -> None:
    """What needs at least one finished trial."""
    done, weights, judged = finished(frame), importances(frame), ranked(frame)
    order = "by score" if len(judged) == len(done) else _RANK
    page.part("Search history", page.figure(figures.history(frame)))
    if len(weights):
        method = (
            f"PED-ANOVA (Watanabe et al. 2023): what tells the best {num_top(len(judged))} of {len(judged)} trials, ranked "
            f"{order}, from the others; shares sum to 100 %. The mark is what 95 % of shuffles of the ranks stay "
            "below, for each parameter by itself. The ranges are those of the values tried."
        )
        page.part("Which parameters matter", page.figure(figures.importance(weights)), markup.method(method))
        chosen = list(weights["parameter"][:PARALLEL])
        page.part("Parallel coordinates", page.figure(figures.parallel(frame, chosen)), markup.dim(f"Ranked {order}."))
    else:
        few = f"{markup.count(len(judged), 'trial')} with a score, or pruned: too few, or too much alike, to tell."
        page.part("Which parameters matter", markup.dim(few))
    page.part("Effect of each choice against the control", *_effects(page, tracker, frame))
    shown = [pair.best["run_id"], *([pair.base["run_id"]] if pair.base is not None else [])]
    stopped = frame[frame["state"] == "pruned"]["run_id"].tail(figures.LINES)
    curves = histories(tracker, list(dict.fromkeys([*shown, *stopped])), str(pair.best["objective"]))
    page.part("Learning curves", page.figure(figures.learning_curves(frame, curves)))
    page.part("F1 by class", page.figure(figures.per_class(frame)))
    page.part(f"Where the {pair.word} and the control disagree", *_disagreement(page, tracker, pair, find))
    answers = {f"the {pair.word}": pair.best_answers}
    if pair.base is not None and pair.base["run_id"] != pair.best["run_id"]:
        answers["the control"] = pair.base_answers
    known = {label: run for label, run in answers.items() if run is not None}
    drawn = page.figure(figures.calibration(known)) if known else markup.dim("The predictions are gone.")
    page.part("Calibration", drawn)
    costs = ["time/training_s"]
    if "model/parameters" in done and done["model/parameters"].nunique() > 1:
        costs = list(figures.COSTS)
    note = "Times are the wall clock's of one run each; other work on the machine is in them."
    page.part(
        "Cost against score",
        markup.columns(page.figure(figures.cost(frame, measure)) for measure in costs),
        markup.dim(note),
    )


def best_pair(tracker: MlflowTracker, frame: pd.DataFrame, runner_up: bool = True) -> Pair | None:
    """A study's best trial and its control; the best is its `runner_up` where the control is it. None: none finished."""
    found, base = challenger(frame), control(frame)
    if found is None:
        return None
    best, word = found if runner_up else (finished(frame).iloc[0], "best")
    answers = predictions(tracker, best["run_id"])
    same = base is not None and base["run_id"] == best["run_id"]
    beside = answers if same else predictions(tracker, base["run_id"]) if base is not None else None
    others = len(ranked(frame)) - 1  # pruned ones were candidates too
    gap = lead(answers, beside, best["objective"], others) if answers and beside and not same else None
    return Pair(best, word, base, answers, beside, gap)


def finals_verdict(tracker: MlflowTracker, study: StudyRuns) -> tuple[FinalsDecision | None, str]:
    """What a study's finals decided, and that in a line: a winner or a tie; no decision where it no longer holds."""
    try:
        decision, chosen = FinalsDecision.load(tracker, study), find_winner(tracker, study)
    except UserError as error:
        return None, f"{escape_control(error.lines[0])}."
    if chosen:
        return decision, f"Finals: the winner is {chosen.summary}."
    return decision, "Finals: no winner, every recipe diverged with some seed." if decision else ""


def champions(tracker: MlflowTracker, frame: pd.DataFrame) -> list[str]:
    """A line for each run of these that the registry has under an alias."""
    known = aliases(tracker)
    return [
        f"{known[row['run_id']]} is a run of this study: "
        f"{'final of ' if row['role'] == 'final' else ''}trial {row['trial']}, {row['run_id']}."
        for _, row in frame[frame["run_id"].isin(list(known))].iterrows()
    ]


def answer(frame: pd.DataFrame, pair: Pair | None, decision: FinalsDecision | None = None) -> list[str]:
    """The result in a few plain sentences, with what the noise allows to say; `decision` is that of the finals."""
    if pair is None:
        return ["No trial finished, so there is no answer yet."]
    done, base = finished(frame), pair.base
    best = done.iloc[0]
    first = f"Trial {best['trial']} is the best of {markup.count(len(done), 'finished trial')}"
    first += f": {best['objective']} {best['score']:.4f}"
    equal = int((done["score"] == best["score"]).sum()) - 1
    first += f" (as good as {markup.count(equal, 'other')})" if equal else ""
    if base is None:
        lines = [f"{first}. No control finished, so there is nothing to compare it with."]
    elif base["run_id"] == best["run_id"]:
        lines = [f"{first}. It is the control: the search has found nothing better."]
        if pair.lead:
            lines[0] += (
                f" The runner-up, trial {pair.best['trial']}, is at {lead_text(pair.lead)}: {pair.lead.verdict}."
            )
    elif pair.lead is None:
        gain = 100 * (best["score"] - base["score"])
        lines = [
            f"{first}, {gain:+.2f} points from the control's {base['score']:.4f}; their predictions can't be paired."
        ]
    else:
        gap = pair.lead
        lines = [
            f"{first}, {lead_text(gap)} beside the control's {base['score']:.4f}. "
            f"It changes: {changes(best, base, searched(frame))}.",
            f"That is {gap.verdict}; {_luck(gap)}. The trial was chosen on these images, so its score flatters it.",
        ]
    repeats = finals(frame)
    if len(repeats) and not decision:
        top = repeats.iloc[0]
        lines.append(
            f"With fresh seeds the best recipe's mean is {top['mean']:.4f} (95 % interval {top['low']:.4f} to "
            f"{top['high']:.4f}, n = {top['n']} seeds); see the finals."
        )
    elif not decision:
        lines.append("Each trial has one seed: the spread over seeds is in none of these numbers; finals measure it.")
    return lines


def _luck(gap: Lead) -> str:
    if gap.trials < 2:
        return "there was no other trial to choose from"
    chance = f"the best of {gap.trials} equally good trials, pruned ones counted, would lead by up to about"
    return f"{chance} {100 * gap.luck:.1f} points by luck alone"


def lead_text(gap: Lead) -> str:
    """`+1.39 points (95 % interval -1.32 to 4.10, n = 144 images, McNemar p = 0.62)`."""
    return (
        f"{100 * gap.difference:+.2f} points (95 % interval {100 * gap.low:+.2f} to {100 * gap.high:+.2f}, "
        f"n = {gap.images:,} validation images, paired; exact McNemar p = {gap.p:.2g})"
    )


# ----------------------------------------------------------------------------------------------------------- sections


def _best_table(frame: pd.DataFrame, pair: Pair | None) -> str:
    rows, base, names = finished(frame).head(LISTED), control(frame), searched(frame)
    if pair is None:
        return markup.dim("No trial finished.")
    if base is not None and base["run_id"] not in set(rows["run_id"]):
        rows = pd.concat([rows, base.to_frame().T])
    heads = [
        "trial",
        str(pair.best["objective"]),
        "beside control",
        "macro-F1",
        "weakest class",
        "training",
        "parameters",
    ]
    heads += ["latency", "what differs from the control" if base is not None else "searched parameters"]
    cells = []
    for _, row in rows.iterrows():
        weakest, f1 = weakest_class(row)
        cells.append(
            [
                f"{row['trial']}{' (control)' if row['control'] else ''}",
                f"{row['score']:.4f}",
                f"{100 * (row['score'] - base['score']):+.2f} points" if base is not None else "",
                markup.number(row.get("val/f1_macro"), "{:.4f}"),
                f"{weakest} ({f1:.3f})" if weakest else "",
                markup.number(row.get("time/training_s"), "{:,.1f} s"),
                markup.number(row.get("model/parameters"), "{:,.0f}"),
                markup.number(row.get("model/latency_ms"), "{:.2f} ms"),
                changes(row, base, names),
            ]
        )
    return markup.table(heads, cells, wide={8}, numbers={0, 1, 2, 3, 5, 6, 7})


def _finals_table(frame: pd.DataFrame) -> str:
    repeats, base = finals(frame), control(frame)
    names = [name for name in searched(frame) if name != "training.seed"]
    cells = []
    for _, row in repeats.iterrows():
        run = frame[frame["run_id"] == row["run_id"]].iloc[0]
        cells.append(
            [
                f"trial {run['trial']}: {changes(run, base, names)}",
                f"{row['n']}",
                f"{row['mean']:.4f}",
                markup.number(row["deviation"], "{:.4f}"),
                f"{row['low']:.4f} to {row['high']:.4f}" if pd.notna(row["low"]) else "one seed",
                markup.number(row["seconds"], "{:,.0f} s"),
            ]
        )
    heads = ["recipe", "seeds", "mean", "standard deviation", "95 % interval of the mean", "time of a run"]
    return markup.table(heads, cells, wide={0}, numbers={1, 2, 3, 4, 5}) + markup.paragraph(
        f"{markup.count(len(repeats), 'recipe')}; {_SEEDS}"
    )


def _decision_table(frame: pd.DataFrame, decision: FinalsDecision) -> str:
    """What finals measured and decided."""
    base, names, winner, cells = control(frame), searched(frame), decision.winner, []
    for row in decision.ranked:
        score, gap = row.score, row.difference
        won = "winner" if winner and row.digest == winner.digest else ""
        tied = "ties with the winner" if winner and row.trial in winner.tied else "behind"
        trial = frame[frame["run_id"] == row.trial_run]
        cells.append(
            [
                row.name + "".join(f": {changes(run, base, names)}" for _, run in trial.iterrows()),
                won or row.stopped or tied,
                f"{score.n if score else 0}",
                markup.number(score and score.mean, "{:.4f}"),
                markup.number(score and score.sd, "{:.4f}"),
                f"{score.low:.4f} to {score.high:.4f}" if score and score.low is not None else "",
                f"{100 * gap.mean:+.2f}" if gap else "",
                f"{100 * gap.low:+.2f} to {100 * gap.high:+.2f}"
                if gap and gap.low is not None and gap.high is not None
                else "",
                markup.number(row.training_s, "{:,.1f} s"),
            ]
        )
    heads = ["recipe", "verdict", "seeds", "mean", "standard deviation", "95 % interval"]
    heads += ["beside control, points", "95 % interval", "training"]
    said = f"{markup.count(len(cells), 'recipe')}; {_SEEDS} Differences are paired by seed."
    return (
        markup.table(heads, cells, wide={0}, numbers={2, 3, 4, 5, 6, 7, 8})
        + markup.paragraph(said)
        + markup.method("; ".join(decision.rules))
    )


def _effects(page: markup.Page, tracker: MlflowTracker, frame: pd.DataFrame) -> list[str]:
    done, pruned = len(finished(frame)), int((frame["state"] == "pruned").sum())
    of, which = "the score", "those that finished"
    if pruned:
        which += (
            "; pruned ones, which were poor, are left out, so choices that were often pruned look better than they are"
        )
    if pruned > done:  # the few that finished were selected by what is to be explained
        epoch, frame = early(tracker, frame)
        of = f"{frame['objective'].iloc[0]} after epoch {epoch}"
        which = f"all that got to epoch {epoch}, where pruning began, whether pruned or not"
    found = effects(frame)
    if found is None:
        number = markup.count(len(finished(frame)), "trial")
        return [markup.dim(f"Too few to estimate effects from, or too much alike: {number} with {of}.")]
    share = max(found.explained, 0)
    method = (
        "A Bayesian linear model of all searched parameters at once, one effect per choice (numbers with many values in "
        "thirds), effects normal around 0, its width averaged over by the marginal likelihood (Lindley and Smith 1972). "
        f"n = {found.trials} trials: {which}. The search chose the trials and did not randomise one parameter at a time; "
        "what two choices do together is left out, and the prior draws effects towards 0. Each interval is one of 95 %, not "
        "corrected for how many there are. * The control has no such parameter, or did not finish: beside the most "
        "frequent choice."
    )
    said = f"The model explains {share:.0%} of the scores' variance in trials left out of it" + (
        "." if share >= 0.3 else ": hardly anything can be told from it."
    )
    if of != "the score":
        early_only = (
            f"Effects are on {of} and not on the final score, as {pruned} trials were pruned and {done} finished"
        )
        said = f"{early_only}: what helps early need not help in the end. {said}"
    rows = [
        [
            row["parameter"],
            row["level"],
            row["reference"],
            f"{row['n']}",
            f"{row['pruned']}",
            f"{100 * row['effect']:+.2f}",
            f"{100 * row['low']:+.2f} to {100 * row['high']:+.2f}",
        ]
        for _, row in found.table.iterrows()
    ]
    heads = ["parameter", "choice", "beside", "n", "pruned", "effect, points", "95 % interval"]
    whole = f"<details><summary>All {len(rows)} choices</summary>{markup.table(heads, rows, numbers={3, 4, 5, 6})}</details>"
    return [page.figure(figures.effect(found, of)), markup.paragraph(said), markup.method(method), whole]


def _disagreement(page: markup.Page, tracker: MlflowTracker, pair: Pair, find: _Find) -> list[str]:
    best, base = pair.best_answers, pair.base_answers
    if pair.base is None or pair.base["run_id"] == pair.best["run_id"]:
        return [markup.dim("There is no control beside the best to disagree with.")]
    if best is None or base is None or pair.lead is None:
        return [markup.dim("The predictions of one of them are gone, or not of the same images.")]
    right, other = best.answers == best.labels, base.answers == base.labels
    counts = (
        f"Of {len(right):,} validation images {int((right & other).sum()):,} are right by both, "
        f"{pair.lead.only_first:,} by the {pair.word} alone, {pair.lead.only_second:,} by the control alone, "
        f"{int((~right & ~other).sum()):,} by neither. Blue cells: the {pair.word} does better; orange: worse."
    )
    images = _images(tracker, pair.best, best, find)
    parts = [markup.paragraph(counts), page.figure(figures.confusion_difference(best, base))]
    if isinstance(images, str):
        parts.append(markup.paragraph(images))
    for title, chosen in (
        (f"Right by the {pair.word} alone", right & ~other),
        ("Right by the control alone", other & ~right),
    ):
        places = np.flatnonzero(chosen)
        sure = np.maximum(best.probabilities.max(1), base.probabilities.max(1))[places]
        places = places[np.argsort(-sure, kind="stable")][:PICTURES]
        if len(places):
            first = f", the {PICTURES} surest" if chosen.sum() > PICTURES else ""
            parts.append(f"<h3>{title}: {markup.count(int(chosen.sum()), 'image')}{first}</h3>")
            parts.append(_pictures(places, pair.word, best, base, None if isinstance(images, str) else images))
    return parts


def _images(tracker: MlflowTracker, run: pd.Series, answers: Predictions, find: _Find) -> np.ndarray | str:
    """uint8 (N, S, S, 3) of a run's validation images, in the order of its predictions; or why there are none."""
    run_id = str(run["run_id"])
    try:
        digest = tracker.client.get_run(run_id).data.tags["data_digest"]
        named = (str(run["data.dataset"]), int(run["data.image_size"]))
        data = find(RunData(f"run {run_id}", *named, digest, queries.data_places(tracker, run_id))).images
    except (UserError, KeyError, ValueError) as error:
        reason = error.lines[0] if isinstance(error, UserError) else "the run does not say which"
        return f"The images can't be shown, only their numbers in the training part: {reason}."
    return data.train.images[answers.ids].permute(0, 2, 3, 1).numpy()


def _pictures(places: np.ndarray, word: str, best: Predictions, base: Predictions, images: np.ndarray | None) -> str:
    found = []
    for place in places:
        said = [f"{best.classes[best.labels[place]]} (no. {best.ids[place]})"]
        for who, run in ((word, best), ("control", base)):
            said.append(f"{who}: {run.classes[run.answers[place]]} {run.probabilities[place].max():.0%}")
        picture = f'<img alt="" src="{_png(images[place])}">' if images is not None else ""
        found.append(
            f"<figure>{picture}<figcaption>{'<br>'.join(markup.text(line) for line in said)}</figcaption></figure>"
        )
    return f'<div class="pictures">{"".join(found)}</div>'


def _png(image: np.ndarray) -> str:
    out = io.BytesIO()
    picture = Image.fromarray(image)
    picture.thumbnail((96, 96))
    picture.save(out, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _ended(frame: pd.DataFrame) -> str:
    rows = frame[(frame["role"] == "trial") & ~frame["state"].isin(["finished", "running"])]
    rows = rows.sort_values(["state", "trial"], kind="stable")
    if rows.empty:
        return markup.dim("Nothing: every trial finished.")
    base, names = control(frame), searched(frame)
    cells = [
        [
            f"{row['trial']}",
            row["state"],
            row["reason"] or "no reason given",
            f"{row['epochs']}",
            markup.number(row.get(row["objective"]), "{:.4f}"),
            markup.number(row["seconds"], "{:,.1f} s"),
            changes(row, base, names),
        ]
        for _, row in rows.head(ENDED).iterrows()
    ]
    counts = rows["state"].value_counts()
    spent, whole = rows["seconds"].sum(), frame["seconds"].sum()
    trials = (frame["role"] == "trial").sum()
    said = f"{', '.join(f'{count} {state}' for state, count in counts.items())} of {trials} trials"
    said += f", {spent / whole:.0%} of the time." if whole else "."
    reasons = rows["reason"].replace("", "no reason given").value_counts()
    told = "; ".join(f"{reason}: {count}" for reason, count in reasons.head(REASONS).items())
    told += f"; {markup.count(len(reasons) - REASONS, 'other reason')}" if len(reasons) > REASONS else ""
    heads = ["trial", "state", "why", "epochs", "last value", "time", "what differs from the control"]
    which = f"The first {ENDED} of {len(rows)}" if len(rows) > ENDED else f"All {len(rows)}" if len(rows) > 1 else "It"
    table = markup.table(heads, cells, wide={6}, numbers={3, 4, 5})
    folded = f"<details{' open' * (len(rows) <= 5)}><summary>{which}</summary>{table}</details>"
    return markup.paragraph(said) + markup.paragraph(f"Why: {told}.") + folded


def _provenance(tracker: MlflowTracker, pair: Pair | None) -> str:
    lines = [f"Written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}. All scores are of the validation split."]
    if pair is not None:
        tags = tracker.client.get_run(pair.best["run_id"]).data.tags
        wanted = {"commit": "mlflow.source.git.commit", "torch": "torch", "hardware": "hardware"}
        wanted |= {"data": "data_digest", "split": "split_digest"}
        facts = [f"{name} {tags[tag][:60]}" for name, tag in wanted.items() if tags.get(tag)]
        lines.append(f"The best trial, run {pair.best['run_id']}: {'; '.join(facts)}.")
    return "".join(f'<p class="dim">{markup.text(line)}</p>' for line in lines)
