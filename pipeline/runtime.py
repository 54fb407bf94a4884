"""What has to be set before torch or MLflow is imported: environment variables, garbage collection, memory.

A command and a worker import this first, because the libraries read some of it while they are imported.
"""

import atexit
import contextlib
import ctypes
import gc
import getpass
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime writes an id into the home folder and reports to its maker
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A read fails after 13 s where the server refuses, and after 2 minutes where it is silent; MLflow's default is 4.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "PGCONNECT_TIMEOUT": "10",  # seconds; PostgreSQL's default is 2 minutes
    # torch's threads wait for each other by spinning, which takes the cores from other programs and from each other: next
    # to two busy processes, two threads trained at under 32 images/s, and at 340 with this (pipeline/benchmarks/README.md).
    # GNU's OpenMP reads it.
    "GOMP_SPINCOUNT": "100000",
}

# MLflow's and Optuna's variables choose stores, experiments, runs, and whether a write is waited for. Here only the options
# of a command do, or the next command, from another shell, would use other stores. So a command ignores these variables,
# except those that say how to reach what was chosen. matplotlib's chooses a window toolkit, and a wrong one is an error.
_IGNORED = re.compile(r"_?MLFLOW_\w*|OPTUNA_\w*|MPLBACKEND")
_OBEYED = re.compile(
    r"MLFLOW_("
    r"TRACKING_(TOKEN|USERNAME|PASSWORD|AUTH|AWS_SIGV4|INSECURE_TLS|SERVER_CERT_PATH|CLIENT_CERT_PATH)"
    r"|(HTTP|S3|GCS|BOTO|KERBEROS|MYSQL_SSL|PYARROW|SQLALCHEMYSTORE)_\w+|ALLOW_HTTP_REDIRECTS"
    r"|\w*MULTIPART_(UP|DOWN)LOAD\w*|ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT|DOWNLOAD_CHUNK_TIMEOUT|SCORING_SERVER_REQUEST_TIMEOUT"
    r"|LOGGING_LEVEL|SYSTEM_METRICS_SAMPL\w+|DISABLE_TELEMETRY|ENABLE_ARTIFACTS_PROGRESS_BAR|SUPPRESS_PRINTING_URL_TO_STDOUT"
    r")"
)
# These change the arithmetic or the kernels, and so the last bits: they are obeyed, reported, and stored with each run.
# Threads and GPUs are stored with a run's hardware.
_COMPUTING = re.compile(
    r"NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|ATEN_CPU_CAPABILITY"
    r"|(ONEDNN|DNNL)_(DEFAULT_FPMATH_MODE|MAX_CPU_ISA)|MKL_(CBWR|ENABLE_INSTRUCTIONS|DEBUG_CPU_TYPE)|OPENBLAS_CORETYPE"
    r"|TORCH_BLAS_PREFER_\w+|DISABLE_ADDMM_CUDA_LT|CUBLAS_WORKSPACE_CONFIG|PYTORCH_TUNABLEOP_\w+"
    r"|PYTORCH_JIT|TORCH_COMPILE_DISABLE|TORCHDYNAMO_(DISABLE|SUPPRESS_ERRORS)|TORCHINDUCTOR_(?!CACHE_DIR)\w+"
)
_THIS_MACHINE = "localhost,127.0.0.1,::1"


def ignore_variables() -> list[str]:
    """Remove the variables that a command ignores from this process's environment and return their names.

    Call it before MLflow is imported.
    """
    ignored = sorted(name for name in os.environ if _IGNORED.fullmatch(name) and not _OBEYED.fullmatch(name))
    for name in ignored:
        del os.environ[name]
    return ignored


def _computing() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if _COMPUTING.fullmatch(name)}


def _bypass_proxies() -> None:
    """Connect to servers on this machine without a proxy: a proxy takes these names for its own machine."""
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if hosts.strip() != "*":  # it means all hosts, but only alone
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{hosts},{_THIS_MACHINE}" if hosts else _THIS_MACHINE


def _ensure_home() -> None:
    """Set a user name and a home where there is none, as in containers, and caches where the home can't be written to.

    MLflow needs the home while it is imported; matplotlib and Triton keep caches there.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = str(os.getuid())
    home = os.path.expanduser("~")
    if os.path.isabs(home) and os.access(home, os.W_OK | os.X_OK):
        return
    folder = _private_folder()
    if not os.path.isabs(home):
        os.environ["HOME"] = folder
    os.environ.setdefault("MPLCONFIGDIR", f"{folder}/matplotlib")
    os.environ.setdefault("TRITON_HOME", folder)


def _private_folder() -> str:
    """A folder of this user alone, the same for all commands; a new one where another user owns that name."""
    folder = Path(tempfile.gettempdir(), f"pipeline-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if status.st_uid == os.getuid() and status.st_mode & 0o40777 == 0o40700:
            return str(folder)
    except OSError:
        pass
    return tempfile.mkdtemp(prefix="pipeline-")


def freeze_imports() -> None:
    """Exempt all existing objects from garbage collection, and collect as usual from then on; before a process trains.

    Collection is needed: figures leave their pixels in reference cycles, 16 MB a trial.
    """
    if not gc.get_freeze_count():
        gc.freeze()
        atexit.register(gc.unfreeze)  # triton's bindings report what isn't freed at exit as leaks, in a page of lines
    gc.set_threshold(*_default_threshold)


# From malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc's malloc reuse the memory of large tensors; False where there is no glibc.

    By default it returns every block above 32 MiB to the system and requests the next one again, a page fault for each
    4 KiB. With the memory kept, `fast` trains 1.4 times as many images per second on a CPU at batch 2,000
    (pipeline/benchmarks/README.md). It can't be undone, and the process stays as large as its largest training until
    the next one begins: `restart_peak_memory`.
    """
    mallopt = _of_malloc("mallopt")
    return bool(mallopt and mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))


def restart_peak_memory() -> None:
    """Let `peak_memory_gib` begin again at what is in use now, on Linux; freed memory that was kept is not in use."""
    if trim := _of_malloc("malloc_trim"):
        trim(0)
    with contextlib.suppress(OSError):  # another system, or a container that doesn't let it
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib() -> float:
    """Most memory of this process since `restart_peak_memory`, GiB; where that is impossible, since its start."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # other systems count in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _of_malloc(name: str) -> Any:
    """A function of glibc's malloc; None where there is no such."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


# Imports create half a million objects that stay. Searching them for garbage again and again took a quarter of the time of
# the imports (pipeline/benchmarks/README.md), so there are fewer full collections until `freeze_imports`.
_default_threshold = gc.get_threshold()
gc.set_threshold(*_default_threshold[:2], 200)

COMPUTING = _computing()  # as the user has set them, because a training sets some itself
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
_bypass_proxies()
_ensure_home()
