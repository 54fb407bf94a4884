"""What other processes left behind: their journals are sent, their runs closed."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from tracking_stores import KEY, points, run_and_die, runs_of, stored, trial_tags

from pipeline.cli.exit_codes import exit_code
from pipeline.cli.sync import sync
from pipeline.data.prepare import TrainingData
from pipeline.errors import PartialFailure
from pipeline.processes import this_process
from pipeline.recipe import Recipe
from pipeline.tracking import recovery
from pipeline.tracking.journal import FOLDER, RECORDS, is_busy, journals
from pipeline.tracking.run import MlflowRun
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker, RunRequest


def test_journals_of_dead_processes_are_adopted(
    local_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    finished, open_one = "a" * 32, "b" * 32
    run_and_die(local_tracker.home, small_recipe, digits, finished, 2, State.FINISHED, False)
    run_and_die(local_tracker.home, small_recipe, digits, open_one, 3, None, True)
    assert runs_of(local_tracker, open_one)[0].info.status == "RUNNING"
    with local_tracker.run(RunRequest(name="mine", recipe=small_recipe, data=digits)) as living:
        other = MlflowTracker(local_tracker.home)
        journals_of_others = recovery.other_journals(other)
        assert (sorted(journals_of_others.orphaned), journals_of_others.busy, journals_of_others.other_tracker) == (
            [finished, open_one],
            [living.key],
            {},
        )
        assert recovery.adopt_journals(other) == 2
        assert other.flush(30)
        living.end(State.FINISHED)
    for key, status, state, count in (
        (finished, "FINISHED", "finished", 2),
        (open_one, "KILLED", "interrupted", 3),
    ):
        [stored] = runs_of(other, key)
        assert (stored.info.status, stored.data.tags["state"]) == (status, state)
        assert points(other, stored.info.run_id, "val/accuracy") == [(e, e / 10) for e in range(1, count + 1)]
    (local_tracker.home / FOLDER / ("c" * 32)).mkdir()  # of one that died while it made or removed its journal
    assert recovery.adopt_journals(other) == 0
    assert local_tracker.flush(30) and not list((local_tracker.home / FOLDER).iterdir())


def test_stray_file_among_the_journals_is_left_alone(local_tracker: MlflowTracker) -> None:
    stray = local_tracker.home / FOLDER / ".DS_Store"
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.touch()
    assert not is_busy(stray)
    assert recovery.adopt_journals(local_tracker) == 0
    assert stray.exists()


def test_journal_that_was_empty_when_it_was_listed_is_looked_at_again(
    local_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_and_die(local_tracker.home, small_recipe, digits, KEY, 2, State.FINISHED, False)
    monkeypatch.setattr(recovery, "empty_folders", journals)  # its process wrote it, and died, after the listing
    assert recovery.adopt_journals(local_tracker) == 1
    assert local_tracker.flush(30)
    [stored] = runs_of(local_tracker, KEY)
    assert points(local_tracker, stored.info.run_id, "val/accuracy") == [(1, 0.1), (2, 0.2)]


def test_journals_are_sent_before_runs_are_closed(
    local_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    parent = local_tracker.open_study("left-v1-digits", "?", "val/accuracy", [])
    assert parent.id
    run_and_die(local_tracker.home, small_recipe, digits, KEY, 2, State.FINISHED, False)
    recovery.close_abandoned_runs(local_tracker, local_tracker.store.experiment("left-v1-digits"))
    [stored] = runs_of(local_tracker, KEY)
    assert (stored.info.status, stored.data.tags["state"]) == ("FINISHED", "finished"), "not interrupted"
    parent.end(State.FINISHED)


def test_journal_belongs_to_the_tracker_it_was_made_for(
    local_tracker: MlflowTracker, tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    run_and_die(local_tracker.home, small_recipe, digits, KEY, 1, State.FINISHED, False)
    stranger = MlflowTracker(local_tracker.home, f"sqlite:///{tmp_path / 'other.db'}")
    assert recovery.other_journals(stranger).other_tracker == {KEY: "mlflow.db"}
    assert recovery.adopt_journals(stranger) == 0 and len(journals(local_tracker.home)) == 1
    text = (local_tracker.home / "journal" / KEY / RECORDS).read_text()
    (local_tracker.home / "journal" / KEY / RECORDS).write_text(text.replace('"mlflow.db"', '"http://***@host/x"'))
    assert recovery.other_journals(local_tracker).other_tracker == {KEY: "http://***@host/x"}


def test_sync_sends_reports_rejections_and_can_be_repeated(
    local_tracker: MlflowTracker,
    small_recipe: Recipe,
    digits: TrainingData,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(local_tracker.home.parent)
    run_and_die(local_tracker.home, small_recipe, digits, "a" * 32, 2, State.FINISHED, False)
    run_and_die(local_tracker.home, small_recipe, digits, "b" * 32, 1, None, True)
    [deleted] = runs_of(local_tracker, "b" * 32)
    local_tracker.client.delete_run(deleted.info.run_id)
    with (
        local_tracker.run(RunRequest(name="living", recipe=small_recipe, data=digits)),
        pytest.raises(
            PartialFailure, match=rf"{'b' * 32}: MLflow refuses this run \(it was deleted in MLflow\)"
        ) as caught,
    ):
        sync()
    assert len(caught.value.lines) == 1 and exit_code(caught.value) == 4
    output = capsys.readouterr().out
    assert output == "sent 1 run\n1 run: a running command writes and sends them itself\n"
    [stored] = runs_of(local_tracker, "a" * 32)
    assert stored.info.status == "FINISHED"
    local_tracker.client.restore_run(deleted.info.run_id)
    assert local_tracker.flush(30)
    sync()
    assert capsys.readouterr().out == "sent 1 run\n"
    assert [run.info.run_id for run in runs_of(local_tracker, "b" * 32)] == [deleted.info.run_id]
    sync()
    assert capsys.readouterr().out == "nothing is pending in mlruns/journal\n"


def test_only_abandoned_trials_are_closed(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    parent = sqlite_tracker.open_study("left-v1-digits", "Why?", "val/accuracy", [])
    other = sqlite_tracker.open_study("other-v1-digits", "Why?", "val/accuracy", [])
    elsewhere = MlflowTracker(tmp_path / "elsewhere", sqlite_tracker.uri)  # whose journals are not here
    with ExitStack() as left_open:

        def run(of: MlflowRun, study: str, trial: int, at: MlflowTracker = elsewhere, role: str = "trial") -> MlflowRun:
            tags = RunTags.parse(trial_tags(study, trial) | {"role": role})
            request = RunRequest(name="trial", recipe=small_recipe, data=digits, parent_run=of.id, tags=tags)
            opened = left_open.enter_context(at.run(request))
            at.id_of(opened.key)
            return opened

        dead, pruned = run(parent, "left-v1-digits", 1), run(parent, "left-v1-digits", 2)
        others = [
            run(parent, "left-v1-digits", 3),
            run(parent, "left-v1-digits", 4, at=sqlite_tracker),
            run(parent, "left-v1-digits", 1, role="final"),
            run(other, "other-v1-digits", 1),
            parent,
        ]
        recovery.close_abandoned_trials(
            sqlite_tracker, parent.id, alive={others[0].key}, ended={pruned.key: (State.PRUNED, "too bad")}
        )
        closed = {name: stored(sqlite_tracker, run) for name, run in (("dead", dead), ("pruned", pruned))}
        assert {name: (run.info.status, run.data.tags["state"]) for name, run in closed.items()} == {
            "dead": ("KILLED", "interrupted"),
            "pruned": ("KILLED", "pruned"),
        }
        assert [run.data.tags["reason"] for run in closed.values()] == ["its process is gone", "too bad"]
        for each in others:
            assert stored(sqlite_tracker, each).info.status == "RUNNING"


def test_run_of_a_dead_process_is_ended_without_its_journal(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    parent = sqlite_tracker.open_study("ended-v1-digits", "Why?", "val/accuracy", [])
    tags = trial_tags("ended-v1-digits", 7)
    elsewhere = MlflowTracker(tmp_path / "elsewhere", sqlite_tracker.uri)
    run_tags = RunTags.parse(tags)
    request = RunRequest(name="trial 7", recipe=small_recipe, data=digits, parent_run=parent.id, tags=run_tags)
    with elsewhere.run(request) as run:
        run.log_metrics({"val/accuracy": 0.5}, 1)
        elsewhere.id_of(run.key)
        run.disown()  # as one does whose trial was declared dead
    recovery.end_run(sqlite_tracker, run.key, parent.id, "trial 7", tags, State.FAILED, "it died too often")
    ended = sqlite_tracker.client.get_run(sqlite_tracker.id_of(run.key))
    assert (ended.info.status, ended.data.tags["reason"]) == ("FAILED", "it died too often")
    assert ended.data.metrics["val/accuracy"] == 0.5
    assert recovery.adopt_journals(elsewhere) == 0, "what was left there is another's"
    assert stored(sqlite_tracker, run).data.tags["state"] == "failed"


def test_runs_of_dead_workers_are_closed(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    parent = sqlite_tracker.open_study("gone-v1-digits", "Why?", "val/accuracy", [])
    me = this_process()
    workers = {"alive": me, "gone": me | {"started": 0.0}, "elsewhere": me | {"host": "elsewhere", "started": 0.0}}
    with ExitStack() as left_open:
        runs = {
            name: left_open.enter_context(
                sqlite_tracker.run(
                    RunRequest(
                        name=name,
                        recipe=small_recipe,
                        data=digits,
                        parent_run=parent.id,
                        tags=RunTags.parse({"role": "final", "worker": json.dumps(worker)}),
                    )
                )
            )
            for name, worker in workers.items()
        }
        assert sqlite_tracker.flush(30)
        recovery.close_abandoned_runs(sqlite_tracker, stored(sqlite_tracker, parent).info.experiment_id)
        statuses = {name: stored(sqlite_tracker, run).info.status for name, run in runs.items()}
        assert statuses == {"alive": "RUNNING", "gone": "KILLED", "elsewhere": "RUNNING"}
        assert stored(sqlite_tracker, parent).info.status == "RUNNING", "its process is this one"
        assert stored(sqlite_tracker, runs["gone"]).data.tags["reason"] == "its process is gone"


def test_run_that_was_closed_while_its_process_lived_ends_without_that_reason(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with sqlite_tracker.run(RunRequest(name="slow", recipe=small_recipe, data=digits)) as run:
        assert sqlite_tracker.flush(30)
        recovery.close_run(sqlite_tracker, stored(sqlite_tracker, run))
        run.end(State.FINISHED)
    assert sqlite_tracker.flush(30)
    tags = stored(sqlite_tracker, run).data.tags
    assert (tags["state"], tags.get("reason")) == ("finished", None)
