"""The MLflow UI on this machine, and links into it."""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from pipeline.errors import UserError

HOST = "127.0.0.1"
PROJECT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 120
# Sections of MLflow's page of charts, named as what stands before a metric's last slash. Without a view they are sorted by
# name, calibration first.
OPEN_SECTIONS = ("val", "val/f1", "train", "optimizer")
FOLDED_SECTIONS = (
    *("val/precision", "val/recall", "calibration", "methods", "model", "memory", "throughput", "time"),
    *("Model metrics", "System metrics"),  # MLflow's own
)


def shared_view(objective: str, params: Sequence[str]) -> tuple[str, str]:
    """(key, value) of a view for MLflow's page of runs: only trials, best first, with scores and searched parameters.

    Its charts begin with the scores and each class's F1 by epoch. The experiment's tag `mlflow.sharedViewState.<key>` keeps
    it, as by the page's own "save view"; the page's menu lists it. MLflow doesn't document it: where a version doesn't know
    it, the address that names it still opens the plain list.
    """
    scores = dict.fromkeys([objective, "val/accuracy", "val/f1_macro", "val/balanced_accuracy", "val/loss"])
    others = [name for name in (*scores, "val/ece", "time/training_s") if name != objective]
    columns = [
        *(f"metrics.`{objective}`", "tags.`state`"),
        *(f"params.`{name}`" for name in params),
        *(f"metrics.`{name}`" for name in others),
        *("attributes.`Duration`", "tags.`reason`"),
    ]
    state = {
        "searchFilter": "tags.role = 'trial'",
        "orderByKey": f"metrics.`{objective}`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": dict.fromkeys(columns, 110),  # pixels
        # MLflow draws what isn't listed behind what is, in the order of these sections.
        "compareRunCharts": [_line_chart(name) for name in scores],
        "compareRunSections": [
            {"uuid": name, "name": name, "display": name in OPEN_SECTIONS, "isReordered": True}
            for name in (*OPEN_SECTIONS, *FOLDED_SECTIONS)
        ],
        "isAccordionReordered": True,
    }
    packed = "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    value = json.dumps({"name": "Trials, best first", "createdAt": 0, "state": packed})
    return hashlib.md5(value.encode(), usedforsecurity=False).hexdigest(), value


def _line_chart(metric: str) -> dict[str, object]:
    """A metric by epoch on MLflow's page of charts."""
    return {
        "type": "LINE",
        "uuid": metric,
        "metricKey": metric,
        "metricSectionId": metric.rpartition("/")[0],
        "isGenerated": True,  # so that the page doesn't draw the metric a second time
        "xAxisKey": "step",
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def web_address(uri: str) -> str:
    """A tracking server's address for a browser: without user, password and query."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


def study_links(
    base: str, experiment: str, objective: str, view: str | None, best_run_ids: Sequence[str]
) -> dict[str, str]:
    """Addresses in the UI at `base`: the study's trials sorted by score, its charts, its best trials compared."""
    # Without the workflow type, MLflow 3 opens in its GenAI mode, which shows no runs.
    workflow = {"workflowType": "machine_learning"}
    # An order in the address would override the view, which has its own.
    order = {"viewStateShareKey": view} if view else {"orderByKey": f"metrics.`{objective}`", "orderByAsc": "false"}
    runs = f"{base}/#/experiments/{experiment}/runs?"
    links = {
        "trials": runs + urlencode(workflow | order),
        "charts": runs + urlencode(workflow | order | {"compareRunsMode": "CHART"}),
    }
    if len(best_run_ids) > 1:
        lists = {"runs": list(best_run_ids), "experiments": [experiment]}
        query = {name: json.dumps(ids, separators=(",", ":")) for name, ids in lists.items()}
        links["comparison"] = f"{base}/#/compare-runs?{urlencode(query | workflow)}"  # the page wants `runs` first
    return links


def start_server(tracking_uri: str, home: Path, port: int) -> subprocess.Popen[bytes]:
    """Start MLflow's server for a database, for this machine only, and wait until it answers; UserError where it doesn't.

    It reads and writes artifacts in the folder mlruns's `artifacts` only. One process, no telemetry and no job execution:
    0.26 GB of memory instead of 2.5.
    """
    settings = {
        "MLFLOW_BACKEND_STORE_URI": tracking_uri,  # not in the command, which every user of the machine can see
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PIPELINE_ARTIFACTS": str(home.resolve() / "artifacts"),
    }
    return launch("the MLflow server", "pipeline.tracking.server_app", settings, port, home / "server.log")


def launch(what: str, module: str, settings: Mapping[str, str], port: int, log_file: Path) -> subprocess.Popen[bytes]:
    """Start a module's `app`, and wait until its /health answers; UserError where it doesn't.

    `what` names it in messages. `settings` are added to the environment. `stop_server` ends it with all that it started.
    """
    _check_free(port)
    command = [sys.executable, "-m", "uvicorn", f"{module}:app", "--factory", "--app-dir", str(PROJECT)]
    command += ["--host", HOST, "--port", str(port)]
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", **settings}
    with log_file.open("wb") as log:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True)
    limit = time.monotonic() + START_LIMIT_S
    try:
        while time.monotonic() < limit and server.poll() is None:
            if _is_ready(port):
                return server
            time.sleep(0.3)
    except BaseException:  # Ctrl-C doesn't reach a session of its own
        stop_server(server)
        raise
    stop_server(server)
    tail = " | ".join(log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
    raise UserError(what, f"did not start on port {port}: {tail}", f"the complete log is {log_file}")


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """End the server and the workers that it started, also those that outlived it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)


def _check_free(port: int) -> None:
    """UserError where a server couldn't listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port just left is free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"`--port {port}`", f"{error.strerror}", "choose another port") from None


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)  # urllib would ask a proxy, where one is set
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
