"""What has to be set before torch or MLflow is imported: environment variables, garbage collection, memory.

A command and a worker import this before anything large, as some of it is read while the libraries are imported.
"""

import atexit
import ctypes
import gc
import getpass
import os
import re
import sys
import tempfile
from pathlib import Path

_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime's, which writes an id into the home and reports to its maker
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A read is given up after 13 s where the server refuses, after 2 minutes where it is silent; MLflow's own patience is 4.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "PGCONNECT_TIMEOUT": "10",  # seconds; PostgreSQL's own is 2 minutes
    # torch's threads wait for each other by spinning, for ever as it seems once another program wants the cores too: beside
    # two busy processes, two threads trained at under 32 images/s, and at 340 with this (one run; studies/README.md).
    # GNU's OpenMP reads it.
    "GOMP_SPINCOUNT": "100000",
}

# MLflow's and Optuna's variables choose stores, experiments, runs, whether a write is waited for: the options of a command
# alone say so, or the next command, from another shell, would look elsewhere. So a command ignores them all, but for those
# that say how what was chosen is reached. matplotlib's chooses windows, of which there are none, and a wrong one is an error.
_CHOOSING = re.compile(r"_?MLFLOW_\w*|OPTUNA_\w*|MPLBACKEND")
_OBEYED = re.compile(
    r"MLFLOW_("
    r"TRACKING_(TOKEN|USERNAME|PASSWORD|AUTH|AWS_SIGV4|INSECURE_TLS|SERVER_CERT_PATH|CLIENT_CERT_PATH)"
    r"|(HTTP|S3|GCS|BOTO|KERBEROS|MYSQL_SSL|PYARROW|SQLALCHEMYSTORE)_\w+|ALLOW_HTTP_REDIRECTS"
    r"|\w*MULTIPART_(UP|DOWN)LOAD\w*|ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT|DOWNLOAD_CHUNK_TIMEOUT|SCORING_SERVER_REQUEST_TIMEOUT"
    r"|LOGGING_LEVEL|SYSTEM_METRICS_SAMPL\w+|DISABLE_TELEMETRY|ENABLE_ARTIFACTS_PROGRESS_BAR|SUPPRESS_PRINTING_URL_TO_STDOUT"
    r")"
)
# Another arithmetic or another kernel, so other bits: obeyed, said, and kept with each run. Threads and GPUs are kept with
# a run's hardware.
_COMPUTING = re.compile(
    r"NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|ATEN_CPU_CAPABILITY"
    r"|(ONEDNN|DNNL)_(DEFAULT_FPMATH_MODE|MAX_CPU_ISA)|MKL_(CBWR|ENABLE_INSTRUCTIONS|DEBUG_CPU_TYPE)|OPENBLAS_CORETYPE"
    r"|TORCH_BLAS_PREFER_\w+|DISABLE_ADDMM_CUDA_LT|CUBLAS_WORKSPACE_CONFIG|PYTORCH_TUNABLEOP_\w+"
    r"|PYTORCH_JIT|TORCH_COMPILE_DISABLE|TORCHDYNAMO_(DISABLE|SUPPRESS_ERRORS)|TORCHINDUCTOR_(?!CACHE_DIR)\w+"
)
_THIS_MACHINE = "localhost,127.0.0.1,::1"


def ignore_variables() -> list[str]:
    """Remove from this process's environment what a command ignores; the names. Before MLflow is imported."""
    ignored = sorted(name for name in os.environ if _CHOOSING.fullmatch(name) and not _OBEYED.fullmatch(name))
    for name in ignored:
        del os.environ[name]
    return ignored


def _computing() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if _COMPUTING.fullmatch(name)}


def _bypass_proxies() -> None:
    """What runs on this machine is reached without a proxy, which means its own machine by these names."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if given.strip() != "*":  # it means all, but only alone
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{given},{_THIS_MACHINE}" if given else _THIS_MACHINE


def _have_a_home() -> None:
    """A name and a home where the user has none, as in containers, and caches where the home can't be written to.

    MLflow asks for the home while it is imported; matplotlib and Triton keep caches there.
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
    """A folder of this user alone, the same for all commands; a new one where another user was there first."""
    folder = Path(tempfile.gettempdir(), f"pipeline-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if found.st_uid == os.getuid() and found.st_mode & 0o40777 == 0o40700:
            return str(folder)
    except OSError:
        pass
    return tempfile.mkdtemp(prefix="pipeline-")


def freeze_imports() -> None:
    """What there is by now stays: garbage is looked for again as ever, but not among it. Before a process trains.

    Pictures leave their pixels in cycles, 16 MB a trial.
    """
    if not gc.get_freeze_count():
        gc.freeze()
        atexit.register(gc.unfreeze)  # what isn't freed at the end triton's bindings call leaks, in a page of lines
    gc.set_threshold(*_usual)


# From malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc's malloc reuse the memory of large tensors; False where there is no glibc.

    By default it returns every block above 32 MiB to the system and gets the next one anew, a page fault for each 4
    KiB. Kept, `fast` trains 1.4 times as many images per second on a CPU at batch 2,000 (studies/README.md). For good,
    and for the whole process, which stays as large as its largest training.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))


# Imports make half a million objects that stay. Looking through all of them for garbage, again and again while they come,
# took a quarter of the time that they take (studies/README.md).
_usual = gc.get_threshold()
gc.set_threshold(*_usual[:2], 200)

COMPUTING = _computing()  # as the user has set them: a training sets some itself
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
_bypass_proxies()
_have_a_home()
