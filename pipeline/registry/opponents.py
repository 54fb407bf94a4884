"""What a candidate is compared with where there is no champion, and how its seeds spread: read from MLflow."""

from collections.abc import Iterable, Mapping

from pipeline.errors import UserError
from pipeline.recipe import LATER
from pipeline.tracking import queries
from pipeline.tracking.intact import control_runs
from pipeline.tracking.store import is_active
from pipeline.tracking.tags import TRAINED_ROLES, RunTags, State, StoredRun
from pipeline.tracking.tracker import MlflowTracker


def control_of(tracker: MlflowTracker, run_id: str) -> str | None:
    """The control's run that the first champion has to beat; None outside a study, and for the control, whatever its seed.

    A trial is compared with the control's trial. A final is the best of several seeds, and an ensemble made of them, so it
    is compared with the best of the control's finals: against a single run, luck alone won in up to 9 % of the cases with
    5 seeds and 19 % with 10, instead of 5 % (simulated). None for an infeasible control, which could not become champion,
    and for one whose trainings all failed. UserError where the study has none, or one that can still be trained.
    """
    run = tracker.client.get_run(run_id)
    study, tags = queries.study_of(tracker, run), RunTags.of(run)
    if study is None:
        return None
    runs = queries.children(tracker, study)
    controls = control_runs(_trials(runs)) or control_runs(_trials(queries.deleted_children(tracker, study.parent)))
    ids = {control.info.run_id for control in controls}
    if ids & {run_id, tags.trial_run} or any(study.broken_by(control) for control in controls):
        return None
    trained = [control for control in _finished(controls) if is_active(control)]
    if tags.role == "trial" and trained:
        return trained[0].info.run_id
    finals = [other for other in _finished(runs) if RunTags.of(other).trial_run in ids]
    # All of some finals have the epochs that `finals --epochs` says, which need not be the trials'.
    for length in (_epochs(run), *(_epochs(control) for control in controls[:1])):
        if alike := [other for other in finals if _epochs(other) == length]:
            return max(alike, key=lambda o: (_folds(o) == _folds(run), o.data.metrics[study.objective])).info.run_id
    if trained:
        return trained[0].info.run_id
    if any(RunTags.of(control).state is State.FAILED for control in controls):
        return None
    raise UserError(
        study.name,
        "has no finished control to compare with, and there is no champion",
        "`study NAME` resumes one that did not finish; where it was deleted in MLflow, restore it, or "
        f"`finals {study.name}` trains it anew",
    )


def num_competing(tracker: MlflowTracker, run_id: str, opponent: str | None) -> int:
    """How many models a trial is the best of: its study's finished and feasible trials, but for the opponent.

    1 of any other run: the seeds of finals are compared by their mean, and the best of them with the control's best.
    """
    run = tracker.client.get_run(run_id)
    study = queries.study_of(tracker, run)
    if study is None or RunTags.of(run).role != "trial":
        return 1
    finished = _finished(queries.children(tracker, study, "trial"))
    competing = {trial.info.run_id for trial in finished if not study.broken_by(trial)}
    return len((competing | {run_id}) - {opponent})


def seed_scores(tracker: MlflowTracker, run_id: str, objective: str) -> list[float]:
    """Scores of the study's finished trainings that differ from this run's recipe by their seed at most; none of folds.

    Scores of folds are of different images, whose chance the gate counts already.
    Of an ensemble they are those of its first member, which spread more than ensembles would, and of a narrower network
    those of the run that it was made of, which were trained alike.
    """
    run = tracker.client.get_run(run_id)
    while source := _made_of(tracker, run):
        run = source
    study = queries.study_of(tracker, run)
    if study is None:
        return []
    by_seed = {
        other.data.params.get("training.seed"): other.data.metrics[objective]
        for other in _finished(queries.children(tracker, study))
        if RunTags.of(other).role in TRAINED_ROLES
        and _without_seed(other.data.params) == _without_seed(run.data.params)
        and _folds(other) == "0"
        and objective in other.data.metrics
    }
    return list(by_seed.values())


def _made_of(tracker: MlflowTracker, run: StoredRun) -> StoredRun | None:
    """The run whose network was made narrower, or an ensemble's first member, if it is still there."""
    tags = RunTags.of(run)
    sources = [*([tags.compresses] if tags.compresses else []), *(tags.members or ())]
    return tracker.store.run(sources[0]) if sources else None


def _without_seed(params: Mapping[str, str]) -> dict[str, str]:
    """What two seeds of a recipe share; a run that is older than a field has what the field adds nothing to."""
    return {
        name: value
        for name, value in params.items()
        if name not in ("training.seed", "data.dataset") and value != str(LATER.get(name))
    }


def _epochs(run: StoredRun) -> str | None:
    return run.data.params.get("training.epochs")


def _folds(run: StoredRun) -> str:
    """Scores of folds are of other images, and of trainings on fewer."""
    return run.data.params.get("data.folds", str(LATER["data.folds"]))


def _trials(runs: Iterable[StoredRun]) -> list[StoredRun]:
    return [run for run in runs if RunTags.of(run).role == "trial"]


def _finished(runs: Iterable[StoredRun]) -> list[StoredRun]:
    return [run for run in runs if RunTags.of(run).state is State.FINISHED]
