"""A study run by its workers: one in this process, or several of a pool."""

import contextlib
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace

import optuna
import torch
from optuna.trial import TrialState

from pipeline.data import cache
from pipeline.processes import StopOnSignal, this_process
from pipeline.search.budget import Allowance, BudgetPlan
from pipeline.search.forecast import Forecast, actual, forecast, size_mib
from pipeline.search.progress import study_progress
from pipeline.search.requeue import reconcile, release_trials
from pipeline.search.stored_study import num_finished, open_study, resolved
from pipeline.search.study_attributes import Choice, StudyAttributes
from pipeline.search.study_lock import StudyLock
from pipeline.search.supervisor import Supervisor
from pipeline.search.trial import StudyContext, StudyInterrupted, claim_trial, run_trial
from pipeline.search.worker import Assignment, packed
from pipeline.search.worker_pool import WorkerPool
from pipeline.tracking import recovery
from pipeline.tracking.tracker import MlflowRun, State


def run_study(
    context: StudyContext,
    pool: WorkerPool | None = None,
    choice: Choice | None = None,
    with_forecast: bool = False,
    plan: BudgetPlan | None = None,
) -> optuna.Study:
    """Run or resume a study until its trials are done, its time is up, or the user stops it (StudyInterrupted).

    Without a `pool` all trials run in this process. `choice` is stored with the study for later commands that resume it.
    `with_forecast` stores the forecast for the remaining trials before the first of them, and afterwards what they took.
    With a `plan` the number of trials follows from the time that is left, see `Allowance`. Raises UserError where the stored
    study asks another question.
    """
    context = replace(context, search=resolved(context.search, context.data, context.storage))
    key = context.search.key(context.data)
    with (
        StopOnSignal() as stop,
        StudyLock(context.storage, context.home, key) as lock,
    ):
        study = open_study(context.search, context.data, context.storage, context.home)
        parent = _open_parent_run(study, context, choice)
        assert parent.id is not None
        context = replace(context, parent_run=parent.id, stop_requested=lambda: stop.requested)
        state = State.FAILED
        try:
            # The key is another one where the former run was deleted in MLflow.
            StudyAttributes.update(study, mlflow_run_id=parent.id, run_key=parent.key)
            reconcile(study, context.tracker, parent.id)
            with contextlib.ExitStack() as stack:
                if with_forecast:
                    found = plan.forecast if plan else _forecast(study, context, choice)
                    stack.enter_context(_forecast_and_actual(study, context, found))
                allowance = Allowance(context.search, study, plan)
                if pool:
                    _supervisor(study, context, pool, stop, lock, allowance).run()
                else:
                    _run_trials(study, context, lock, allowance)
            parent.log_metrics(_study_metrics(study), step=num_finished(study))
            state = State.FINISHED
        except (StudyInterrupted, KeyboardInterrupt):
            state = State.INTERRUPTED
            raise StudyInterrupted from None
        finally:
            parent.end(state)
            recovery.adopt_journals(context.tracker)  # of workers that died
    return study


def _open_parent_run(study: optuna.Study, context: StudyContext, choice: Choice | None) -> MlflowRun:
    """The study's run in MLflow. Its key is stored before the run is made, so that a killed command finds it again."""
    StudyAttributes.update(
        study,
        run_key=StudyAttributes.of(study).run_key or uuid.uuid4().hex,
        choice=choice or StudyAttributes.of(study).choice,
    )
    stored = StudyAttributes.of(study)
    return context.tracker.open_study(
        study.study_name,
        context.search.study.question,
        context.search.study.objective,
        context.search.fields,
        stored.mlflow_run_id,
        stored.run_key,
        stored.places or [],
        context.search.study.constraints,
        context.search.trials,
    )


def _supervisor(
    study: optuna.Study,
    context: StudyContext,
    pool: WorkerPool,
    stop: StopOnSignal,
    lock: StudyLock,
    allowance: Allowance,
) -> Supervisor:
    search = packed(context.search)

    def assign(launch: int) -> Assignment:
        return Assignment(
            search=search,
            storage=context.storage.url,
            tracking_uri=context.tracker.uri,
            home=context.home,
            data_dir=pool.data_dir,
            parent_run=context.parent_run,
            launch=launch,
            limits=pool.limits,
        )

    return Supervisor(context, study, pool, assign, stop, lock, allowance)


def _forecast(study: optuna.Study, context: StudyContext, choice: Choice | None) -> Forecast | None:
    choice = choice or Choice(context.search.base.training.execution, 1)
    return forecast(context.search, context.data, context.device, study, choice, context.check_stop)


@contextlib.contextmanager
def _forecast_and_actual(study: optuna.Study, context: StudyContext, planned: Forecast | None) -> Iterator[None]:
    """Store the forecast, and after the block what the trials in it took."""
    StudyAttributes.update(study, actual=None, forecast=asdict(planned) if planned else None)
    if not planned:
        yield
        return
    context.observer.planned(asdict(planned))
    torch.cuda.empty_cache()  # what the forecast took of a GPU is for the workers; does nothing where no GPU is in use
    num_before = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
    start, size = time.monotonic(), size_mib(context.home)
    yield
    taken = actual(study, num_before, time.monotonic() - start, size_mib(context.home) - size)
    StudyAttributes.update(study, actual=asdict(taken))


def _run_trials(study: optuna.Study, context: StudyContext, lock: StudyLock, allowance: Allowance) -> None:
    """The loop of the only worker: it releases one trial at a time, to itself."""
    worker = this_process() | {"id": uuid.uuid4().hex}
    context.storage.while_waiting = context.check_stop
    while True:
        trials, finished = study.get_trials(deepcopy=False), num_finished(study)
        remaining = allowance.remaining(trials, finished)
        context.observer.study_progress(study_progress(study, finished, allowance.total(trials, finished)))
        if not remaining:
            break
        context.check_stop()
        lock.check()
        release_trials(study, context.search, trials, 1, remaining)
        if trial := claim_trial(study, context.storage, worker):
            with cache.reading(context.check_stop):
                run_trial(trial, context)


def _study_metrics(study: optuna.Study) -> dict[str, float]:
    """Metrics of the study itself, for its parent run."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    metrics = {
        f"study/{state.name.lower()}": float(states.count(state))
        for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    }
    best = study_progress(study, 0).best
    return metrics | ({"study/best": best[1]} if best else {})
