"""All that this project uses of Optuna without its promise to keep it; tests/search/test_optuna_internals.py watches it.

Optuna's public interface has no claim of a waiting trial, no write of several values in one transaction and no call that
can be repeated safely. The private parts that give them are named here and nowhere else.
"""

import datetime
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, check_distribution_compatibility, distribution_to_json
from optuna.samplers import BaseSampler, GridSampler
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

optuna.logging.set_verbosity(optuna.logging.ERROR)


def trial_id(trial: FrozenTrial | optuna.Trial) -> int:
    """A trial's id in its storage, which is not its number in the study."""
    return trial._trial_id


def study_id(study: optuna.Study) -> int:
    """A study's id in its storage."""
    return study._study_id


def storage_of(study: optuna.Study) -> BaseStorage:
    """The storage as the study uses it: a cache in front of a database."""
    return study._storage


def stored_trial(study: optuna.Study, trial: FrozenTrial | optuna.Trial) -> FrozenTrial:
    """A trial as the storage has it now."""
    return study._storage.get_trial(trial._trial_id)


def fail_trial(study: optuna.Study, trial: FrozenTrial) -> None:
    """End a trial of another process as failed; UpdateFinishedTrialError where it has ended."""
    study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def claimed_trial(study: optuna.Study, trial_id: int) -> optuna.Trial:
    """A trial that is RUNNING and ours, as `study.ask` would give it.

    As there, the trials are read anew: the sampler has to see all results up to now, and this trial among them. As in
    `study.optimize`, the sampler may stop the study.
    """
    allow_stop(study)
    study._thread_local.cached_all_trials = None
    study.get_trials(deepcopy=False)
    return optuna.Trial(study, trial_id)


def allow_stop(study: optuna.Study) -> None:
    """Let this thread's samplers call `study.stop`, as a grid does that was tried completely; else it raises."""
    study._thread_local.in_optimize_loop = True


def was_stopped(study: optuna.Study) -> bool:
    """Whether `study.stop` was called."""
    return study._stop_flag


def num_cells(sampler: GridSampler) -> int:
    """Of a grid."""
    return len(sampler._all_grids)


def reseed(sampler: BaseSampler, seed: int) -> None:
    """As `sampler.reseed_rng()`, where that draws from the system; here the seed that it had and this one decide."""
    states = list(_random_states(sampler))
    own = [int(state.rng.randint(2**31)) if state._rng is not None else 0 for state in states]
    sampler.reseed_rng()
    for state, former in zip(states, own, strict=True):
        state.rng.seed((seed + former) % 2**32)


def _random_states(sampler: BaseSampler) -> Iterator[LazyRandomState]:
    for part in vars(sampler).values():
        if isinstance(part, LazyRandomState):
            yield part
        elif isinstance(part, BaseSampler):
            yield from _random_states(part)


def inherited_attributes(trial: FrozenTrial) -> dict[str, Any]:
    """What sampler and pruner keep at a trial, and parameters that are fixed, for the trial that takes its place.

    Its constraints are measured anew.
    """
    return {name: value for name, value in trial.system_attrs.items() if not name.startswith("constraints:")}


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a value lies in a distribution; also False for a value of a wrong type."""
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (ValueError, TypeError):
        return False


class TrialParam(NamedTuple):
    """A parameter of a trial, to be stored."""

    trial_id: int
    name: str
    value: float  # Optuna's internal representation
    distribution: BaseDistribution


class SqlStorage(RDBStorage):
    """RDBStorage with the operations that workers of one study need; what is private in Optuna has a public name here.

    The cache that Optuna puts in front calls the private methods; they lead to the public ones, which subclasses override.
    """

    def __init__(self, url: str, engine_kwargs: dict[str, Any]):
        self._creation_tokens: set[str] = set()  # of new trials that may be stored already
        super().__init__(url, engine_kwargs)

    def claim(self, trial_id: int, worker: Mapping[str, Any]) -> bool:
        """Make a WAITING trial RUNNING and this worker's, in one transaction; False where another worker was faster.

        Optuna reads the state and then writes it; on SQLite two workers can do so at the same time.
        """
        with self._session() as session:
            now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)  # as Optuna stores times
            changes = {models.TrialModel.state: TrialState.RUNNING, models.TrialModel._datetime_start_utc: now}
            waiting = session.query(models.TrialModel).filter_by(trial_id=trial_id, state=TrialState.WAITING)
            if not waiting.update(changes, synchronize_session=False):
                return False
            self._set_trial_attr_without_commit(
                session, models.TrialUserAttributeModel, trial_id, "worker", dict(worker)
            )
            return True

    def worker_of(self, trial_id: int) -> Mapping[str, Any] | None:
        """The worker that claimed a trial."""
        with self._session() as session:
            owner = session.query(models.TrialUserAttributeModel).filter_by(trial_id=trial_id, key="worker").first()
            return json.loads(owner.value_json) if owner else None

    def released(self, study_id: int) -> list[int]:
        """The ids of the WAITING trials that a worker may claim, the oldest first."""
        with self._session() as session:
            attribute = models.TrialUserAttributeModel
            query = session.query(models.TrialModel.trial_id).join(attribute)
            query = query.filter(models.TrialModel.study_id == study_id, models.TrialModel.state == TrialState.WAITING)
            query = query.filter(attribute.key == "released", attribute.value_json == "true")
            return [trial_id for (trial_id,) in query.order_by(models.TrialModel.trial_id)]

    def state_of(self, trial_id: int) -> TrialState:
        """A trial's state, by one short query."""
        with self._session() as session:
            (state,) = session.query(models.TrialModel.state).filter_by(trial_id=trial_id).one()
            return TrialState(state)

    def write_at_once(self, trial_id: int, params: Sequence[TrialParam], attributes: Mapping[str, Any]) -> None:
        """Store a trial's parameters, each of which it gets once, and user attributes, in one transaction.

        Raises UpdateFinishedTrialError where the trial has ended.
        """
        with self._session() as session:
            trial: Any = models.TrialModel.find_or_raise_by_id(trial_id, session)
            self.check_trial_is_updatable(trial_id, trial.state)
            parameter, attribute = models.TrialParamModel, models.TrialUserAttributeModel
            stored_names = {name for (name,) in session.query(parameter.param_name).filter_by(trial_id=trial_id)}
            session.add_all(
                parameter(
                    trial_id=trial_id,
                    param_name=param.name,
                    param_value=param.value,
                    distribution_json=distribution_to_json(param.distribution),
                )
                for param in params
                if param.name not in stored_names  # by an earlier try, whose reply was lost
            )
            stored = {row.key: row for row in session.query(attribute).filter_by(trial_id=trial_id)}
            for key, value in attributes.items():
                if key in stored:
                    stored[key].value_json = json.dumps(value)
                else:
                    session.add(attribute(trial_id=trial_id, key=key, value_json=json.dumps(value)))

    def create_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        """Store a new trial. A call that is repeated with the same template makes one trial."""
        return super()._create_new_trial(study_id, template_trial)

    def set_param(self, param: TrialParam, previous_distribution: BaseDistribution | None) -> None:
        """Store a parameter; ValueError where its distribution doesn't fit the one of earlier trials."""
        super()._set_trial_param(*param, previous_distribution)

    def read_trials(
        self, study_id: int, states: Any, included_trial_ids: set[int], trial_id_greater_than: int
    ) -> list[FrozenTrial]:
        """The trials of these ids, and all with a greater id than `trial_id_greater_than`."""
        return super()._get_trials(study_id, states, included_trial_ids, trial_id_greater_than)

    def best_trial_id(self, study_id: int, direction: StudyDirection) -> int:
        """The id of the trial with the best value; ValueError where there is none."""
        return super()._get_best_trial_id(study_id, direction)

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        if template_trial is not None:
            template_trial.system_attrs["token"] = uuid.uuid4().hex
        return self.create_trial(study_id, template_trial)

    def _get_prepared_new_trial(self, study_id: int, template_trial: FrozenTrial | None, session: Any) -> Any:
        """Called in each try, in the transaction that makes the trial; looks for the one that an earlier try made."""
        if template_trial is None:
            return super()._get_prepared_new_trial(study_id, template_trial, session)
        token = template_trial.system_attrs["token"]
        if token in self._creation_tokens:
            attribute = models.TrialSystemAttributeModel
            row = session.query(attribute).filter_by(key="token", value_json=json.dumps(token)).first()
            if row:
                return models.TrialModel.find_or_raise_by_id(row.trial_id, session)
        self._creation_tokens.add(token)
        return super()._get_prepared_new_trial(study_id, template_trial, session)

    def _set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None,
    ) -> None:
        param = TrialParam(trial_id, param_name, param_value_internal, distribution)
        self.set_param(param, previous_distribution)

    def _get_trials(
        self, study_id: int, states: Any, included_trial_ids: set[int], trial_id_greater_than: int
    ) -> list[FrozenTrial]:
        return self.read_trials(study_id, states, included_trial_ids, trial_id_greater_than)

    def _get_best_trial_id(self, study_id: int, direction: StudyDirection) -> int:
        return self.best_trial_id(study_id, direction)

    def _session(self) -> Any:
        """A transaction: committed at the end of a `with` block, rolled back by an exception."""
        return _create_scoped_session(self.scoped_session)


def check_compatible(param: TrialParam, previous_distribution: BaseDistribution | None) -> None:
    """ValueError where a parameter's distribution doesn't fit the one that earlier trials had."""
    if previous_distribution is not None:
        check_distribution_compatibility(previous_distribution, param.distribution)
