"""The command `sync`; what it sends is tested in tests/tracking/test_recovery.py."""

from pathlib import Path

from conftest import run_pipeline


def test_sync_without_journals_has_nothing_to_do(tmp_path: Path) -> None:
    done = run_pipeline("sync", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "nothing is pending in mlruns/journal\n")
    assert not list(tmp_path.iterdir())
