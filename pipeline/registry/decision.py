"""What finals decided: the artifact `finals.json` of a study's run, written and read here alone."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.evaluation.significance import Sample
from pipeline.models.build import prediction_flop
from pipeline.registry.racing import FOLDS_RULE, MIN_SEEDS, RULES, Candidate, Racing, choose
from pipeline.tracking import queries
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker

FILE = "finals.json"  # an artifact of the study's own run


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class SeedScore(_Stored):
    """One training of a candidate."""

    seed: int
    run_id: str | None
    score: float | None  # None: it diverged


class CandidateResult(_Stored):
    """What finals measured of one candidate. Scores are in [0, 1], times in seconds."""

    name: str
    trial: int
    trial_run: str
    trial_score: float | None
    digest: str  # of the recipe without its seed
    is_control: bool
    changes: Mapping[str, Any]  # parameter -> value, where it differs from the control's
    epochs: int
    prediction_flop: int
    training_s: float  # median over seeds
    score: Sample | None  # None: every seed diverged
    difference: Sample | None  # from the control, paired by seed; None for the control itself
    p_value: float | None  # of the difference
    stopped: str | None  # why it was stopped
    runs: tuple[SeedScore, ...]


class Winner(_Stored):
    """The recipe that wins, and its run to promote: of its seeds the best on the validation split."""

    trial: int
    digest: str
    run_id: str
    seed: int
    tied: tuple[int, ...]  # trials of the candidates that it ties with
    reason: str
    summary: str  # one line: which recipe, by what mean and spread, over how many seeds


class FinalsDecision(_Stored):
    """What finals decided, and what the decision rests on."""

    study: str
    objective: str
    decided: str  # UTC, ISO 8601, to the second
    seeds: tuple[int, ...]
    data_digest: str
    split_digest: str
    least_sd: float
    folds: int = 0  # each seed trained on another of so many; 0: all on the study's split
    looks: tuple[int, ...] = ()  # numbers of these seeds over which was decided before
    rules: tuple[str, ...]
    candidates: tuple[CandidateResult, ...]  # the control first
    winner: Winner | None  # None: every recipe diverged or was infeasible with some seed
    evidence: frozenset[str]  # ids of all finals that had ended

    @property
    def ranked(self) -> list[CandidateResult]:
        """The candidates, the highest mean first."""
        return sorted(self.candidates, key=lambda candidate: -(candidate.score.mean if candidate.score else 0))

    def store(self, tracker: MlflowTracker, study: StudyRuns) -> None:
        """Write it to the study's run."""
        tracker.client.log_text(study.parent, self.model_dump_json(indent=2), FILE)

    @classmethod
    def load(cls, tracker: MlflowTracker, study: StudyRuns) -> Self | None:
        """A study's decision; None where there is none. UserError where its runs are no longer those that it rests on."""
        content = queries.read_file(tracker, study.parent, FILE)
        if content is None:
            return None
        subject, remedy = f"finals of {study.name}", f"`finals {study.name}` decides anew"
        try:
            decision = cls.model_validate_json(content)
        except ValidationError:
            raise UserError(subject, f"{FILE} is damaged", remedy) from None
        ended = finals_that_ended(tracker, study)
        if added := ended - decision.evidence:
            raise UserError(
                subject,
                f"{len(added)} trainings ended, or were restored in MLflow, since the decision of {decision.decided}, "
                "without a new one",
                f"{remedy}, `--run` names a run",
            )
        if missing := decision.evidence - ended:
            raise UserError(
                subject,
                f"{len(missing)} of the runs that decided them are gone, deleted in MLflow or without their tags",
                f"{remedy}, as does restoring them without training",
            )
        return decision


def finals_that_ended(tracker: MlflowTracker, study: StudyRuns) -> frozenset[str]:
    """The ids of the runs that a decision can rest on."""
    ended = (State.FINISHED, State.FAILED)
    return frozenset(
        run.info.run_id for run in queries.children(tracker, study, "final") if RunTags.of(run).state in ended
    )


def find_winner(tracker: MlflowTracker, study: StudyRuns) -> Winner | None:
    """The winner of the study's last finals; None where none came to an end.

    Its summary names the trial that scores best now, where it was not in the finals. UserError as from `FinalsDecision.load`:
    where finals ran since, neither the old decision nor none would be true.
    """
    decision = FinalsDecision.load(tracker, study)
    if decision is None or decision.winner is None:
        return None
    summary = decision.winner.summary
    candidates = {candidate.trial_run for candidate in decision.candidates}
    best = max((c.trial_score or 0.0 for c in decision.candidates if not c.is_control), default=0.0)
    for run_id in set(queries.best_run_ids(tracker, study, 1)) - candidates:
        run = tracker.client.get_run(run_id)
        if run.data.metrics[study.objective] > best:  # of equal ones finals took the first
            trial = RunTags.of(run).trial
            summary += f"; trial {trial} was not in these finals and has the study's best score now: "
            summary += f"`finals {study.name}` takes it in"
    return decision.winner.model_copy(update={"summary": summary})


def run_to_promote(tracker: MlflowTracker, name: str, say_line: Callable[[str], None]) -> tuple[str, str]:
    """The run that a study stands for, its finals' winner or else its best trial, and why that one."""
    study, note = queries.find_study(tracker, name)
    for line in queries.omitted_lines(tracker, study):
        say_line(line)
    if chosen := find_winner(tracker, study):
        run, why = chosen.run_id, f"{study.name}: {chosen.summary}"
    elif FinalsDecision.load(tracker, study):
        rule = "no winner: with some seed every recipe diverged or was infeasible"
        raise UserError(f"finals of {study.name}", rule, "`promote --run RUN` takes a run all the same")
    elif best := queries.best_run_ids(tracker, study, 1):
        run = best[0]
        rule = f"one seed can't tell the best from the lucky, `finals {study.name}` can"
        why = f"{study.name}: its best trial, run {run}; {rule}"
    else:
        raise queries.no_best_run(tracker, study)
    return run, f"{note}; {why}" if note else why


# ------------------------------------------------------------------------------------------------------------- deciding


def decide(
    tracker: MlflowTracker, study: StudyRuns, racing: Racing, seeds: Sequence[int], data: TrainingData
) -> FinalsDecision:
    """The decision of a race that is over; the first of its candidates is the control."""
    results = {candidate.digest: _result(racing, candidate, seeds, data) for candidate in racing.candidates}
    looks = _earlier_looks(tracker, study, racing, seeds, data)
    choice = choose(racing, {digest: result.prediction_flop for digest, result in results.items()}, 1 + len(looks))
    return FinalsDecision(
        study=study.name,
        objective=study.objective,
        decided=datetime.now(UTC).isoformat(timespec="seconds"),
        seeds=tuple(seeds),
        data_digest=data.digest,
        split_digest=data.split_digest,
        least_sd=racing.least_sd,
        rules=(*RULES, FOLDS_RULE) if racing.folds else RULES,
        folds=racing.folds,
        looks=looks,
        candidates=tuple(results.values()),
        winner=_winner(study, racing, *choice) if choice else None,
        evidence=finals_that_ended(tracker, study),
    )


def _earlier_looks(
    tracker: MlflowTracker, study: StudyRuns, racing: Racing, seeds: Sequence[int], data: TrainingData
) -> tuple[int, ...]:
    """Over how many of these seeds was decided before, on the same images, and whatever became of it."""
    try:
        earlier = FinalsDecision.model_validate_json(queries.read_file(tracker, study.parent, FILE) or "")
    except ValidationError:  # none, or damaged
        return ()
    before = (earlier.data_digest, earlier.split_digest, earlier.folds)
    if before != (data.digest, data.split_digest, racing.folds) or set(earlier.seeds).isdisjoint(seeds):
        return ()
    return tuple(sorted({*earlier.looks, len(earlier.seeds)} - {len(seeds)} - set(range(MIN_SEEDS))))


def _result(racing: Racing, candidate: Candidate, seeds: Sequence[int], data: TrainingData) -> CandidateResult:
    control = racing.candidates[0]
    finals = {seed: racing.finals[candidate.digest][seed] for seed in seeds if seed in racing.finals[candidate.digest]}
    scores = list(racing.scores(candidate).values())
    differences = [] if candidate is control else racing.differences(candidate, control)
    changes = candidate.recipe.difference(control.recipe)
    return CandidateResult(
        name=candidate.name,
        trial=candidate.trial,
        trial_run=candidate.trial_run,
        trial_score=candidate.score,
        digest=candidate.digest,
        is_control=candidate.is_control,
        changes={name: value for name, (value, _) in changes.items() if value is not None},
        epochs=candidate.recipe.training.epochs,
        prediction_flop=prediction_flop(candidate.recipe.model, len(data.classes), candidate.recipe.data.image_size),
        training_s=median(final.seconds for final in finals.values()),
        score=racing.sample(scores) if scores else None,
        difference=racing.sample(differences) if differences else None,
        p_value=racing.p_value(candidate, control) if differences else None,
        stopped=racing.stopped.get(candidate.digest),
        runs=tuple(SeedScore(seed=seed, run_id=final.run_id, score=final.score) for seed, final in finals.items()),
    )


def _winner(study: StudyRuns, racing: Racing, best: Candidate, tied: Sequence[Candidate], reason: str) -> Winner:
    scores = racing.scores(best)
    seed = max(scores, key=lambda seed: (scores[seed], -seed))
    run_id = racing.finals[best.digest][seed].run_id
    assert run_id is not None  # Racing.learn_ids asked for it
    score, others = racing.sample(list(scores.values())), [c for c in tied if c is not best]
    spread = (
        f" ± {score.sd:.4f} (mean ± standard deviation of {score.n} {racing.unit})"
        if score.sd is not None
        else " (1 seed)"
    )
    tie = f"a tie with {', '.join(candidate.name for candidate in others)}: " if others else ""
    return Winner(
        trial=best.trial,
        digest=best.digest,
        run_id=run_id,
        seed=seed,
        tied=tuple(candidate.trial for candidate in others),
        reason=reason,
        summary=f"{best.name} of {study.name}: {study.objective} {score.mean:.4f}{spread}, {tie}{reason}; "
        f"run {run_id}, seed {seed}, its best on {'its own fold' if racing.folds else 'the validation split'}",
    )
