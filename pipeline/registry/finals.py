"""The best few recipes of a study and its control, trained again with several fresh seeds.

A run is data: candidates and what was trained already are read from MLflow alone. finals_run.py trains them, and
decision.py decides which one wins.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

import torch
from mlflow.entities import Run as StoredRun

from pipeline.data.prepare import TrainingData
from pipeline.errors import DataError, UserError, counted
from pipeline.experiment import DIVERGED
from pipeline.recipe import Recipe, parse_recipe
from pipeline.registry.racing import MIN_SEEDS, Candidate, Final
from pipeline.tracking import queries
from pipeline.tracking.intact import control_runs, intact
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.execution import executable_on


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
        return [candidate for candidate, seed in pairs if find_final(self.done, self.recipe(candidate, seed)) is None]

    def recipe(self, candidate: Candidate, seed: int) -> Recipe:
        """What is trained of a candidate with a seed."""
        return candidate.with_seed(seed, self.folds, self.seeds.index(seed))

    def remaining_s(self, workers: int = 1, end_s: float = 0.0) -> float:
        """What they take in so many workers, by the seconds of their trials and those from a training's end to the next."""
        return makespan((candidate.seconds + end_s for candidate in self.remaining), workers)

    @property
    def num_done(self) -> int:
        """Trainings that are not trained again."""
        return self.num_trainings - len(self.remaining)


def makespan(seconds: Iterable[float], workers: int) -> float:
    """What trainings take that are begun in this order, each by the first of so many workers that is idle."""
    ends = [0.0] * workers
    for one in seconds:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)


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
    done = finals_done(tracker, study, *digests.pop(), folds)
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
    if tags.recipe_digest != recipe.digest():
        raise UserError(subject, "its recipe.json is not what was trained", remedy)
    return recipe


def finals_done(
    tracker: MlflowTracker, study: StudyRuns, data_digest: str | None, split_digest: str | None, folds: int
) -> dict[str, Final]:
    """The finals on this data that need no other training, by their recipe's digest; that holds seed, epochs and fold too.

    Each fold is a split of its own, so there only the data has to be the same.
    """
    done: dict[str, Final] = {}
    for run in queries.children(tracker, study, "final"):
        tags = RunTags.of(run)
        diverged = tags.state is State.FAILED and (tags.reason or "").startswith(DIVERGED)
        if tags.data_digest != data_digest or (not folds and tags.split_digest != split_digest):
            continue
        if tags.recipe_digest and (tags.state is State.FINISHED or diverged):
            score = None if diverged else run.data.metrics[study.objective]
            final = Final(run.info.run_id, score, run.data.metrics.get("time/training_s", 0.0), study.broken_by(run))
            done.setdefault(tags.recipe_digest, final)
    return done


def find_final(done: Mapping[str, Final], recipe: Recipe) -> Final | None:
    """The final of this recipe, or of the same one executed as a graph: that replays the same kernels."""
    graphed = {"eager": "graphed", "compiled": "compiled_graphed"}.get(recipe.training.execution)
    same = recipe.changed({"training.execution": graphed}) if graphed else recipe
    return done.get(recipe.digest()) or done.get(same.digest())


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
