"""The command `inspect`."""

import re
from pathlib import Path

from conftest import Trained
from fork_server import shared_fork_server
from report.test_inspection import make_photos

from cli.helpers import assert_refused, write_digits


def test_inspect_prints_counts_and_findings_and_writes_both_files(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    done = shared_fork_server().run(["inspect", "photos"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dog       12    4     3" in done.stdout and "all       25    7     6" in done.stdout
    assert "1 file can't be read" in done.stdout
    assert "python -m pipeline study NAME --dataset photos --corrupt skip" in done.stdout
    reports = tmp_path / "mlruns" / "reports"
    assert sorted(file.name for file in reports.iterdir()) == ["inspect-photos-findings.csv", "inspect-photos.html"]
    assert (reports / "inspect-photos-findings.csv").read_text().count("\n") == 12


def test_inspect_knows_suspects_where_there_are_runs(trained: Trained, tmp_path: Path) -> None:
    page = tmp_path / "d.html"
    done = shared_fork_server().run(["inspect", "digits", "--output", str(page)], trained.home.parent)
    assert done.returncode == 0, done.stderr
    assert re.search(r"the best \d runs?, validation split \(tiny-v1-digits\)", page.read_text())
    assert not (trained.home / "reports").exists()


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    words = ["inspect", "digits", "--test-fraction", "2", "--duplicates", "no", "--output", "x.html"]
    lines = [
        "error: `--test-fraction 2`: should be less than 0.5",
        "error: `--duplicates no`: should be 'drop' or 'keep'",
    ]
    assert_refused(words, lines, tmp_path)
    assert_refused(
        ["inspect", "x.csv", "--columns", "no=x"], ["error: data.columns = no=x: should be path=..."], tmp_path
    )


def test_a_manifest_is_never_replaced(tmp_path: Path) -> None:
    words = ["inspect", "photos.csv", "--test-fraction", "0", "--output"]
    lines = ["error: `--output photos.csv`: should end in .html; name a file, e.g. photos.html"]
    assert_refused([*words, "photos.csv"], lines, tmp_path)
    rows = [f"{file.name},{file.stem[-1]}" for file in write_digits(tmp_path, 22)]
    (tmp_path / "photos.csv").write_text(manifest := "\n".join(["path,label", *rows]))
    done = shared_fork_server().run([*words, "photos.html"], tmp_path)
    assert done.returncode == 0 and (tmp_path / "photos-findings.csv").exists(), done.stderr
    assert (tmp_path / "photos.csv").read_text() == manifest


def test_options_that_would_change_nothing_are_refused(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    refused = shared_fork_server().run(["inspect", "photos", "--columns", "label=x"], tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "error: data.columns = label=x: is for manifests, and photos is a folder; leave it out\n"
    sealed = shared_fork_server().run(["inspect", "photos", "--test-fraction", "0.2"], tmp_path)
    rule = "is for data without test images, and photos has some; leave it out"
    assert (sealed.returncode, sealed.stderr) == (2, f"error: data.test_fraction = 0.2: {rule}\n")
