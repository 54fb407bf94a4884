"""Optuna's private parts that are used are as they were: a new Optuna that changes them fails here first."""

import ast
import inspect
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import RDBStorage, _cached_storage
from optuna.storages._rdb import models, storage
from optuna.trial import FrozenTrial, TrialState

from pipeline.search import optuna_internals
from pipeline.search.optuna_internals import (
    SqlStorage,
    TrialParam,
    claimed_trial,
    contains,
    fail_trial,
    storage_of,
    stored_trial,
    study_id,
    trial_id,
)

SIGNATURES = {
    "_create_new_trial": ["self", "study_id", "template_trial"],
    "_get_prepared_new_trial": ["self", "study_id", "template_trial", "session"],
    "_set_trial_param": [
        *("self", "trial_id", "param_name", "param_value_internal", "distribution", "previous_distribution"),
    ],
    "_get_trials": ["self", "study_id", "states", "included_trial_ids", "trial_id_greater_than"],
    "_get_best_trial_id": ["self", "study_id", "direction"],
    "_set_trial_attr_without_commit": ["self", "session", "model_cls", "trial_id", "key", "value"],
    "check_trial_is_updatable": ["self", "trial_id", "trial_state"],
}
COLUMNS = {
    models.TrialModel: {"trial_id", "study_id", "state", "_datetime_start_utc"},
    models.TrialParamModel: {"trial_id", "param_name", "param_value", "distribution_json"},
    models.TrialUserAttributeModel: {"trial_id", "key", "value_json"},
    models.TrialSystemAttributeModel: {"trial_id", "key", "value_json"},
}


@pytest.mark.parametrize("method", SIGNATURES)
def test_private_methods_have_the_known_signatures(method: str) -> None:
    assert list(inspect.signature(getattr(RDBStorage, method)).parameters) == SIGNATURES[method]


def test_models_have_the_known_columns() -> None:
    for model, names in COLUMNS.items():
        assert all(hasattr(model, name) for name in names), model
    assert list(inspect.signature(models.TrialModel.find_or_raise_by_id).parameters)[:2] == ["trial_id", "session"]
    session = inspect.signature(storage._create_scoped_session).parameters
    assert list(session)[0] == "scoped_session" and all(p.default is not p.empty for p in list(session.values())[1:])


def test_the_cache_calls_the_methods_that_lead_to_ours() -> None:
    """`_CachedStorage` is in front of the database; what it calls of its backend has to be overridden."""
    tree = ast.parse(inspect.getsource(_cached_storage))
    called = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self._backend" and node.attr.startswith("_")
    }
    heartbeat_of_optuna = {"_get_stale_trial_ids"}
    overridden = {name for name in vars(SqlStorage) if name in vars(RDBStorage)}
    assert called - heartbeat_of_optuna <= overridden


def test_claimed_trials_are_optunas_trials(tmp_path: Path) -> None:
    database = SqlStorage(f"sqlite:///{tmp_path / 'optuna.db'}", {})
    study = optuna.create_study(storage=database)
    study.enqueue_trial({"x": 1.0}, user_attrs={"released": True})
    study.enqueue_trial({"x": 2.0})
    [released] = database.released(study_id(study))
    assert database.claim(released, {"id": "a"}) and not database.claim(released, {"id": "b"})
    assert database.worker_of(released) == {"id": "a"}
    trial = claimed_trial(study, released)
    assert (trial.number, trial_id(trial), trial.suggest_float("x", 0, 9)) == (0, released, 1.0)
    assert stored_trial(study, trial).params == {"x": 1.0}
    assert database.state_of(released) is TrialState.RUNNING
    fail_trial(study, stored_trial(study, trial))
    assert study.trials[0].state is TrialState.FAIL
    assert isinstance(storage_of(study), _cached_storage._CachedStorage)


def test_public_methods_are_called_in_place_of_the_private_ones(tmp_path: Path) -> None:
    calls: list[str] = []

    class Recording(SqlStorage):
        def create_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
            calls.append("create_trial")
            return super().create_trial(study_id, template_trial)

        def set_param(self, param: TrialParam, previous: object) -> None:
            calls.append("set_param")
            super().set_param(param, previous)

        def read_trials(self, *arguments: object) -> list[FrozenTrial]:
            calls.append("read_trials")
            return super().read_trials(*arguments)

        def best_trial_id(self, *arguments: object) -> int:
            calls.append("best_trial_id")
            return super().best_trial_id(*arguments)

    study = optuna.create_study(storage=Recording(f"sqlite:///{tmp_path / 'optuna.db'}", {}))
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    study.tell(trial, 1.0)
    assert study.best_value == 1.0
    assert set(calls) == {"create_trial", "set_param", "read_trials", "best_trial_id"}


def test_contains_is_false_for_values_of_a_wrong_type() -> None:
    assert contains(FloatDistribution(0, 1), 0.5) and not contains(FloatDistribution(0, 1), 2)
    assert not contains(FloatDistribution(0, 1), "a")
    assert contains(CategoricalDistribution(["a"]), "a") and not contains(CategoricalDistribution(["a"]), "b")


def test_no_other_module_uses_privates_of_optuna() -> None:
    own = Path(optuna_internals.__file__)
    for file in own.parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())) if file != own else ():
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optuna"):
                assert "._" not in str(node.module), file
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                assert owner in ("self", "os", "super()", "ray", "ray._private") or owner.startswith("self._"), (
                    file,
                    owner,
                )
