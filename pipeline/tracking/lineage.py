"""Where a run comes from: the code's commit and uncommitted difference, and the environment."""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from pipeline.runtime import COMPUTING

PROJECT = Path(__file__).resolve().parents[2]
# A user's own settings (colours, prefixes, other programs) would make a patch that `git apply` refuses.
_DIFF = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/")


@dataclass(frozen=True)
class Code:
    """The project's code: `commit` is `none` outside a git repository."""

    commit: str
    diff: bytes  # what differs from the commit, untracked code included; a patch for `git apply`

    @property
    def dirty(self) -> bool:
        """Whether the code differs from its commit."""
        return bool(self.diff)


@cache
def code() -> Code:
    """The code of this process, read once: an imported module doesn't change with its file."""
    commit = _git("rev-parse", "HEAD").decode().strip()
    if not commit:
        return Code("none", b"")
    diff = _git(*_DIFF, "HEAD")
    new = _git("ls-files", "-z", "--others", "--exclude-standard", "--", "pipeline", "studies")
    for file in filter(None, os.fsdecode(new).split("\0")):
        diff += _git(*_DIFF, "--no-index", "--", os.devnull, file)
    return Code(commit, diff)


def _git(*arguments: str) -> bytes:
    """git's output, or nothing where there is no git or no repository."""
    try:
        # git refuses another user's folder unless it is declared safe; code from this folder is running already.
        command = ["git", "-c", "safe.directory=*", *arguments]
        process = subprocess.run(command, cwd=PROJECT, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return b""
    ok = (0, 1) if "--no-index" in arguments else (0,)  # that form answers 1 where the files differ
    return process.stdout if process.returncode in ok else b""


def same_code(commit: str, diff: bytes) -> bool:
    """Whether the code is the same: commit and difference equal, or no difference and an equal folder `pipeline`."""
    current = code()
    if (commit, diff) == (current.commit, current.diff):
        return commit != "none"
    trees = [_git("rev-parse", "--verify", "--end-of-options", f"{c}:pipeline") for c in (commit, current.commit)]
    return not diff and not current.diff and bool(trees[0]) and trees[0] == trees[1]


def environment() -> str:
    """Python, machine, GPU, variables that change what is computed, and every installed package's version, as text."""
    variables = [f"variable {name}={value}" for name, value in COMPUTING.items()]
    lines = (f"python {sys.version}", platform.platform(), *hardware(), *variables)
    return "\n".join([*(f"# {line}" for line in lines), *_packages()]) + "\n"


@cache
def _packages() -> tuple[str, ...]:
    return tuple(sorted({f"{d.name}=={d.version}" for d in metadata.distributions()}, key=str.lower))


def hardware() -> tuple[str, ...]:
    """One line for the processor, the threads that torch uses, and each GPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0  # of a broken driver, a name is an error
    gpus = [f"gpu {i}: {torch.cuda.get_device_name(i)}" for i in range(count)]
    return (f"cpu: {_processor()}, {torch.get_num_threads()} threads", *gpus)


@cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
