"""A study in Optuna's storage: found by its images, made with its first trials, or resumed."""

import logging
from dataclasses import replace
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from pipeline.data.datasets import SOURCES
from pipeline.data.prepare import TrainingData
from pipeline.evaluation.constraints import violations
from pipeline.experiment import known_before
from pipeline.recipe import Recipe
from pipeline.search.search import Search, check_same
from pipeline.search.starts import not_as_named, starts
from pipeline.search.study_attributes import StudyAttributes
from pipeline.search.trial_attributes import TrialAttributes, counts_toward_budget
from pipeline.tracking.run_data import newest_first
from pipeline.tracking.study_key import StudyKey

log = logging.getLogger(__name__)


def resolved(search: Search, data: TrainingData, storage: RDBStorage) -> Search:
    """The search with the key that its study has in the storage, or will have, and the data set's name in its recipes.

    1. The study of this name and version on the same images, wherever they lay and whatever their folder was called.
    2. A study that ran on this very folder when other images were in it; it is then refused as changed, so that one
       question does not become two unnoticed.
    3. A new study.

    Recipes keep the name that the data set had first: a folder that moved makes no other recipe, and interrupted trials
    can be resumed.
    """
    if search.stored_key:
        return search
    own, typed = StudyKey(search.name, search.version, data.name), search.base.data.dataset
    parsed = [StudyKey.parse(name) for name in optuna.get_all_study_names(storage)]
    keys = [key for key in parsed if key and (key.study, key.version) == (own.study, own.version)]
    stored = {
        str(key): StudyAttributes.parse(storage.get_study_user_attrs(storage.get_study_id_from_name(str(key))))
        for key in keys
    }
    candidates = [name for name in stored if name == str(own)]
    candidates += [name for name, attributes in stored.items() if attributes.fingerprint.get("data") == data.digest]
    candidates += [
        name
        for name, attributes in stored.items()
        if data.place in (_guessed_places(name, own, data) if attributes.places is None else attributes.places)
    ]
    name = [*candidates, str(own)][0]
    if name != str(own):
        log.info("%s: belongs to the study %s", data.source, name)
    elif name not in stored and (others := [str(key) for key in keys if key.bare == own.bare]):
        log.info("%s: a new study %s; others of that name have other images: %s", data.source, name, ", ".join(others))
    dataset = stored[name].dataset if name in stored else None
    settings = {**search.settings, "data.dataset": dataset or typed}
    return replace(search, stored_key=name, settings=settings, dataset_path=typed)


def _guessed_places(name: str, own: StudyKey, data: TrainingData) -> list[str | None]:
    """Those of a study that did not get as far as to store them: a folder of the name in its key.

    A data set of its own, as `digits`, was in no folder.
    """
    was_here = name == str(own.bare) and own.bare.data not in SOURCES
    return [data.place] if was_here else []


def open_study(search: Search, data: TrainingData, storage: RDBStorage, home: Path) -> optuna.Study:
    """The Optuna study of this search, resumed, or made with the control as its first trial.

    Raises UserError where it exists and asks another question.
    """
    search = resolved(search, data, storage)
    key, fingerprint = search.key(data), search.fingerprint(data)
    with FileLock(home / "optuna.lock"):
        study = optuna.create_study(
            storage=storage,
            study_name=key,
            load_if_exists=True,
            direction="maximize",
            pruner=search.pruner(),
        )
        stored = StudyAttributes.of(study)
        if stored.fingerprint:
            check_same(key, stored.fingerprint, fingerprint, search.version)
        if data.listed:
            data.listed.fix(home)
        places = newest_first(stored.places or [], data.place)
        StudyAttributes.update(study, fingerprint=fingerprint, places=places, dataset=search.base.data.dataset)
        _give_first_trials(study, search, data, storage)
    study.sampler = search.sampler(len(study.get_trials(deepcopy=False)))
    return study


def _give_first_trials(study: optuna.Study, search: Search, data: TrainingData, storage: RDBStorage) -> None:
    """Enqueue the control and the starts, where none but the control has begun; those that are there already stay."""
    trials = study.get_trials(deepcopy=False)
    attributes = {trial.number: TrialAttributes.of(trial) for trial in trials}
    if any(trial.state is not TrialState.WAITING and not attributes[trial.number].control for trial in trials):
        return
    if not any(found.control for found in attributes.values()):
        study.enqueue_trial(search.control(), user_attrs=TrialAttributes(control=True).to_optuna())
    bounds = search.study.constraints

    def is_feasible(recipe: Recipe) -> bool:
        return not violations(bounds, known_before(bounds, recipe, data))

    given = starts(search, search.start_from, our_studies(storage), is_feasible)
    new = given[sum(bool(found.start) for found in attributes.values()) :]
    for start in new:
        about = TrialAttributes(start=start.source, short=search.shortens)
        study.enqueue_trial(dict(start.params), user_attrs=about.to_optuna())
    if new:
        log.info("first trials after the control: %s", "; ".join(start.source for start in given))
    for line in not_as_named(search, given) if new or not trials else []:
        log.info("%s", line)


def find_study(search: Search, data: TrainingData, storage: RDBStorage) -> optuna.Study | None:
    """The stored study of this search, if there is one; UserError where it asks another question."""
    key = resolved(search, data, storage).key(data)
    if key not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(study_name=key, storage=storage)
    fingerprint = StudyAttributes.of(study).fingerprint
    if not fingerprint:  # its first start was killed before it asked anything
        return None
    check_same(key, fingerprint, search.fingerprint(data), search.version)
    return study


def our_studies(storage: RDBStorage) -> list[optuna.Study]:
    """Every stored study that this project made."""
    studies = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
    return [study for study in studies if StudyAttributes.of(study).fingerprint]


def num_finished(study: optuna.Study) -> int:
    """How many trials count toward the budget."""
    return sum(counts_toward_budget(trial) for trial in study.get_trials(deepcopy=False))
