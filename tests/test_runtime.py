"""Environment variables, homes, proxies, encodings, garbage collection and memory, as commands set them."""

import contextlib
import http.server
import io
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import mlflow.environment_variables
import pandas as pd
import pytest
import requests

from pipeline import runtime
from pipeline.cli.main import main
from pipeline.errors import UserError, first_line
from pipeline.registry import reproduce
from pipeline.runtime import keep_freed_memory
from pipeline.search import ray_pool
from pipeline.search.local_pool import MODULE
from pipeline.tracking import lineage
from pipeline.tracking.tracker import MlflowTracker

# Of MLflow's own list: a new one of theirs that is not ignored has to be looked at. Those not in their list: at the end.
OBEYED = """
MLFLOW_ALLOW_HTTP_REDIRECTS MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE
MLFLOW_DISABLE_TELEMETRY MLFLOW_DOWNLOAD_CHUNK_TIMEOUT MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR MLFLOW_ENABLE_MULTIPART_DOWNLOAD
MLFLOW_ENABLE_MULTIPART_UPLOAD MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD
MLFLOW_GCS_DOWNLOAD_CHUNK_SIZE MLFLOW_GCS_UPLOAD_CHUNK_SIZE MLFLOW_HTTP_POOL_CONNECTIONS MLFLOW_HTTP_POOL_MAXSIZE
MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR MLFLOW_HTTP_REQUEST_BACKOFF_JITTER MLFLOW_HTTP_REQUEST_MAX_RETRIES
MLFLOW_HTTP_REQUEST_TIMEOUT MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER MLFLOW_HTTP_TCP_KEEPALIVE
MLFLOW_HTTP_TCP_KEEPALIVE_COUNT MLFLOW_HTTP_TCP_KEEPALIVE_IDLE MLFLOW_HTTP_TCP_KEEPALIVE_INTERVAL
MLFLOW_KERBEROS_TICKET_CACHE MLFLOW_KERBEROS_USER MLFLOW_LOGGING_LEVEL MLFLOW_MULTIPART_DOWNLOAD_CHUNK_SIZE
MLFLOW_MULTIPART_DOWNLOAD_MINIMUM_FILE_SIZE MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE
MLFLOW_MYSQL_SSL_CA MLFLOW_MYSQL_SSL_CERT MLFLOW_MYSQL_SSL_KEY MLFLOW_PYARROW_EXTRA_CONF MLFLOW_S3_ENDPOINT_URL
MLFLOW_S3_EXPECTED_BUCKET_OWNER MLFLOW_S3_IGNORE_TLS MLFLOW_S3_UPLOAD_EXTRA_ARGS MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
MLFLOW_SQLALCHEMYSTORE_ECHO MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW MLFLOW_SQLALCHEMYSTORE_POOLCLASS
MLFLOW_SQLALCHEMYSTORE_POOL_RECYCLE MLFLOW_SQLALCHEMYSTORE_POOL_SIZE MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT
MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL MLFLOW_TRACKING_AUTH
MLFLOW_TRACKING_AWS_SIGV4 MLFLOW_TRACKING_CLIENT_CERT_PATH MLFLOW_TRACKING_INSECURE_TLS MLFLOW_TRACKING_PASSWORD
MLFLOW_TRACKING_SERVER_CERT_PATH MLFLOW_TRACKING_TOKEN MLFLOW_TRACKING_USERNAME
"""
OTHERS = {"OPTUNA_STORAGE", "MPLBACKEND", "MLFLOW_BACKEND_STORE_URI", "MLFLOW_DEFAULT_ARTIFACT_ROOT", "MLFLOW_NO_SUCH"}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Whatever the code does to the environment is undone."""
    before = dict(os.environ)
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


def test_every_variable_of_mlflow_is_obeyed_or_ignored(variables: pytest.MonkeyPatch) -> None:
    theirs = {
        value.name
        for value in vars(mlflow.environment_variables).values()
        if isinstance(value, mlflow.environment_variables._EnvironmentVariable)
    }
    assert len(theirs) > 200
    choosing = {name for name in theirs | OTHERS if re.match("_?MLFLOW_|OPTUNA_|MPLBACKEND", name)}
    for name in choosing:
        variables.setenv(name, "1")
    assert set(runtime.ignore_variables()) == choosing - set(OBEYED.split())
    assert choosing & os.environ.keys() == set(OBEYED.split())
    assert runtime.ignore_variables() == []


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        *((name, True) for name in ("NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "ATEN_CPU_CAPABILITY")),
        *((name, True) for name in ("TORCHINDUCTOR_USE_FAST_MATH", "TORCHDYNAMO_DISABLE", "CUBLAS_WORKSPACE_CONFIG")),
        *((name, False) for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCH_HOME", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES")),
    ],
)
def test_variables_of_the_computation_are_stored_with_the_run(
    name: str, counts: bool, variables: pytest.MonkeyPatch
) -> None:
    variables.setenv(name, "x=1")
    stored = runtime._computing()
    assert stored.get(name) == ("x=1" if counts else None)
    variables.setattr(lineage, "COMPUTING", stored)
    assert reproduce._parse_environment(lineage.environment()).get(f"variable {name}") == stored.get(name)


def test_models_are_registered_where_the_runs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For who uses the library, where no command has ignored the variable."""
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{tmp_path}/other.db")
    tracker = MlflowTracker(tmp_path / "mlruns", "http://127.0.0.1:9", connect_now=False)
    assert tracker.client._registry_uri == tracker.uri


WITHOUT_USER = """
import os, pwd
def unknown(uid): raise KeyError(uid)
pwd.getpwuid = unknown
for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"): os.environ.pop(name, None)
import pipeline.runtime
import getpass, matplotlib, mlflow, pathlib
print(pathlib.Path.home(), matplotlib.get_configdir(), getpass.getuser())
"""


def test_libraries_import_without_user_name_and_home(tmp_path: Path) -> None:
    settings = {n: v for n, v in os.environ.items() if n not in ("MPLCONFIGDIR", "XDG_CONFIG_HOME")}
    settings["TMPDIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", WITHOUT_USER], capture_output=True, text=True, env=settings)
    folder = f"{tmp_path}/pipeline-{os.getuid()}"
    assert (done.stdout, done.stderr) == (f"{folder} {folder}/matplotlib {os.getuid()}\n", "")


def test_caches_go_elsewhere_where_home_is_read_only(tmp_path: Path, variables: pytest.MonkeyPatch) -> None:
    variables.setattr("tempfile.tempdir", str(tmp_path))
    variables.setenv("HOME", "/proc/self/nowhere")
    variables.delenv("MPLCONFIGDIR", raising=False)
    runtime._ensure_home()
    assert os.environ["HOME"] == "/proc/self/nowhere"
    folder = tmp_path / f"pipeline-{os.getuid()}"
    assert os.environ["MPLCONFIGDIR"] == f"{folder}/matplotlib"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert runtime._private_folder() == str(folder)
    folder.chmod(0o777)  # as another user would have made it
    assert runtime._private_folder() != str(folder)


def test_unwritable_ray_token_is_a_user_error(variables: pytest.MonkeyPatch) -> None:
    variables.delenv("RAY_AUTH_TOKEN", raising=False)
    variables.setenv("RAY_AUTH_TOKEN_PATH", "/proc/self/nowhere/token")
    with pytest.raises(UserError, match=r"^/proc/self/nowhere/token: .*; set RAY_AUTH_TOKEN_PATH to another file$"):
        ray_pool._make_token()


@pytest.fixture
def handlers() -> Iterator[None]:
    """main's signal handlers are taken back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def answering() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("given", ["", "example.org", "*"])
def test_this_machine_is_reached_without_the_proxy(given: str, variables: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        variables.setenv(name, "http://127.0.0.1:9")
    variables.delenv("NO_PROXY", raising=False)
    variables.setenv("no_proxy", given)
    runtime._bypass_proxies()
    with answering() as address:
        assert requests.head(address, timeout=5).status_code == 200
    away = requests.utils.get_environ_proxies("http://example.com")
    assert bool(away) == (given != "*"), "others are reached through it"


def test_dead_proxy_is_reported_without_its_password(variables: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        variables.delenv(name)
    variables.setenv("http_proxy", "http://ann:secret@127.0.0.1:9")
    with pytest.raises(requests.RequestException) as caught:
        requests.get("http://10.255.255.1", timeout=5)
    assert first_line(caught.value) == (
        "the proxy does not answer: http_proxy=http://***@127.0.0.1:9; no_proxy=HOST,... goes around it"
    )


def test_names_that_the_output_cannot_encode_are_escaped(
    tmp_path: Path, variables: pytest.MonkeyPatch, handlers: None
) -> None:
    table = pd.DataFrame({"id": ["a"], "label": ["cat"], "p_cat": [1.0], "p_dog": [0.0]})
    for name in ("a.csv", "b.csv"):
        table.to_csv(tmp_path / name, index=False)
    variables.chdir(tmp_path)
    variables.setattr(sys, "argv", ["pipeline", "ensemble", "a.csv", "b.csv", "--output", "猫.csv"])
    variables.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        main()
    out.flush()
    assert ended.value.code == 0
    assert b"\\u732b.csv: 1 images" in out.buffer.getvalue()  # type: ignore[attr-defined]


COMMAND = "from pipeline.cli import main; import pipeline.search.worker"
COUNT = "import gc, os; print(gc.get_stats()[2]['collections'], os.environ['GOMP_SPINCOUNT'])"


@pytest.mark.parametrize("start", ["pipeline.cli.main, pipeline.registry.package", "pipeline.search.worker"])
def test_mlflow_is_imported_with_its_telemetry_off(start: str) -> None:
    look = f"""
import os, sys
class Finder:
    def find_spec(self, name, *others):
        if name == "mlflow":
            print(os.environ.get("MLFLOW_DISABLE_TELEMETRY"), flush=True)
            os._exit(0)  # the rest of the imports takes seconds
sys.meta_path.insert(0, Finder())
import {start}
"""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, env=settings)
    assert done.stdout == "true\n"


@pytest.mark.parametrize("start", [COMMAND, f"import pipeline.runtime; import {MODULE}"])
def test_imports_run_no_full_garbage_collection(start: str) -> None:
    def collections_after(imports: str) -> list[str]:
        command = [sys.executable, "-c", f"{imports}; {COUNT}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert collections_after(start) == ["0", "100000"]


def test_frozen_imports_leave_garbage_collection_working() -> None:
    training = """
import gc
usual = gc.get_threshold()
from pipeline.cli import main
from pipeline.runtime import freeze_imports
import torch._dynamo, torchvision, weakref
for _ in range(2):
    freeze_imports()
assert gc.get_threshold() == usual != (0, 0, 0)
assert gc.get_freeze_count() > 100_000

class Figure: ...
figure = Figure()
figure.canvas = figure
seen = weakref.ref(figure)
del figure
kept = [[] for _ in range(200_000)]
assert seen() is None, "collected"
"""
    done = subprocess.run([sys.executable, "-c", training], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# 64 MiB are 16,384 pages: those of the second tensor are the first's, or the system's again. It is a little smaller,
# as glibc before 2.38 doesn't put an aligned block where one of the same size was.
FAULTS = """
import resource
import torch
from pipeline.runtime import keep_freed_memory
if {keep}:
    keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24 - 2**10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_large_tensor_reuses_freed_memory() -> None:
    def faults(keep: bool) -> int:
        code = FAULTS.format(keep=keep)
        return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)

    if not keep_freed_memory():
        pytest.skip("no glibc")
    assert faults(keep=True) < 1000 < 16_000 < faults(keep=False)
