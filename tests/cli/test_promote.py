"""The command `promote`, and `history` and `rollback` after it."""

from pathlib import Path

import pytest
from conftest import Trained, run_forked, run_pipeline

from cli.helpers import assert_refused
from pipeline.registry.promote import promotion_lock
from pipeline.tracking.models import find_model


def test_promote_history_and_rollback_of_the_first_champion(trained: Trained, tmp_path: Path) -> None:
    trained.copy(tmp_path / "mlruns")
    elsewhere = {"MLFLOW_REGISTRY_URI": "sqlite:///other.db", "MLFLOW_RUN_ID": "0" * 32}  # of this command alone
    done = run_pipeline("promote", "tiny", "--rules", "alpha=0.4", cwd=tmp_path, **elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ignored in the environment: MLFLOW_REGISTRY_URI, MLFLOW_RUN_ID; only options choose" in done.stderr
    assert not (tmp_path / "other.db").exists()
    with find_model(tmp_path / "mlruns", None, None) as model:  # what predict takes
        assert model.label.startswith("the champion, image-classifier version 1")
    said = " ".join(done.stdout.split())
    assert f"its best trial, run {trained.finished}; one seed can't tell the best from the lucky" in said
    assert "against the constant answer, on the test split" in said and "at most 0.4" in said
    assert f"champion: image-classifier version 1, run {trained.finished}" in said
    again = run_forked("promote", "--run", trained.finished, cwd=tmp_path)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    shown = run_forked("history", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    kinds = [line.split("  ")[1].strip() for line in shown.stdout.splitlines()[:-1]]
    assert kinds == ["test evaluation", "passed", "begun", "promoted"]
    assert shown.stdout.splitlines()[-1].endswith("models that were evaluated on a test split: 1")
    with promotion_lock(tmp_path / "mlruns"):
        back = run_forked("rollback", "--reason", "why not", cwd=tmp_path)
    assert back.returncode == 2
    assert back.stderr.startswith("error: image-classifier") and "there is nothing to go back to" in back.stderr


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["promote"], ["NAME or RUN: needs exactly one; `python -m pipeline promote NAME` takes a study's model"]),
        (["promote", "a", "--run", "b"], ["NAME or RUN: needs exactly one"]),
        (["promote", "--run", "b"], ["`--run b`: not a run's id"]),
        (["promote", "a", "--force"], ["`--force` and `--reason TEXT`: go together"]),
        (["promote", "a", "--rules", "alpha=2 x=1"], ["should be NAME=VALUE", "alpha"]),
        (["promote", "attention"], ["no runs yet in mlruns"]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
