"""The commit and the patch of a run give its code back."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.tracking import lineage

# What people set for their own eyes, and `git apply` can't read.
SETTINGS = """
[user]
  name = Maria
  email = maria@example.org
[color]
  ui = always
[diff]
  noprefix = true
  external = false
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A git with settings of its own, and nothing remembered before or after."""
    (tmp_path / "gitconfig").write_text(SETTINGS)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    lineage.code.cache_clear()
    yield
    lineage.code.cache_clear()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one commit."""
    folder = tmp_path / "project"
    (folder / "studies").mkdir(parents=True)
    (folder / "pipeline").mkdir()
    (folder / ".gitignore").write_text("*.log\n")
    (folder / "README.md").write_text("the project\n")
    (folder / "pipeline" / "loop.py").write_text("".join(f"line {i}\n" for i in range(100)))
    (folder / "pipeline" / "gone.py").write_text("old\n")
    (folder / "pipeline" / "latin.py").write_bytes("# grün\n".encode("latin-1"))
    (folder / "pipeline" / "run.sh").write_text("true\n")
    (folder / "picture.png").write_bytes(bytes(range(256)))
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(lineage, "PROJECT", folder)
    return folder


def git(folder: Path, *arguments: str, stdin: bytes | None = None) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, input=stdin, stdout=subprocess.PIPE)
    return done.stdout.decode().strip()


def tree(folder: Path) -> dict[str, tuple[bytes, bool]]:
    """Every file's content and whether it can be run."""
    files = (file for file in folder.rglob("*") if file.is_file() and ".git" not in file.relative_to(folder).parts)
    return {str(file.relative_to(folder)): (file.read_bytes(), os.access(file, os.X_OK)) for file in files}


def test_clean_code_is_its_commit_without_a_difference(project: Path) -> None:
    assert lineage.code() == lineage.Code(git(project, "rev-parse", "HEAD"), b"")
    assert not lineage.code().dirty


def test_patch_on_a_clean_clone_gives_the_same_code(project: Path, tmp_path: Path) -> None:
    loop = project / "pipeline" / "loop.py"
    loop.write_bytes(loop.read_bytes().replace(b"line 50\n", b"line 50\r\n") + b"no line end")
    (project / "pipeline" / "gone.py").unlink()
    (project / "pipeline" / "latin.py").write_bytes("# grüner\n".encode("latin-1"))
    (project / "pipeline" / "run.sh").chmod(0o755)
    (project / "picture.png").write_bytes(bytes(range(255, -1, -1)))
    (project / "README.md").write_text("staged\n")
    git(project, "add", "README.md")
    (project / "studies" / "löschen und neu.py").write_text("new = True\n")
    (project / "studies" / "empty.py").touch()
    (project / "pipeline" / "new").mkdir()
    (project / "pipeline" / "new" / "weights.bin").write_bytes(bytes(range(256)))

    code = lineage.code()
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(project), str(clone))
    git(clone, "checkout", "--quiet", code.commit)
    assert code.dirty and tree(clone) != tree(project)
    git(clone, "apply", stdin=code.diff)
    assert tree(clone) == tree(project)


def test_code_is_the_same_when_its_folder_is_unchanged(project: Path) -> None:
    first = git(project, "rev-parse", "HEAD")
    assert lineage.same_code(first, b"")
    assert not lineage.same_code(first, b"some difference")
    assert not lineage.same_code("none", b"")

    def commit(file: str, text: str) -> None:
        (project / file).write_text(text)
        git(project, "commit", "--quiet", "--all", "--message", file)
        lineage.code.cache_clear()

    commit("README.md", "more\n")
    assert lineage.same_code(first, b""), "a commit of words changes no run"
    commit("pipeline/loop.py", "other\n")
    assert not lineage.same_code(first, b"")
    assert not lineage.same_code("0" * 40, b""), "a commit that is not here may be anything"


@pytest.mark.parametrize("file", ["pipeline/server.log", "notes.txt", "mlruns/mlflow.db"])
def test_ignored_files_and_other_files_are_no_difference(file: str, project: Path) -> None:
    (project / file).parent.mkdir(exist_ok=True)
    (project / file).write_text("not code\n")
    assert not lineage.code().dirty


def test_the_code_is_read_once_a_process(project: Path) -> None:
    before = lineage.code()
    (project / "pipeline" / "loop.py").write_text("changed while it runs\n")
    assert lineage.code() == before


def test_commit_is_none_without_repository_commit_or_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "unpacked"
    (folder / "pipeline").mkdir(parents=True)
    (folder / "pipeline" / "loop.py").write_text("pass\n")
    monkeypatch.setattr(lineage, "PROJECT", folder)
    nothing = lineage.Code("none", b"")
    assert lineage.code() == nothing
    git(folder, "init", "--quiet")
    lineage.code.cache_clear()
    assert lineage.code() == nothing
    monkeypatch.setenv("PATH", str(folder))
    lineage.code.cache_clear()
    assert lineage.code() == nothing


def test_environment_lists_python_machine_and_versions() -> None:
    lines = lineage.environment().splitlines()
    assert lines[0] == "# python " + sys.version.splitlines()[0]
    assert f"torch=={version('torch')}" in lines
    assert f"mlflow=={version('mlflow')}" in lines
    packages = [line for line in lines if not line.startswith("#")]
    assert packages == sorted(set(packages), key=str.lower)
    assert [line for line in lines if line.startswith("# cpu: ") and line.endswith(" threads")]
