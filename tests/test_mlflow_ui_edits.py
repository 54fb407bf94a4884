"""What people change in MLflow's UI between two commands: each command works and reports what it omits, or names a remedy.

The edits are those of the UI, by MLflow's client; the store, the commands and the trainings are real, only short.
"""

import contextlib
import io
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Trained
from mlflow import MlflowClient
from PIL import Image

from pipeline.cli.main import main
from pipeline.tracking.journal import FOLDER, journals
from pipeline.tracking.tracker import MlflowTracker

pytestmark = pytest.mark.usefixtures("one_drawing_a_figure")
MODEL, NAME = "image-classifier", "attention-v1-digits"
SET = (
    "data.image_size=8 model.widths=[4,8] model.blocks_per_stage=1 model.reduction=4 training.batch_size=16 "
    "augmentation.crop_padding=0 augmentation.mixup=0 augmentation.cutmix=0"
)
LENIENT = ("--rules", "class_margin=100 ece_margin=100 latency_factor=1000 alpha=0.49 seed_spread=0")
STUDY = ("study", "attention", "--dataset", "digits", "--epochs", "1", "--set", SET, "--trials", "3")
MORE = (*STUDY[:-1], "4")
FINALS = ("finals", "attention", "--top", "1", "--seeds", "1", "--epochs", "2")
COMPARE, PREDICT = ("compare", "attention"), ("predict", "picture.png")
PROMOTE = ("promote", "attention", *LENIENT)
ROLLBACK = ("rollback", "--reason", "slower")
HISTORY, EXPORT, SYNC, AUDIT, FIX = ("history",), ("export",), ("sync",), ("audit",), ("audit", "--fix")
ROLES = ("study", "trial", "final")


def call(*arguments: str) -> tuple[int, str]:
    """A command's exit code, and what it prints; in the current folder, in this process."""
    out, root = io.StringIO(), logging.getLogger()
    handlers, argv = root.handlers[:], sys.argv
    root.handlers[:], sys.argv = [], ["pipeline", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main()
    except SystemExit as ended:
        return int(ended.code or 0), out.getvalue()
    finally:
        root.handlers[:], sys.argv = handlers, argv
    raise AssertionError("typer always exits")


@dataclass(frozen=True)
class Store:
    """A study of three trials and its finals; champion is a final of the control, before it the control's trial was."""

    client: MlflowClient
    experiment: str
    study: str  # run ids
    trials: Sequence[str]
    finals: Sequence[str]

    def delete(self, *run_ids: str) -> None:
        for run_id in run_ids:
            self.client.delete_run(run_id)

    def restore(self, *run_ids: str) -> None:
        for run_id in run_ids:
            self.client.restore_run(run_id)


def open_store(home: Path) -> Store:
    client = MlflowTracker(home).client
    (experiment,) = [found.experiment_id for found in client.search_experiments() if found.name == NAME]
    runs = client.search_runs([experiment], order_by=["attributes.start_time ASC"])
    [study], trials, finals = ([r.info.run_id for r in runs if r.data.tags["role"] == role] for role in ROLES)
    return Store(client, experiment, study, trials, finals)


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    home = tmp_path_factory.mktemp("finished") / "mlruns"
    with contextlib.chdir(home.parent):
        for command in (STUDY, FINALS):
            code, output = call(*command)
            assert code == 0, output
        for which in (("--run", open_store(home).trials[0]), ("attention",)):
            code, output = call("promote", *which, *LENIENT)
            assert code == 0, output
    return Trained(home, "", "")


@pytest.fixture
def store(finished_study: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    finished_study.copy(tmp_path / "mlruns")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("picture.png")
    return open_store(tmp_path / "mlruns")


def expect(command: Sequence[str], code: int, *texts: str) -> str:
    """Run a command that ends with this exit code and prints these texts, and never a traceback; its output."""
    exit_code, output = call(*command)
    line = " ".join(output.split())
    assert "Traceback" not in output, output
    assert exit_code == code, output
    for text in texts:
        assert text in line, f"{text!r} is not in:\n{output}"
    return line


# Edit -> how it is made, and then command after command: its exit code, and what its output contains.
Step = tuple[Sequence[str], int, *tuple[str, ...]]
EDITS: dict[str, tuple[Callable[[Store], Any], list[Step]]] = {
    "a trial is deleted": (
        lambda s: s.delete(s.trials[1]),
        [(AUDIT, 0, f"omitted, deleted in MLflow: trial 1 of {NAME}; restore it in MLflow"),
         (STUDY, 0, "omitted, deleted in MLflow: trial 1;", "best 2 of 3 trials"),
         (COMPARE, 0, "omitted, deleted in MLflow: trial 1;", "best 2 of 2 trials"),
         (PROMOTE, 0, "omitted, deleted in MLflow: trial 1;", "nothing to do"),
         (MORE, 0, "best 3 of 4 trials"),
         (FIX, 0, "nothing found")],
    ),
    "the control is deleted": (
        lambda s: s.delete(s.trials[0]),
        [(FINALS, 0, "omitted, deleted in MLflow: trial 0 (control);", "1 candidate and the control", "winner: "),
         (PREDICT, 0, "the champion, image-classifier version 2"), (ROLLBACK, 0, "version 1"), (PREDICT, 0, "version 1"),
         (AUDIT, 0, "nothing found")],
    ),
    "all trials are deleted": (
        lambda s: s.delete(*s.trials),
        [(STUDY, 0, "trial 0 (control), trial 1, trial 2; restore them in MLflow"),
         (FINALS, 2, "omitted, deleted", "no finished trial yet"),
         (COMPARE, 0, "omitted, deleted", "no trial finished"), (AUDIT, 0, "trials 0, 1, 2 of")],
    ),
    "a final is deleted": (
        lambda s: s.delete(s.finals[0]),
        [(PROMOTE, 2, "1 of the runs that decided them are gone, deleted in MLflow", f"pipeline finals {NAME}`"),
         (COMPARE, 0, "omitted, deleted in MLflow: final of trial 0 (control), seed 1;"),
         (EXPORT, 0, "image-classifier version 2"),
         (FINALS, 0, "finals` trains a final again", "1 of them done", "winner: "),
         (AUDIT, 0, "nothing found"), (COMPARE, 0, "Finals: the winner is")],
    ),
    "a final is deleted and restored": (
        lambda s: (s.delete(s.finals[0]), s.client.restore_run(s.finals[0])),
        [(FINALS, 0, "2 of them done"), (PROMOTE, 0, "nothing to do"), (AUDIT, 0, "nothing found")],
    ),
    "the study's own run is deleted": (
        lambda s: s.delete(s.study),
        [(COMPARE, 2, f"study {NAME}: was deleted in MLflow; restore it in MLflow", "study attention` resumes what remains"),
         (FINALS, 2, "was deleted in MLflow"), (PROMOTE, 2, "was deleted in MLflow"),
         (AUDIT, 0, f"{NAME}: was deleted in MLflow"),
         (STUDY, 0, " replaces it", "adopts 5 runs of one that was deleted", "best 3 of 3 trials"),
         (AUDIT, 0, "nothing found"), (COMPARE, 0, "best 3 of 3 trials"), (FINALS, 0, "2 of them done", "winner: "),
         (PROMOTE, 0, "nothing to do")],
    ),
    "the study is deleted with all its runs, and these are restored": (
        lambda s: s.delete(s.study, *s.trials, *s.finals),
        [(STUDY, 0, "omitted, deleted in MLflow: ", "best 0 of 3 trials"), (AUDIT, 0, "trials 0, 1, 2 of")],
    ),
    "the study is deleted, then its trials' runs too, which are restored": (
        lambda s: (s.delete(s.study, *s.trials, *s.finals), call(*STUDY), s.restore(*s.trials, *s.finals)),
        [(STUDY, 0, "adopts 5 runs of one that was deleted", "best 3 of 3 trials"), (FINALS, 0, "2 of them done")],
    ),
    "the experiment is deleted": (
        lambda s: s.client.delete_experiment(s.experiment),
        [(STUDY, 2, "was deleted; MLFLOW_TRACKING_URI=sqlite:", "mlflow experiments restore --experiment-id 1"),
         (COMPARE, 2, "was deleted in MLflow", "mlflow experiments restore"), (FINALS, 2, "mlflow experiments restore"),
         (PREDICT, 0, "version 2"), (AUDIT, 0, "was deleted in MLflow", "mlflow experiments restore"), (SYNC, 0,)],
    ),
    "the experiment is renamed": (
        lambda s: s.client.rename_experiment(s.experiment, "mine"),
        [(MORE, 0, "best 4 of 4 trials"), (COMPARE, 0, "best 4 of 4 trials"), (AUDIT, 0, "nothing found")],
    ),
    "the control and the study are renamed": (
        lambda s: (s.client.update_run(s.trials[0], name="mine"), s.client.update_run(s.study, name="ours")),
        [(STUDY, 0), (COMPARE, 0, "0 (control)"), (FINALS, 0, "2 of them done"), (AUDIT, 0, "nothing found")],
    ),
    "the registered model is deleted": (
        lambda s: s.client.delete_registered_model(MODEL),
        [(AUDIT, 1, "version 1, 2 was deleted in MLflow; "),
         (FIX, 0, "version 2, the champion, was deleted in MLflow, or its run for good: the ledger has it as deleted"),
         (HISTORY, 0, "deleted", "no champion"), (ROLLBACK, 2, "has no champion; there is nothing to go back to"),
         (PROMOTE, 5, "which was deleted in MLflow; `--force`"), (PREDICT, 0, "no champion"),
         ((*PROMOTE, "--force", "--reason", "deleted by mistake"), 0, "champion: image-classifier version 1")],
    ),
    "the registered model is renamed": (
        lambda s: s.client.rename_registered_model(MODEL, "other"),
        [(PROMOTE, 2, "is called other in MLflow", "rename it back there, or `--model other`"),
         (ROLLBACK, 2, "is called other"), (HISTORY, 2, "is called other"), (AUDIT, 1)],
    ),
    "the champion's version is deleted": (
        lambda s: s.client.delete_model_version(MODEL, "2"),
        [(PROMOTE, 2, "version 2, the champion, was deleted in MLflow", "rollback --version 1"),
         (AUDIT, 1, "rollback --version 1` with a"), ((*ROLLBACK, "--version", "1"), 0, "version 1"),
         (AUDIT, 0, "nothing found"), (PREDICT, 0, "the champion, image-classifier version 1")],
    ),
    "the former champion's version is deleted": (
        lambda s: s.client.delete_model_version(MODEL, "1"),
        [(ROLLBACK, 2, "version 1, a former champion, was deleted in MLflow", "there is nothing to go back to"),
         (HISTORY, 0, "champion: version 2"), (AUDIT, 0, "nothing found")],
    ),
    "the aliases are deleted": (
        lambda s: [s.client.delete_registered_model_alias(MODEL, alias) for alias in ("champion", "previous")],
        [(PROMOTE, 2, "rollback --version 2"), (HISTORY, 2, "rollback --version 2"),
         ((*ROLLBACK, "--version", "2"), 0, "version 2"), (AUDIT, 0, "nothing found")],
    ),
    "the digests of the champion's files are removed": (
        lambda s: [s.client.delete_model_version_tag(MODEL, "2", tag) for tag in s.client.get_model_version(MODEL, "2").tags],
        [(PREDICT, 3, "has no tags sha256.<file>"), (ROLLBACK, 0, "version 1"), (PREDICT, 0, "version 1")],
    ),
    "a final loses a tag": (
        lambda s: s.client.delete_tag(s.finals[1], "recipe_digest"),
        [(AUDIT, 1, "tags were removed or changed in MLflow: recipe_digest", "delete another run without its tags"),
         (FINALS, 0, "omitted, tags were removed or changed in MLflow", "1 of them done", "winner: ")],
    ),
    "a trial loses its key": (
        lambda s: s.client.delete_tag(s.trials[2], "run_key"),
        [(COMPARE, 0, "best 3 of 3 trials"), (AUDIT, 1, "tags were removed or changed in MLflow: run_key"),
         (FIX, 0, "tags restored: run_key", "nothing found")],
    ),
    "a version is registered by hand": (
        lambda s: s.client.create_model_version(MODEL, f"runs:/{s.trials[1]}/model", s.trials[1]),
        [(HISTORY, 0, "champion: version 2"), (PROMOTE, 0, "nothing to do"), (AUDIT, 0, "nothing found")],
    ),
}  # fmt: skip
for _tag in ("role", "study", "trial", "state", "recipe_digest", "data_digest"):
    EDITS[f"a trial loses its tag {_tag}"] = (
        lambda s, tag=_tag: s.client.delete_tag(s.trials[2], tag),  # type: ignore[misc]
        [(AUDIT, 1, f"tags were removed or changed in MLflow: {_tag}; `", "audit --fix` restores"),
         (COMPARE, 0, "omitted, tags were removed or changed in MLflow: trial 2", "best 2 of 2 trials"),
         (FIX, 0, f"tags restored: {_tag}", "nothing found"), (STUDY, 0, "best 3 of 3 trials")],
    )  # fmt: skip
for _tag, _value in (("role", ""), ("study", ""), ("objective", ""), ("objective", "loss")):
    EDITS[f"the study's {_tag} becomes {_value or 'nothing'}"] = (
        lambda s, tag=_tag, value=_value: (  # type: ignore[misc]
            s.client.set_tag(s.study, tag, value) if value else s.client.delete_tag(s.study, tag)
        ),
        [(COMPARE, 2, "no study attention in the tracking store", "whose tags were removed"),
         (AUDIT, 1, f"tags were removed or changed in MLflow: {_tag}; `", "audit --fix` restores"),
         (STUDY, 0, "best 3 of 3 trials"), (AUDIT, 0, "nothing found"), (COMPARE, 0, "best 3 of 3 trials")],
    )  # fmt: skip


# The others take a minute and run with `make chaos`.
BY_DEFAULT = {
    *("a trial is deleted", "the control is deleted", "a final is deleted", "the study's own run is deleted"),
    *("the experiment is deleted", "the registered model is deleted", "the champion's version is deleted"),
    *("the aliases are deleted", "a trial loses its tag role", "the study's objective becomes loss"),
}
CASES = [pytest.param(edit, marks=() if edit in BY_DEFAULT else pytest.mark.chaos) for edit in EDITS]


@pytest.mark.parametrize("edit", CASES)
def test_every_command_works_or_names_a_remedy_after_an_edit(edit: str, store: Store) -> None:
    change, steps = EDITS[edit]
    change(store)
    for command, code, *texts in steps:
        expect(command, code, *texts)


def test_deleted_run_is_no_candidate_but_can_be_used(store: Store) -> None:
    store.delete(store.trials[2])
    expect(("promote", "--run", store.trials[2], *LENIENT), 2, "was deleted in MLflow; restore it in MLflow", "or take")
    expect((*PREDICT, "--model", store.trials[2]), 0, "which was deleted in MLflow")
    expect(("reproduce", store.trials[2]), 0, "reproduced bit for bit")


def delete_when_measured(store: Store, monkeypatch: pytest.MonkeyPatch, view: str, query: str) -> None:
    """As soon as a training's first epoch is shown, its run is deleted in MLflow."""
    from pipeline.cli import views_finals, views_study

    shown = getattr(views_study if view == "StudyView" else views_finals, view)
    original = shown.epoch
    deleted: list[str] = []

    def epoch(self: Any, *what: Any) -> None:
        original(self, *what)
        limit = time.monotonic() + 60
        while not deleted and time.monotonic() < limit:
            for run in store.client.search_runs([store.experiment], f"attributes.status = 'RUNNING' and {query}"):
                store.delete(run.info.run_id)
                deleted.append(run.info.run_id)
            time.sleep(0.1)

    monkeypatch.setattr(shown, "epoch", epoch)


def test_trial_deleted_while_it_runs_is_omitted_and_droppable(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    delete_when_measured(store, monkeypatch, "StudyView", "tags.role = 'trial'")
    expect(MORE, 0, "(it was deleted in MLflow)", "sync --drop-deleted", "trial 3;")
    (journal,) = journals(Path("mlruns"))
    expect(AUDIT, 1, f"{journal}: is pending, and its run was deleted in MLflow; restore the run there")
    expect(SYNC, 4, "sent 0 runs", "it was deleted in MLflow", "sync --drop-deleted")
    expect(FIX, 1, "its run was deleted in MLflow")
    expect(FINALS, 0, "2 of them done", "winner: ")
    assert journal.exists(), "nothing is thrown away by itself"
    expect((*SYNC, "--drop-deleted"), 0, "sent 0 runs", "discarded, as they were deleted in MLflow: 1 run")
    assert not list(Path("mlruns", FOLDER).glob("*"))
    expect(AUDIT, 0, "omitted, deleted in MLflow: trial 3", "nothing found")


def test_final_deleted_while_it_runs_is_trained_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.delete(store.finals[1])
    with monkeypatch.context() as patches:
        delete_when_measured(store, patches, "FinalsView", "tags.role = 'final'")
        expect(FINALS, 2, "it was deleted in MLflow before it was complete; the same command trains it again")
    expect(FINALS, 0, "1 of them done", "winner: ")
    deleted = store.client.search_runs([store.experiment], "", run_view_type=2)
    (live,) = [run.info.run_id for run in deleted if run.info.run_id not in store.finals]
    store.client.restore_run(live)
    expect(SYNC, 0, "sent 1 run")
    assert store.client.get_run(live).data.tags["state"] == "finished", "what waited for it was not lost"


def test_study_run_deleted_while_it_runs_is_replaced(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patches:
        delete_when_measured(store, patches, "StudyView", "tags.role = 'study'")
        expect(MORE, 0, "it was deleted in MLflow", "best 4 of 4 trials")
    expect(MORE, 0, " replaces it", "adopts 6 runs of one that was deleted")
    expect((*SYNC, "--drop-deleted"), 0)
    expect(AUDIT, 0, "nothing found")


def test_interrupted_trial_with_deleted_run_starts_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.cli.views_study import StudyView

    def stop(self: Any, *what: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(StudyView, "epoch", stop)
        expect(MORE, 130, "interrupted")
    [run] = store.client.search_runs([store.experiment], "tags.state = 'interrupted' and tags.role = 'trial'")
    store.delete(run.info.run_id)
    expect(MORE, 0, "trial 4: its run was deleted in MLflow; it starts at epoch 1 with a new run", "best 4 of 4 trials")
    expect(AUDIT, 0, "nothing found")


@pytest.mark.chaos
@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_makes_any_command_a_traceback(
    edit: str, store: Store, finished_study: Trained, tmp_path: Path
) -> None:
    EDITS[edit][0](store)
    commands = [STUDY, COMPARE, FINALS, PROMOTE, HISTORY, ROLLBACK, PREDICT, EXPORT, SYNC, AUDIT, FIX]
    for command in [*commands, ("reproduce", store.trials[1]), ("reproduce", store.finals[0])]:
        _, output = call(*command)
        assert "Traceback" not in output, (command, output)
