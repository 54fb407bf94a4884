"""The best few recipes of a study and its control, trained again with several fresh seeds; and which of them is the winner.

A run is data: candidates, what was trained already and what was decided are read from MLflow alone.
"""

import hashlib
import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count as count_from
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from mlflow.entities import Run as StoredRun

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.errors import DataError, UserError
from pipeline.evaluation.significance import sample
from pipeline.experiment import ExperimentRequest, Interrupted, Outcome
from pipeline.models.build import prediction_flop
from pipeline.processes import StopOnSignal, study_lock, this_process
from pipeline.recipe import Recipe, parse_recipe
from pipeline.registry.racing import RULES, Candidate, Final, Racing, choose
from pipeline.tracking.kept import controls, whole
from pipeline.tracking.store import is_active
from pipeline.tracking.tags import RunTags
from pipeline.tracking.tracker import MlflowTracker, State, StudyRuns
from pipeline.training.loop import EpochReport
from pipeline.training.resume import CHECKPOINTS

DECISION = "finals.json"  # an artifact of the study's parent run


@dataclass(frozen=True)
class Winner:
    """What finals decided."""

    run_id: str  # the run to promote: of the winning recipe's seeds the best on the validation split
    said: str  # one line: which recipe, by what mean and spread, over how many seeds


@dataclass(frozen=True)
class FinalsPlan:
    """What is to be trained: every candidate, the control first, with every seed."""

    study: StudyRuns
    candidates: Sequence[Candidate]
    seeds: Sequence[int]
    done: Mapping[str, Final]  # by the recipe's digest

    @property
    def trainings(self) -> int:
        """In all, if none stops early."""
        return len(self.candidates) * len(self.seeds)

    @property
    def seconds_left(self) -> float:
        """Of the trainings that are not done, by what their trials took, if none stops early."""
        return sum(
            candidate.seconds
            for candidate in self.candidates
            for seed in self.seeds
            if candidate.with_seed(seed).digest() not in self.done
        )

    @property
    def num_done(self) -> int:
        """Trainings that are not trained again."""
        return sum(c.with_seed(seed).digest() in self.done for c in self.candidates for seed in self.seeds)


class FinalsObserver(Protocol):
    """Sees finals happen; for a person at a terminal."""

    def started(self, name: str, recipe: Recipe) -> None:
        """A training begins."""

    def epoch(self, report: EpochReport) -> None:
        """Its epoch was measured."""

    def ended(self, name: str, outcome: Outcome) -> None:
        """It ended, in whatever state."""

    def said(self, line: str) -> None:
        """Something else is to be known."""


def plan_finals(
    tracker: MlflowTracker, study: StudyRuns, top: int, num_seeds: int, epochs: int | None = None
) -> FinalsPlan:
    """The `top` best recipes of a study's finished trials and its control; `epochs` instead of their own, where given.

    Seeds count up from 1, leaving out those of the study's trials, so a later command with more seeds goes on with the
    same ones. UserError where no trial finished, the control is missing, or the trials saw different data.
    """
    trials = tracker.children(study, "trial")
    finished = [run for run in trials if run.data.tags.get("state") == State.FINISHED]
    finished.sort(key=lambda run: (-run.data.metrics[study.objective], int(run.data.tags["trial"])))
    if not finished:
        raise UserError(f"study {study.name}: no finished trial yet; make study goes on with it, TRIALS= adds some")
    seen = {(run.data.tags["data_digest"], run.data.tags["split_digest"]) for run in trials}
    if len(seen) > 1:
        raise UserError(
            f"study {study.name}: its trials saw {len(seen)} different data sets or splits; start a VERSION"
        )
    control = _control(tracker, study, trials)
    chosen = {
        candidate.digest: candidate for candidate in [_candidate(tracker, study, control, finished, True, epochs)]
    }
    best: list[str] = []
    for run in finished:
        if len(best) == top:
            break
        candidate = _candidate(tracker, study, run, finished, False, epochs)
        if candidate.digest not in best:
            best.append(candidate.digest)
            chosen.setdefault(candidate.digest, candidate)
    used = {int(run.data.params["training.seed"]) for run in trials if "training.seed" in run.data.params}
    seeds = list(islice((seed for seed in count_from(1) if seed not in used), num_seeds))
    return FinalsPlan(study, list(chosen.values()), seeds, _done(tracker, study, *seen.pop()))


def check_data(plan: FinalsPlan, tracker: MlflowTracker, data: TrainingData) -> None:
    """DataError where the data set or its split is not what the study's trials saw."""
    tags = tracker.client.get_run(plan.candidates[0].trial_run).data.tags
    check_same_data(f"study {plan.study.name}", tags, data)


def check_same_data(what: str, tags: Mapping[str, str], data: TrainingData) -> None:
    """DataError where data set or split differ from those in a run's tags."""
    lines = [
        f"{name}: {tags[tag][:16]} then, {now[:16]} now ({data.source})"
        for name, tag, now in (("data", "data_digest", data.digest), ("split", "split_digest", data.split_digest))
        if tags[tag] != now
    ]
    if lines:
        way_out = "DATASET= names the folder where the same data lies, DATA_DIR= where CIFAR-10 does"
        raise DataError([f"{what}: trained on other data than is here", *(f"  {line}" for line in lines), way_out])


def run_finals(
    tracker: MlflowTracker,
    plan: FinalsPlan,
    data: TrainingData,
    device: torch.device,
    observer: FinalsObserver,
    home: Path,
) -> dict[str, Any]:
    """Train what is not trained yet and decide; the decision as it is stored.

    Seed by seed, every candidate once, so that poor ones stop early. Raises Interrupted where somebody asks to stop:
    the same call goes on. UserError where another command runs the study.
    """
    check_data(plan, tracker, data)
    with StopOnSignal() as stop, study_lock(plan.study.name, home):
        tracker.close_gone(plan.study.experiment)
        race = Racing(plan.candidates, len(plan.seeds), least_sd=1 / len(data.validation.labels))
        done = _done(tracker, plan.study, data.digest, data.split_digest)
        deleted = tracker.deleted_keys(plan.study.parent)
        for seed in plan.seeds:
            for candidate in race.running():
                final = done.get(candidate.with_seed(seed).digest())
                if final is None:
                    key = _run_key(plan.study, candidate.with_seed(seed), data, deleted)
                    final = _train(tracker, plan.study, candidate, seed, key, data, device, observer, stop)
                race.add(candidate, seed, final)
            for line in race.stop_the_beaten():
                observer.said(line)
        race.learn_ids(tracker.id_of)
        decision = _decide(tracker, plan, race, data)
        tracker.client.log_text(plan.study.parent, json.dumps(decision, indent=2), DECISION)
        if decision["winner"]:
            tracker.client.set_tag(plan.study.parent, "finals_run", decision["winner"]["run_id"])
            tracker.client.set_tag(plan.study.parent, "finals_said", decision["winner"]["said"])
    return decision


def winner(tracker: MlflowTracker, study: StudyRuns) -> Winner | None:
    """What the study's last finals decided; None where none came to an end.

    UserError where finals ran since and did not come to an end, or a run of theirs is gone: neither the old decision nor
    none would be true.
    """
    decision = load_decision(tracker, study)
    if decision is None or decision["winner"] is None:
        return None
    said = decision["winner"]["said"]
    candidates = {candidate["trial_run"] for candidate in decision["candidates"]}
    for run_id in set(tracker.best_run_ids(study, 1)) - candidates:
        trial = tracker.client.get_run(run_id).data.tags["trial"]
        said += f"; trial {trial} was not in these finals and has the study's best score now: make finals takes it in"
    return Winner(decision["winner"]["run_id"], said)


def load_decision(tracker: MlflowTracker, study: StudyRuns) -> dict[str, Any] | None:
    """`finals.json` of a study; None where there is none. UserError where it is no longer what its runs say."""
    content = tracker.read_file(study.parent, DECISION)
    if content is None:
        return None
    again = f"make finals NAME={study.name} decides anew"
    try:
        decision = json.loads(content)
        seen = set(decision["evidence"])
    except (ValueError, KeyError):
        raise UserError(f"finals of {study.name}: {DECISION} is damaged; {again}") from None
    there = _evidence(tracker, study)
    if new := there - seen:
        raise UserError(
            f"finals of {study.name}: {len(new)} trainings ended, or were restored in MLflow, since the decision of "
            f"{decision['decided']}, without a new one; {again}, RUN= names a run"
        )
    if gone := seen - there:
        raise UserError(
            f"finals of {study.name}: {len(gone)} of the runs that decided them are gone, deleted in MLflow or without "
            f"their tags; {again}, as does restoring them without training"
        )
    return dict(decision)


def _control(tracker: MlflowTracker, study: StudyRuns, trials: Sequence[StoredRun]) -> StoredRun:
    """The control's run, a finished one where there are several.

    One that was deleted in MLflow has its recipe still, which is all that is needed: its score is left out.
    """
    found = controls(trials)
    if found:
        return max(found, key=lambda run: run.data.tags.get("state") == State.FINISHED)
    deleted = [run for run in tracker.deleted_children(study) if run.data.tags.get("role") == "trial"]
    if found := controls(list(whole(deleted))):
        return found[0]
    raise UserError(
        f"study {study.name}: no run of its control, trial 0; make study goes on with it, or VERSION= starts another "
        "where it was deleted in MLflow for good"
    )


def _candidate(
    tracker: MlflowTracker,
    study: StudyRuns,
    run: StoredRun,
    finished: Sequence[StoredRun],
    is_control: bool,
    epochs: int | None,
) -> Candidate:
    recipe = recipe_of(tracker, run)
    own = recipe.training.epochs
    if epochs:
        recipe = recipe.changed({"training.epochs": epochs})
    done = run.data.tags.get("state") == State.FINISHED and is_active(run)
    timed = run if done else finished[0]  # for the control that has not finished, another's time is the best guess
    seconds = timed.data.metrics["time/training_s"] * recipe.training.epochs / own
    score = run.data.metrics[study.objective] if done else None
    return Candidate(recipe, int(run.data.tags["trial"]), run.info.run_id, is_control, score, seconds)


def recipe_of(tracker: MlflowTracker, run: StoredRun) -> Recipe:
    """A run's recipe.json; UserError where there is none, or this code can't read it or reads something else in it."""
    name, commit = f"run {run.info.run_id}", run.data.tags.get("mlflow.source.git.commit")
    content = tracker.read_file(run.info.run_id, "recipe.json")
    if content is None:
        raise UserError(f"{name}: its recipe.json is not at {run.info.artifact_uri}")
    try:
        recipe = parse_recipe(content)
    except UserError as error:
        lines = [f"{name}: its recipe.json can't be read by this code; git checkout {commit} has what wrote it"]
        raise UserError([*lines, *(f"  {line}" for line in error.lines)]) from None
    if recipe.digest() != run.data.tags["recipe_digest"]:
        raise UserError(f"{name}: its recipe.json is not what was trained; git checkout {commit} has what wrote it")
    return recipe


def _done(tracker: MlflowTracker, study: StudyRuns, data_digest: str, split_digest: str) -> dict[str, Final]:
    """The finals on this data that need no other training, by their recipe's digest; that holds seed and epochs too."""
    done: dict[str, Final] = {}
    for run in tracker.children(study, "final"):
        tags = run.data.tags
        diverged = tags.get("state") == State.FAILED and tags.get("reason", "").startswith("diverged")
        if (tags["data_digest"], tags["split_digest"]) != (data_digest, split_digest):
            continue
        if tags.get("state") == State.FINISHED or diverged:
            score = None if diverged else run.data.metrics[study.objective]
            final = Final(run.info.run_id, score, run.data.metrics.get("time/training_s", 0.0))
            done.setdefault(tags["recipe_digest"], final)
    return done


def _evidence(tracker: MlflowTracker, study: StudyRuns) -> set[str]:
    """The runs that a decision can rest on."""
    ended = (State.FINISHED, State.FAILED)
    return {run.info.run_id for run in tracker.children(study, "final") if run.data.tags.get("state") in ended}


def _run_key(study: StudyRuns, recipe: Recipe, data: TrainingData, deleted: Collection[str]) -> str:
    """By which a training that was stopped or killed goes on, under the same run; where that was deleted, the next one."""
    identity = f"{study.parent} {recipe.digest()} {data.digest} {data.split_digest}"
    names = (identity + (f" {number}" if number else "") for number in count_from(0))
    keys = (hashlib.sha256(name.encode()).hexdigest()[:32] for name in names)
    return next(key for key in keys if key not in deleted)


def _train(
    tracker: MlflowTracker,
    study: StudyRuns,
    candidate: Candidate,
    seed: int,
    key: str,
    data: TrainingData,
    device: torch.device,
    observer: FinalsObserver,
    stop: StopOnSignal,
) -> Final:
    recipe, name = candidate.with_seed(seed), f"{candidate.name}, seed {seed}"

    def check(*progress: object) -> None:
        if stop.requested:
            raise Interrupted

    def on_epoch(report: EpochReport) -> None:
        observer.epoch(report)
        check()

    check()
    observer.started(name, recipe)
    request = ExperimentRequest(
        recipe=recipe,
        data=data,
        device=device,
        name=f"final of {name}",
        parent_run=study.parent,
        tags=RunTags(
            role="final",
            study=study.name,
            trial=candidate.trial,
            trial_run=candidate.trial_run,
            candidate=candidate.digest,
            seed=seed,
            worker=this_process(),
        ),
        on_epoch=on_epoch,
        on_step=check,
        resume_dir=tracker.home / CHECKPOINTS / key,
        run_key=key,
    )
    outcome = experiment.run(request, tracker)
    observer.ended(name, outcome)
    if outcome.state is State.INTERRUPTED:
        raise Interrupted
    if outcome.state is State.FAILED and not outcome.reason.startswith("diverged"):
        raise UserError(f"{name}: {outcome.reason}; with more memory the same command goes on")
    score = outcome.metrics[study.objective] if outcome.state is State.FINISHED else None
    return Final(outcome.run_id, score, outcome.metrics.get("time/training_s", 0.0), outcome.run_key)


def _decide(tracker: MlflowTracker, plan: FinalsPlan, race: Racing, data: TrainingData) -> dict[str, Any]:
    """The decision as it is stored: JSON, scores in [0, 1], times in seconds."""
    control = plan.candidates[0]
    table = {c.digest: _row(race, c, control, plan.seeds, data) for c in plan.candidates}

    chosen = choose(race, {digest: row["prediction_flop"] for digest, row in table.items()})
    return {
        "study": plan.study.name,
        "objective": plan.study.objective,
        "decided": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": list(plan.seeds),
        "data_digest": data.digest,
        "split_digest": data.split_digest,
        "least_sd": race.least_sd,
        "rules": RULES,
        "candidates": list(table.values()),
        "winner": _said(plan, race, table, *chosen) if chosen else None,
        "evidence": sorted(_evidence(tracker, plan.study)),
    }


def _row(
    race: Racing, candidate: Candidate, control: Candidate, seeds: Sequence[int], data: TrainingData
) -> dict[str, Any]:
    finals = {seed: race.finals[candidate.digest][seed] for seed in seeds if seed in race.finals[candidate.digest]}
    scores, differences = list(race.scores(candidate).values()), race.differences(candidate, control)
    changes = candidate.recipe.difference(control.recipe)
    difference = None
    if differences and candidate is not control:
        difference = asdict(sample(differences, race.least_sd)) | {"p": race.p_value(candidate, control)}
    return {
        "name": candidate.name,
        "trial": candidate.trial,
        "trial_run": candidate.trial_run,
        "trial_score": candidate.score,
        "candidate": candidate.digest,
        "is_control": candidate.is_control,
        "changes": {name: here for name, (here, _) in changes.items() if here is not None},
        "epochs": candidate.recipe.training.epochs,
        "prediction_flop": prediction_flop(candidate.recipe.model, len(data.classes), data.image_size),
        "training_s": statistics.median(final.seconds for final in finals.values()),
        "score": asdict(sample(scores, race.least_sd)) if scores else None,
        "difference": difference,
        "out": race.out.get(candidate.digest),
        "runs": [{"seed": seed, "run_id": f.run_id, "score": f.score} for seed, f in finals.items()],
    }


def _said(
    plan: FinalsPlan,
    race: Racing,
    table: Mapping[str, Mapping[str, Any]],
    best: Candidate,
    tied: Sequence[Candidate],
    why: str,
) -> dict[str, Any]:
    scores = race.scores(best)
    seed = max(scores, key=lambda seed: (scores[seed], -seed))
    score = table[best.digest]["score"]
    spread = (
        f" ± {score['sd']:.4f} (mean ± standard deviation of {score['n']} seeds)" if score["sd"] is not None else ""
    )
    others = ", ".join(candidate.name for candidate in tied if candidate is not best)
    tie = f"a tie with {others}: {why}" if others else why
    run_id = race.finals[best.digest][seed].run_id
    return {
        "trial": best.trial,
        "candidate": best.digest,
        "run_id": run_id,
        "seed": seed,
        "tied": [candidate.trial for candidate in tied if candidate is not best],
        "why": why,
        "said": f"{best.name} of {plan.study.name}: {plan.study.objective} {score['mean']:.4f}"
        f"{spread or ' (1 seed)'}, {tie}; run {run_id}, seed {seed}, its best on the validation split",
    }
