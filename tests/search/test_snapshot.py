"""A stored study as values without types of Optuna."""

import json
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.trial import TrialState, create_trial

from pipeline.search.snapshot import study_snapshots
from pipeline.search.storage import open_storage
from pipeline.tracking.tags import State


def test_snapshot_has_states_scores_and_attributes(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    study = optuna.create_study(storage=storage, study_name="a-v1-digits", direction="maximize")
    fingerprint = {"objective": "val/accuracy", "data": "d", "split": "s"}
    study.set_user_attr("fingerprint", json.dumps(fingerprint))
    study.set_user_attr("mlflow_run_id", "r")
    optuna.create_study(storage=storage, study_name="of another program")
    study.add_trial(create_trial(value=0.5, user_attrs={"run_key": "k", "epochs": 3}))
    for state in (TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING):
        study.add_trial(create_trial(state=state))

    (snapshot,) = study_snapshots(storage, tmp_path)
    assert (snapshot.name, snapshot.run_id, snapshot.run_key, snapshot.is_live) == ("a-v1-digits", "r", "", False)
    assert (snapshot.objective, snapshot.data_digest, snapshot.split_digest) == ("val/accuracy", "d", "s")
    assert [trial.state for trial in snapshot.trials] == [State.FINISHED, State.PRUNED, State.FAILED, None, None]
    assert [trial.is_running for trial in snapshot.trials] == [False, False, False, True, False]
    assert [trial.number for trial in snapshot.counted] == [0, 1, 2]
    first = snapshot.trials[0]
    assert (first.run_key, first.score, first.attributes.epochs) == ("k", 0.5, 3)
    with FileLock(tmp_path / "a-v1-digits.lock"):
        assert study_snapshots(storage, tmp_path)[0].is_live
    assert study_snapshots(None, tmp_path) == []
