"""The command `clean-cache`."""

import os
from pathlib import Path

import pytest
from conftest import run_forked, run_pipeline

from cli.helpers import assert_refused


@pytest.mark.parametrize("keep", ["lots", "-1", "nan"])
def test_bad_input_is_refused(keep: str, tmp_path: Path) -> None:
    assert_refused(["clean-cache", "--keep", keep], ["should be a number of GiB, 0 or more"], tmp_path)


def test_those_used_last_are_kept_up_to_the_size(tmp_path: Path) -> None:
    folder = tmp_path / "mlruns" / "cache"
    for age, name in enumerate(("new", "older", "oldest")):
        (folder / name).mkdir(parents=True)
        (folder / name / "images").write_bytes(bytes(2**20))
        os.utime(folder / name, (10**9 - age, 10**9 - age))
    done = run_pipeline("clean-cache", "--keep", "0.0015", cwd=tmp_path)
    assert done.stdout == "2 sets of decoded images removed, 2 MiB; 1 MiB stay in mlruns/cache\n"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["new"]
    assert "1 set of decoded" in run_forked("clean-cache", cwd=tmp_path).stdout
    assert run_forked("clean-cache", cwd=tmp_path).returncode == 0
