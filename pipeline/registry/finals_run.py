"""Finals that were planned are trained, seed by seed, until a winner is decided."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import count, product

import torch

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.evaluation.constraints import violations
from pipeline.evaluation.significance import image_step
from pipeline.experiment import Interrupted, Outcome
from pipeline.processes import StopOnSignal, process_has_exited, study_lock, this_process
from pipeline.recipe import Recipe
from pipeline.registry.decision import FinalsDecision, decide
from pipeline.registry.finals import FinalsPlan, check_data, finals_done, find_final, makespan
from pipeline.registry.finals_trainers import FinalsObserver, Training, trainers
from pipeline.registry.racing import MIN_SEEDS, Final, Racing
from pipeline.tracking import queries, recovery
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker
from pipeline.tracking.uploader import DELETED

FLUSH_S = 60.0  # for MLflow to take what workers left behind
ORPHANS_S = 30.0  # for workers of a killed command to end, as they do at their next step


@dataclass(frozen=True)
class TimeLimit:
    """No seed is begun that would end later; nothing is lost by that, as each seed is complete."""

    deadline: float  # time.monotonic()
    grace_s: float = 0.0  # so much later the first MIN_SEEDS may end, without which nothing is decided

    def allows(self, seconds: float, num_seeds: int) -> bool:
        """Whether a seed that takes so long may begin, after `num_seeds`."""
        grace_s = self.grace_s if num_seeds < MIN_SEEDS else 0.0
        return time.monotonic() + seconds <= self.deadline + grace_s


def run_finals(
    tracker: MlflowTracker,
    plan: FinalsPlan,
    data: TrainingData,
    device: torch.device,
    observer: FinalsObserver,
    limit: TimeLimit | None = None,
    workers: int = 1,
) -> FinalsDecision | None:
    """Train what is not trained yet, decide, and store the decision.

    Seed by seed, every candidate once, so that poor ones stop early. Equal scores decide the same in any number of `workers`.
    Raises Interrupted where the user asks to stop: the same call resumes. UserError where another command runs the study,
    or memory is too small. None where the time ends before MIN_SEEDS: nothing is decided then.
    """
    check_data(plan, tracker, data)
    study = plan.study
    with StopOnSignal() as stop, study_lock(study.name, tracker.home):
        _await_orphans(tracker, study)
        recovery.close_abandoned_runs(tracker, study.experiment)
        about = plan.recipe(plan.candidates[0], plan.seeds[0]).data
        first = data.at(about)  # refused where there can't be such folds
        least_sd = image_step(study.objective, first.validation.labels.cpu().numpy(), len(data.classes))
        racing = Racing(plan.candidates, len(plan.seeds), least_sd, plan.folds)
        done = finals_done(tracker, study, data.digest, data.split_digest, plan.folds)
        race = _Race(plan, racing, done, _run_keys(tracker, study, data), observer, workers, limit)
        with trainers(tracker, study, data, about, device, workers, observer, stop) as training:
            while needed := race.needed():
                race.add(*training.next_ended(needed))
        if limit and len(race.seeds) < min(MIN_SEEDS, len(plan.seeds)):
            return None
        racing.num_seeds = len(race.seeds)
        racing.learn_ids(_ids(tracker, study, workers))
        decision = decide(tracker, study, racing, race.seeds, data)
        decision.store(tracker, study)
    return decision


class _Race:
    """Which trainings finals need next. What has ended is taken in seed by seed, in whatever order it ended."""

    def __init__(
        self,
        plan: FinalsPlan,
        racing: Racing,
        done: Mapping[str, Final],
        key_of: Callable[[Recipe], str],
        observer: FinalsObserver,
        workers: int = 1,
        limit: TimeLimit | None = None,
    ):
        """`done` is what needs no training, by its recipe's digest; `key_of` a recipe's run key."""
        self.seeds: list[int] = []  # that were taken in, or are being
        self._plan, self._racing, self._observer, self._workers, self._limit = plan, racing, observer, workers, limit
        self._num_allowed = 0  # seeds that the time limit allowed to begin
        self._pace = 1.0  # seconds that trainings really took, by those that their trials did
        self._trainings: dict[tuple[str, int], Training] = {}  # by the candidate's digest and the seed
        self._ended: dict[tuple[str, int], Final] = {}
        for candidate, seed in product(plan.candidates, plan.seeds):
            recipe, pair = plan.recipe(candidate, seed), (candidate.digest, seed)
            self._trainings[pair] = Training(candidate, recipe, key_of(recipe))
            if final := find_final(done, recipe):
                self._ended[pair] = final

    def needed(self) -> list[Training]:
        """Those that have not ended, the most urgent first, under way or not; none when the finals are over.

        Of the next seeds too, as far as there are workers for them.
        """
        while True:
            while following := self._racing.following(self.seeds):
                candidate, seed = following
                if (final := self._ended.get((candidate.digest, seed))) is None:
                    return self._missing()
                self._say(self._racing.add(candidate, seed, final))
            self._say(self._racing.stop_the_beaten())
            so_far, in_all = len(self.seeds), len(self._plan.seeds)
            if so_far == in_all:
                return []
            if not self._may_begin(so_far + 1):
                self._say([f"the time is up after {so_far} of {in_all} seeds"])
                return []
            self.seeds.append(self._plan.seeds[so_far])

    def add(self, training: Training, outcome: Outcome) -> None:
        """A training ended. Interrupted where the user stopped it, UserError where memory is too small."""
        self._observer.ended(training.name, outcome)
        if outcome.state is State.INTERRUPTED:
            raise Interrupted
        if not outcome.is_conclusive:
            remedy = "with more memory" + (", or fewer `--workers`," if self._workers > 1 else "")
            raise UserError(training.name, outcome.reason, f"{remedy} the same command resumes")
        finished, expected_s = outcome.state is State.FINISHED, training.candidate.seconds
        if finished and expected_s:
            self._pace = outcome.seconds / expected_s
        self._ended[training.candidate.digest, training.recipe.training.seed] = Final(
            run_id=outcome.run_id,
            score=outcome.metrics[self._plan.study.objective] if finished else None,
            seconds=outcome.metrics.get("time/training_s", 0.0),
            infeasible=violations(self._plan.study.constraints, outcome.metrics),
            run_key=outcome.run_key,
        )

    def _missing(self) -> list[Training]:
        number = len(self.seeds)
        missing = self._untrained(number)
        while len(missing) < self._workers and number < len(self._plan.seeds) and self._may_begin(number + 1):
            number += 1
            missing = self._untrained(number)
        return missing

    def _may_begin(self, number: int) -> bool:
        """Whether so many seeds end in time; one that has begun ahead of others goes on."""
        if number > self._num_allowed:
            seconds = [self._pace * training.candidate.seconds for training in self._untrained(number)]
            if self._limit and not self._limit.allows(makespan(seconds, self._workers), number - 1):
                return False
            self._num_allowed = number
        return True

    def _untrained(self, number: int) -> list[Training]:
        """Of the first so many seeds."""
        pairs = [(c.digest, seed) for seed in self._plan.seeds[:number] for c in self._racing.running()]
        return [self._trainings[pair] for pair in pairs if pair not in self._ended]

    def _say(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._observer.note(line)


def _await_orphans(tracker: MlflowTracker, study: StudyRuns) -> None:
    """Wait for workers of finals that were killed: they end by themselves, and may just complete what they trained."""
    runs = queries.children(tracker, study, "final")
    workers = [RunTags.of(run).worker for run in runs if run.info.status == "RUNNING"]
    orphans = [worker for worker in workers if worker and worker["host"] == this_process()["host"]]
    limit = time.monotonic() + ORPHANS_S
    while not all(map(process_has_exited, orphans)) and time.monotonic() < limit:
        time.sleep(0.1)


def _ids(tracker: MlflowTracker, study: StudyRuns, workers: int) -> Callable[[str], str]:
    """MLflow's ids by their run keys, once it has all; workers sent theirs themselves, or left them to this process."""
    if workers == 1:
        return tracker.id_of
    tracker.flush(FLUSH_S)

    @cache
    def stored() -> dict[str | None, str]:
        return {RunTags.of(run).run_key: run.info.run_id for run in queries.children(tracker, study, "final")}

    def id_of(key: str) -> str:
        if key in tracker.pending:
            return tracker.id_of(key)
        if key not in stored():
            raise UserError(f"run key {key}", f"{DELETED} before the finals ended", "the same command trains it again")
        return stored()[key]

    return id_of


def _run_keys(tracker: MlflowTracker, study: StudyRuns, data: TrainingData) -> Callable[[Recipe], str]:
    """A recipe's run key: the same each time, so that a training that was stopped or killed resumes under the same run.

    Where that run was deleted in MLflow, its key can't be used again: the next one of a fixed sequence is taken.
    """
    deleted = queries.deleted_keys(tracker, study.parent)

    def key_of(recipe: Recipe) -> str:
        split = "" if recipe.data.folds else data.split_digest
        identity = f"{study.parent} {recipe.digest()} {data.digest} {split}"
        names = (identity + (f" {number}" if number else "") for number in count(0))
        keys = (hashlib.sha256(name.encode()).hexdigest()[:32] for name in names)
        return next(key for key in keys if key not in deleted)

    return key_of
