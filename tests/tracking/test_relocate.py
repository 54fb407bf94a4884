"""A folder mlruns that was moved is refused by every command, and works again after one."""

import re
import shutil
import sqlite3
from pathlib import Path

import pytest
from conftest import Trained
from fork_server import shared_fork_server

from pipeline.cli.relocate import relocate as relocate_command
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.registry.package import Package
from pipeline.tracking import queries
from pipeline.tracking.models import DIGEST_TAG, find_model
from pipeline.tracking.relocate import _COLUMNS, relocate
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker, RunRequest


def cells_with(database: Path, text: str) -> set[tuple[str, str]]:
    """(table, column) of all that holds this text."""
    found = set()
    with sqlite3.connect(database) as connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for _, column, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall():
                query = f"SELECT count(*) FROM {table} WHERE instr(CAST({column} AS TEXT), ?)"
                if connection.execute(query, (text,)).fetchone()[0]:
                    found.add((table, column))
    return found


@pytest.fixture
def old(trained: Trained, packed: Package, tmp_path: Path) -> Path:
    """A home in a folder with an odd name: a study and a champion, which lies among the artifacts as promotion puts it."""
    home = tmp_path / "öld place" / "mlruns"
    home.parent.mkdir()
    trained.copy(home)
    tracker = MlflowTracker(home)
    tracker.client.log_artifacts(trained.finished, str(packed.folder), "model")
    tracker.client.create_registered_model("image-classifier")
    tags = {f"{DIGEST_TAG}{name}": digest for name, digest in packed.sha256.items()}
    version = tracker.client.create_model_version(
        "image-classifier",
        f"{tracker.client.get_run(trained.finished).info.artifact_uri}/model",
        trained.finished,
        tags=tags,
    )
    tracker.client.set_registered_model_alias("image-classifier", "champion", version.version)
    tracker.client.create_experiment("elsewhere", (tmp_path / "kept" / "files").as_uri())
    return home


def moved(old: Path, new: Path) -> Path:
    """As mv does; the database by SQLite, as this process has it open."""
    shutil.copytree(old, new, ignore=shutil.ignore_patterns("*.db*"))
    with sqlite3.connect(old / "mlflow.db") as source, sqlite3.connect(new / "mlflow.db") as target:
        source.backup(target)
    shutil.rmtree(old.parent)
    return new


def test_moved_folder_is_refused_and_nothing_is_written(old: Path, tmp_path: Path) -> None:
    new = moved(old, tmp_path / "mlruns")
    with pytest.raises(UserError) as caught:
        MlflowTracker(new)
    [line] = caught.value.lines
    assert str(new) in line and str(old) in line and "`relocate` writes" in line
    assert not old.exists()


def test_relocated_folder_works_as_before(
    old: Path,
    tmp_path: Path,
    trained: Trained,
    small_recipe: Recipe,
    digits: TrainingData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new = moved(old, tmp_path / "mlruns")
    monkeypatch.chdir(tmp_path)
    relocate_command()
    there = cells_with(new / "mlflow.db", old.parent.as_uri()) | cells_with(new / "mlflow.db", str(old.parent))
    assert not there, "no other column names a place of files"
    tracker = MlflowTracker(new)
    assert queries.read_file(tracker, trained.finished, "recipe.json")
    assert tracker.client.get_run(trained.finished).info.artifact_uri.startswith(f"{new.as_uri()}/")
    with find_model(new, None, None) as model:
        assert model.label.startswith("the champion")
        assert (model.folder / "model.onnx").exists()
    with tracker.run(RunRequest(name="new", recipe=small_recipe, data=digits)) as run:
        run.end(State.FINISHED)
    assert (new / "artifacts" / tracker.id_of(run.key) / "artifacts" / "recipe.json").exists()
    kept = tracker.client.get_experiment_by_name("elsewhere")
    assert kept and kept.artifact_location == (tmp_path / "kept" / "files").as_uri(), "what lies elsewhere stays"
    assert not old.exists()
    assert relocate(new) == {}, "once is enough"


def test_every_column_with_locations_is_known(old: Path) -> None:
    """Of MLflow's tables; a later version may have more."""
    with sqlite3.connect(old / "mlflow.db") as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {
            (table, column)
            for table in tables
            for _, column, *_ in connection.execute(f"PRAGMA table_info({table})")
            if re.search("location|uri|path|^source$", column)
        }
    of_other_things = {
        ("evaluation_dataset_records", "source"),
        ("workspaces", "trace_archival_location"),
        ("mcp_server_versions", "source"),
    }
    assert columns == {*_COLUMNS, *of_other_things}


def test_folder_in_use_is_not_relocated(old: Path, tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> None:
    new = moved(old, tmp_path / "mlruns")
    relocate(new)
    with (
        MlflowTracker(new).run(RunRequest(name="running", recipe=small_recipe, data=digits)) as run,
        pytest.raises(UserError, match="another command is writing runs here"),
    ):
        relocate(new)
    assert run.key


def test_commands_name_relocate(old: Path, tmp_path: Path, trained: Trained) -> None:
    new = moved(old, tmp_path / "mlruns")
    done = shared_fork_server().run(["compare", "tiny"], new.parent)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "was moved here from" in done.stderr and "relocate` writes" in done.stderr
