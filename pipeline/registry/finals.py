"""The best few recipes of a study and its control, trained again with several fresh seeds.

A run is data: candidates and what was trained already are read from MLflow alone. decision.py decides which one wins.
"""

import hashlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Protocol

import torch
from mlflow.entities import Run as StoredRun

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.errors import DataError, UserError, counted
from pipeline.evaluation.constraints import violations
from pipeline.experiment import ExperimentRequest, Interrupted, Outcome
from pipeline.processes import StopOnSignal, study_lock, this_process
from pipeline.recipe import Recipe, parse_recipe
from pipeline.registry.decision import FinalsDecision, decide
from pipeline.registry.racing import MIN_SEEDS, Candidate, Final, Racing
from pipeline.tracking import queries, recovery
from pipeline.tracking.intact import control_runs, intact
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.execution import executable_on
from pipeline.training.loop import EpochReport
from pipeline.training.resume import CHECKPOINTS


@dataclass(frozen=True)
class FinalsPlan:
    """What is to be trained: every candidate, the control first, with every seed."""

    study: StudyRuns
    candidates: Sequence[Candidate]
    seeds: Sequence[int]
    done: Mapping[str, Final]  # by the recipe's digest
    folds: int = 0  # each seed trains on another of so many; 0: all on the study's split
    notes: Sequence[str] = ()  # a line each: a recipe that the device can't execute so, seeds that decide nothing

    @property
    def num_trainings(self) -> int:
        """In all, if none stops early."""
        return len(self.candidates) * len(self.seeds)

    @property
    def remaining(self) -> list[Candidate]:
        """A candidate for each training that is not done, if none stops early."""
        pairs = ((candidate, seed) for candidate in self.candidates for seed in self.seeds)
        return [candidate for candidate, seed in pairs if _find_final(self.done, self.recipe(candidate, seed)) is None]

    def recipe(self, candidate: Candidate, seed: int) -> Recipe:
        """What is trained of a candidate with a seed."""
        return candidate.with_seed(seed, self.folds, self.seeds.index(seed))

    @property
    def remaining_s(self) -> float:
        """What they take by the seconds of their trials."""
        return sum(candidate.seconds for candidate in self.remaining)

    @property
    def num_done(self) -> int:
        """Trainings that are not trained again."""
        return self.num_trainings - len(self.remaining)


@dataclass(frozen=True)
class TimeLimit:
    """No seed is begun that would end later; nothing is lost by that, as each seed is complete."""

    deadline: float  # time.monotonic()
    grace_s: float = 0.0  # so much later the first MIN_SEEDS may end, without which nothing is decided

    def allows(self, seconds: float, num_seeds: int) -> bool:
        """Whether a seed that takes so long may begin, after `num_seeds`."""
        grace_s = self.grace_s if num_seeds < MIN_SEEDS else 0.0
        return time.monotonic() + seconds <= self.deadline + grace_s


class FinalsObserver(Protocol):
    """Sees finals happen; for a person at a terminal."""

    def started(self, name: str, recipe: Recipe) -> None:
        """A training begins."""

    def epoch(self, report: EpochReport) -> None:
        """Its epoch was measured."""

    def ended(self, name: str, outcome: Outcome) -> None:
        """It ended, in whatever state."""

    def note(self, line: str) -> None:
        """Anything else, as a line."""


# ------------------------------------------------------------------------------------------------------------ the plan


def plan_finals(
    tracker: MlflowTracker,
    study: StudyRuns,
    device: torch.device,
    top: int,
    num_seeds: int,
    epochs: int | None = None,
    folds: int = 0,
) -> FinalsPlan:
    """A study's control and the `top` best other recipes of its feasible trials; `epochs` instead of their own, where given.

    Seeds count up from 1, leaving out those of the study's trials, so a later command with more seeds continues with the
    same ones; with `folds` there are so many, each on another fold. Recipes that were executed as CUDA graphs run eagerly
    where the `device` has none. UserError where no feasible trial finished, the control is missing, or the trials saw
    different data.
    """
    trials = queries.children(tracker, study, "trial")
    finished = [run for run in trials if RunTags.of(run).state is State.FINISHED]
    finished.sort(key=lambda run: (-run.data.metrics[study.objective], RunTags.of(run).trial))
    feasible = [run for run in finished if not study.broken_by(run)]
    if not feasible:
        raise queries.no_best_run(tracker, study)
    digests = {(tags.data_digest, tags.split_digest) for tags in map(RunTags.of, trials)}
    if len(digests) > 1:
        rule = f"its trials saw {len(digests)} different data sets or splits"
        raise UserError(f"study {study.name}", rule, "start a `--version`")
    finished_ids = {run.info.run_id for run in finished}

    def made(run: StoredRun, is_control: bool = False) -> tuple[Candidate, Recipe]:
        timed = run if run.info.run_id in finished_ids else finished[0]
        return _candidate(tracker, study, run, timed, is_control, epochs, device)

    first = made(_control(tracker, study, trials), is_control=True)
    pairs = {first[0].digest: first}
    for run in feasible:
        if len(pairs) == top + 1:
            break
        pair = made(run)
        pairs.setdefault(pair[0].digest, pair)
    notes = [
        f"{candidate.name}: {execution_line(trained, candidate.recipe, device)}"
        for candidate, trained in pairs.values()
        if candidate.recipe.training.execution != trained.training.execution
    ]
    used = {int(run.data.params["training.seed"]) for run in trials if "training.seed" in run.data.params}
    seeds = list(islice((seed for seed in count(1) if seed not in used), folds or num_seeds))
    if len(seeds) < MIN_SEEDS and len(pairs) > 1:
        repeat = "fold" if folds else "seed"
        few = f"{counted(len(seeds), repeat)} can't tell one recipe from another"
        notes.append(f"{few}: all tie, and a tie goes to the cheapest; `--{repeat}s {MIN_SEEDS}` decides")
    done = _finals_done(tracker, study, *digests.pop(), folds)
    return FinalsPlan(study, [candidate for candidate, _ in pairs.values()], seeds, done, folds, notes)


def _candidate(
    tracker: MlflowTracker,
    study: StudyRuns,
    run: StoredRun,
    timed: StoredRun,
    is_control: bool,
    epochs: int | None,
    device: torch.device,
) -> tuple[Candidate, Recipe]:
    """The candidate that a trial's run gives, and the recipe that the trial trained.

    `timed` is the run that says how long a training takes: this one, or another where a control's can't.
    """
    trained, trial = recipe_of(tracker, run), RunTags.of(run).trial
    assert trial is not None  # or the run would have been left out, see intact.py
    recipe = executable_on(trained.changed({"training.epochs": epochs} if epochs else {}), device)
    candidate = Candidate(
        recipe,
        trial=trial,
        trial_run=run.info.run_id,
        is_control=is_control,
        score=run.data.metrics[study.objective] if timed is run else None,
        seconds=timed.data.metrics["time/training_s"] * recipe.training.epochs / trained.training.epochs,
    )
    return candidate, trained


def execution_line(trained: Recipe, recipe: Recipe, device: torch.device) -> str:
    """How a recipe is executed now, where `executable_on` changed that."""
    recorded, possible = trained.training.execution, recipe.training.execution
    return f"training.execution = {recorded}: a graph needs a GPU, and this is {device}; executed as {possible}"


def _control(tracker: MlflowTracker, study: StudyRuns, trials: Sequence[StoredRun]) -> StoredRun:
    """The control's run, a finished one where there are several.

    A deleted one that MLflow still holds will do: only its recipe is needed.
    """
    if runs := control_runs(trials):
        return max(runs, key=lambda run: RunTags.of(run).state is State.FINISHED)
    deleted = [run for run in queries.deleted_children(tracker, study.parent) if RunTags.of(run).role == "trial"]
    if runs := control_runs(list(intact(deleted))):
        return runs[0]
    raise UserError(
        f"study {study.name}",
        "no run of its control, trial 0",
        "`study NAME` resumes it; `--version` starts another where it was deleted in MLflow for good",
    )


def recipe_of(tracker: MlflowTracker, run: StoredRun) -> Recipe:
    """A run's recipe.json; UserError where there is none, or this code can't read it or reads something else in it."""
    subject, tags = f"run {run.info.run_id}", RunTags.of(run)
    remedy = f"check out commit {tags.commit}, which wrote it"
    content = queries.read_file(tracker, run.info.run_id, "recipe.json")
    if content is None:
        raise UserError(subject, f"its recipe.json is not at {run.info.artifact_uri}")
    try:
        recipe = parse_recipe(content)
    except UserError as error:
        raise UserError(subject, "its recipe.json can't be read by this code", remedy, error.lines) from None
    if tags.recipe_digest not in recipe.digests:
        raise UserError(subject, "its recipe.json is not what was trained", remedy)
    return recipe


def _finals_done(
    tracker: MlflowTracker, study: StudyRuns, data_digest: str | None, split_digest: str | None, folds: int
) -> dict[str, Final]:
    """The finals on this data that need no other training, by their recipe's digest; that holds seed, epochs and fold too.

    Each fold is a split of its own, so there only the data has to be the same.
    """
    done: dict[str, Final] = {}
    for run in queries.children(tracker, study, "final"):
        tags = RunTags.of(run)
        diverged = tags.state is State.FAILED and (tags.reason or "").startswith("diverged")
        if tags.data_digest != data_digest or (not folds and tags.split_digest != split_digest):
            continue
        if tags.recipe_digest and (tags.state is State.FINISHED or diverged):
            score = None if diverged else run.data.metrics[study.objective]
            final = Final(run.info.run_id, score, run.data.metrics.get("time/training_s", 0.0), study.broken_by(run))
            done.setdefault(tags.recipe_digest, final)
    return done


def _find_final(done: Mapping[str, Final], recipe: Recipe) -> Final | None:
    """The final of this recipe, or of the same one executed as a graph: that replays the same kernels."""
    graphed = {"eager": "graphed", "compiled": "compiled_graphed"}.get(recipe.training.execution)
    same = recipe.changed({"training.execution": graphed}) if graphed else recipe
    return next((done[digest] for digest in (*recipe.digests, *same.digests) if digest in done), None)


# ------------------------------------------------------------------------------------------------------------- the data


def check_data(plan: FinalsPlan, tracker: MlflowTracker, data: TrainingData) -> None:
    """DataError where the data set or its split is not what the study's trials saw."""
    run = tracker.client.get_run(plan.candidates[0].trial_run)
    check_same_data(f"study {plan.study.name}", RunTags.of(run), data)


def check_same_data(subject: str, tags: RunTags, data: TrainingData) -> None:
    """DataError where data set or split differ from those in a run's tags."""
    parts = (("data", tags.data_digest, data.digest), ("split", tags.split_digest, data.split_digest))
    differing = [
        f"{name}: {str(old)[:16]} then, {new[:16]} now ({data.source})" for name, old, new in parts if old != new
    ]
    if differing:
        remedy = "`--dataset` names the folder where the same data lies, `--data-dir` where CIFAR-10 does"
        raise DataError(subject, "trained on other data than is here", remedy, differing)


# ------------------------------------------------------------------------------------------------------------- training


def run_finals(
    tracker: MlflowTracker,
    plan: FinalsPlan,
    data: TrainingData,
    device: torch.device,
    observer: FinalsObserver,
    home: Path,
    limit: TimeLimit | None = None,
) -> FinalsDecision | None:
    """Train what is not trained yet, decide, and store the decision.

    Seed by seed, every candidate once, so that poor ones stop early. Raises Interrupted where the user asks to stop:
    the same call resumes. UserError where another command runs the study. None where the time ends before MIN_SEEDS:
    nothing is decided then.
    """
    check_data(plan, tracker, data)
    with StopOnSignal() as stop, study_lock(plan.study.name, home):
        recovery.close_abandoned_runs(tracker, plan.study.experiment)
        first = data.at(plan.recipe(plan.candidates[0], plan.seeds[0]).data)  # refused where there can't be such folds
        racing = Racing(plan.candidates, len(plan.seeds), 1 / len(first.validation.labels), plan.folds)
        done = _finals_done(tracker, plan.study, data.digest, data.split_digest, plan.folds)
        trainer = _Trainer(
            tracker, plan.study, data, device, observer, stop, queries.deleted_keys(tracker, plan.study.parent)
        )
        seeds: list[int] = []
        for seed in plan.seeds:
            missing = [c for c in racing.running() if _find_final(done, plan.recipe(c, seed)) is None]
            if limit and not limit.allows(trainer.expected_s(missing), len(seeds)):
                observer.note(f"the time is up after {len(seeds)} of {len(plan.seeds)} seeds")
                break
            seeds.append(seed)
            while following := racing.following(seeds):
                candidate, its_seed = following
                recipe = plan.recipe(candidate, its_seed)
                final = _find_final(done, recipe) or trainer.train(candidate, recipe)
                for line in racing.add(candidate, its_seed, final):
                    observer.note(line)
            for line in racing.stop_the_beaten():
                observer.note(line)
        if limit and len(seeds) < min(MIN_SEEDS, len(plan.seeds)):
            return None
        racing.num_seeds = len(seeds)
        racing.learn_ids(tracker.id_of)
        decision = decide(tracker, plan.study, racing, seeds, data)
        decision.store(tracker, plan.study)
    return decision


@dataclass
class _Trainer:
    """Trains the candidates of a study's finals, each under a run of its own."""

    tracker: MlflowTracker
    study: StudyRuns
    data: TrainingData
    device: torch.device
    observer: FinalsObserver
    stop: StopOnSignal
    deleted_keys: Collection[str]
    pace: float = 1.0  # seconds that trainings really took, by those that their trials did

    def expected_s(self, candidates: Sequence[Candidate]) -> float:
        """What a training of each will take."""
        return self.pace * sum(candidate.seconds for candidate in candidates)

    def train(self, candidate: Candidate, recipe: Recipe) -> Final:
        """A training that came to an end. Interrupted where the user stops it, UserError where memory is too small."""
        seed, about = recipe.training.seed, recipe.data
        name = f"{candidate.name}, seed {seed}" + (f", fold {about.fold + 1} of {about.folds}" if about.folds else "")
        self._check_stop()
        self.observer.started(name, recipe)
        key = self._run_key(recipe)
        tags = RunTags(
            role="final",
            study=self.study.name,
            trial=candidate.trial,
            trial_run=candidate.trial_run,
            candidate=candidate.digest,
            seed=seed,
            worker=this_process(),
        )
        request = ExperimentRequest(
            recipe=recipe,
            data=self.data,
            device=self.device,
            name=f"final of {name}",
            parent_run=self.study.parent,
            tags=tags,
            run_key=key,
            resume_dir=self.tracker.home / CHECKPOINTS / key,
            on_epoch=self._on_epoch,
            on_step=self._check_stop,
        )
        outcome = experiment.run(request, self.tracker)
        self.observer.ended(name, outcome)
        if outcome.state is State.INTERRUPTED:
            raise Interrupted
        if outcome.state is State.FINISHED and candidate.seconds:
            self.pace = outcome.seconds / candidate.seconds
        if outcome.state is State.FAILED and not outcome.reason.startswith("diverged"):
            raise UserError(name, outcome.reason, "with more memory the same command resumes")
        score = outcome.metrics[self.study.objective] if outcome.state is State.FINISHED else None
        infeasible = violations(self.study.constraints, outcome.metrics)
        return Final(outcome.run_id, score, outcome.metrics.get("time/training_s", 0.0), infeasible, outcome.run_key)

    def _check_stop(self, *progress: object) -> None:
        if self.stop.requested:
            raise Interrupted

    def _on_epoch(self, report: EpochReport) -> None:
        self.observer.epoch(report)
        self._check_stop()

    def _run_key(self, recipe: Recipe) -> str:
        """The same one each time, so that a training that was stopped or killed resumes under the same run.

        Where that run was deleted in MLflow, its key can't be used again: the next one of a fixed sequence is taken.
        """
        split = "" if recipe.data.folds else self.data.split_digest
        identity = f"{self.study.parent} {recipe.digest()} {self.data.digest} {split}"
        names = (identity + (f" {number}" if number else "") for number in count(0))
        keys = (hashlib.sha256(name.encode()).hexdigest()[:32] for name in names)
        return next(key for key in keys if key not in self.deleted_keys)
