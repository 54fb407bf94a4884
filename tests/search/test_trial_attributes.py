"""What is kept at a trial is read back as it was written."""

import optuna
from optuna.trial import create_trial

from pipeline.search.trial_attributes import Beat, Progress, TrialAttributes, update_attributes


def test_attributes_are_read_back_as_they_were_written() -> None:
    study = optuna.create_study()
    trial = study.ask()
    beat = Beat(count=3, progress=Progress(2, 1, 4, 5.0), measured_epoch=1, metrics={"val/accuracy": 0.5})
    update_attributes(study, trial, heartbeat=beat, notes=("a", "b"), worker={"id": "w"}, epochs=2)
    expected = TrialAttributes(heartbeat=beat, notes=("a", "b"), worker={"id": "w"}, epochs=2)
    assert TrialAttributes.of(trial) == TrialAttributes.of(study.trials[0]) == expected
    update_attributes(study, study.trials[0], requeued=True)
    assert TrialAttributes.of(study.trials[0]).requeued
    assert expected.worker_id == "w" and TrialAttributes().worker_id is None


def test_only_what_differs_from_the_defaults_is_stored() -> None:
    attributes = TrialAttributes(control=True, heartbeat=Beat(count=1))
    stored = attributes.to_optuna()
    assert stored.keys() == {"control", "heartbeat"}
    assert TrialAttributes.of(create_trial(value=1.0, user_attrs=stored | {"unknown": 1})) == attributes
