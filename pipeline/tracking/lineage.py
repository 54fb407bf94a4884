"""Where a run comes from: the code's commit and uncommitted difference, and the environment."""

import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Code:
    """The project's code: `commit` is `none` outside a git repository."""

    commit: str
    diff: str  # what differs from the commit, untracked code included; a patch for `git apply`

    @property
    def dirty(self) -> bool:
        """Whether the code differs from its commit."""
        return bool(self.diff)


@cache
def code() -> Code:
    """Read once a process: a module that is already imported doesn't change with its file."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return Code("none", "")
    diff = _git("diff", "--binary", "HEAD")
    for file in _git("ls-files", "--others", "--exclude-standard", "--", "pipeline", "studies").splitlines():
        diff += _git("diff", "--binary", "--no-index", "--", "/dev/null", file)
    return Code(commit.strip(), diff)


def _git(*arguments: str) -> str:
    """git's output, or nothing where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    ok = (0, 1) if "--no-index" in arguments else (0,)  # that form answers 1 where the files differ
    return done.stdout.decode(errors="replace") if done.returncode in ok else ""


@cache
def environment() -> str:
    """Python, machine, GPU and every installed package's version, as text."""
    packages = sorted({f"{d.name}=={d.version}" for d in metadata.distributions()}, key=str.lower)
    return (
        "\n".join([f"# {line}" for line in (f"python {sys.version}", platform.platform(), *hardware())] + packages)
        + "\n"
    )


@cache
def hardware() -> tuple[str, ...]:
    """One line for the processor, the threads that torch uses, and each GPU."""
    import torch

    gpus = [f"gpu {i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return (f"cpu: {_processor()}, {torch.get_num_threads()} threads", *gpus)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
