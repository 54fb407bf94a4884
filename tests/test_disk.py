"""Files are replaced whole or not at all."""

import hashlib
from pathlib import Path

import pytest

from pipeline.disk import UNFINISHED, is_new, replacing, sha256_of


def test_a_file_is_replaced_at_the_end_of_the_body(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    for content in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with replacing(path) as new:
            new.write_text(content)
            assert [each.name for each in path.parent.glob(UNFINISHED)] == [new.name]
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == content and list(path.parent.iterdir()) == [path]


def test_after_an_error_the_old_file_stands_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as new:
            new.write_text("hal")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        write()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_digest_is_that_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert sha256_of(path) == sha256_of(str(path)) == hashlib.sha256(b"content").hexdigest()


def test_new_databases_are_files_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there, other = tmp_path / "there.db", tmp_path / "other.db"
    there.touch()
    assert is_new(None, other) and is_new("sqlite:///other.db", there)
    assert not is_new(None, there) and not is_new("sqlite:///there.db", other)
    assert not is_new("postgresql://host/other.db", other) and not is_new("http://host", other)
