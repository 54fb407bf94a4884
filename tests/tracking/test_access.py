"""Raw requests against the real servers: forged headers are refused, and no path leads out of the artifacts."""

import asyncio
import http.client
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.access import AccessControl
from pipeline.tracking.server import HOST, start_server, stop_server
from pipeline.tracking.tracker import MlflowTracker

CANARY = "only those who left the artifacts read this"
API = "/api/2.0/mlflow"


@dataclass(frozen=True)
class Target:
    """A server with one run that has inside.txt; canary.txt lies in every folder above its artifacts."""

    root: Path
    port: int
    run: str
    experiment: str

    def ask(
        self, method: str, path: str, body: bytes | dict[str, Any] = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and content; the path goes out as it is."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=30)
        connection._validate_path = lambda url: None  # type: ignore[attr-defined]
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        kind = {"Content-Type": "application/json"} if isinstance(body, dict) else {}
        try:
            connection.request(method, path, content, kind | (headers or {}))
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def raw(self, request: bytes) -> bytes:
        """The first line of the answer."""
        with socket.create_connection((HOST, self.port), timeout=30) as connection:
            connection.sendall(request)
            return connection.makefile("rb").readline().strip()

    def outside(self) -> dict[str, bytes]:
        """All that lies outside the artifacts, but what the server itself writes."""
        own = self.root / "mlruns" / "artifacts"
        return {
            str(file.relative_to(self.root)): file.read_bytes()
            for file in self.root.rglob("*")
            if file.is_file() and not file.is_relative_to(own) and not file.name.startswith(("mlflow.db", "server.log"))
        }


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    root = tmp_path_factory.mktemp("target")
    home = root / "mlruns"
    tracker = MlflowTracker(home)
    experiment = tracker.store.experiment("tiny-v1-digits")
    run = tracker.client.create_run(experiment).info
    (root / "inside.txt").write_text("inside")
    tracker.client.log_artifact(run.run_id, str(root / "inside.txt"))
    artifacts = home / "artifacts" / run.run_id / "artifacts"
    for folder in [root, home, home / "elsewhere"]:
        folder.mkdir(exist_ok=True)
        (folder / "canary.txt").write_text(CANARY)
    assert (artifacts / "inside.txt").exists() and artifacts.parents[2] == home
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    server = start_server(tracker.uri, home, port)
    yield Target(root, port, run.run_id, experiment)
    stop_server(server)


# ----------------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    "host",
    [
        *(
            "evil.example",
            "10.evil.example",
            "192.168.evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
        ),
        *("127.0.0.1@evil.example", "evil.example#127.0.0.1", "0.0.0.0", "10.0.0.1", "", "127.0.0.1, evil.example"),
        "127.0.0.1:5000.evil.example",
    ],
)
def test_forged_host_is_refused(host: str, target: Target) -> None:
    for path in ("/", "/health", "/get-artifact?path=inside.txt&run_uuid=" + target.run):
        request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        assert target.raw(request.encode()) == b"HTTP/1.1 403 Forbidden"


@pytest.mark.parametrize(
    ("request_lines", "answer"),
    [
        ("GET / HTTP/1.0", b"403"),
        ("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example", b"40[03]"),
        ("GET http://evil.example/ HTTP/1.1\r\nHost: evil.example", b"403"),
        ("GET / HTTP/1.1\r\nHost: evil.example\r\nX-Forwarded-Host: 127.0.0.1", b"403"),
        ("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\nOrigin: http://evil.example", b"403"),
        ("GET / HTTP/1.1\r\nHost: localhost:8000", b"200"),  # through a tunnel with another port
        ("GET / HTTP/1.1\r\nHost: 127.0.0.1:5000\r\nOrigin: http://127.0.0.1:5000", b"200"),
    ],
)
def test_raw_requests_are_controlled_too(request_lines: str, answer: bytes, target: Target) -> None:
    status = target.raw(f"{request_lines}\r\nConnection: close\r\n\r\n".encode()).split()[1]
    assert status in {b"400", b"403"} if answer == b"40[03]" else status == answer


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://localhost:1",
        "https://127.0.0.1:{port}",
        "http://127.0.0.1",
        "file://",
        "",
    ],
)
def test_page_of_another_server_neither_reads_nor_writes(origin: str, target: Target) -> None:
    headers = {"Origin": origin.format(port=target.port)}
    made = target.ask("POST", f"{API}/experiments/create", {"name": f"by {origin}"}, headers)
    assert made[0] == 403
    assert target.ask("POST", f"{API}/experiments/search", {"max_results": 5}, headers)[0] == 403
    assert target.ask("OPTIONS", f"{API}/experiments/search", b"", headers)[0] == 403
    own = {"Origin": f"http://{HOST}:{target.port}"}
    status, found = target.ask("POST", f"{API}/experiments/search", {"max_results": 50}, own)
    assert status == 200 and b"tiny-v1-digits" in found and b"by " not in found


@pytest.mark.parametrize(
    "path",
    [
        "/ajax-api/3.0/mlflow/assistant/config",
        "/ajax-api/3.0/mlflow/assistant/message",
        "//ajax-api/3.0/mlflow/assistant/config",
        "/ajax-api/3.0/mlflow/%61ssistant/config",
        "/ajax-api/3.0/mlflow/gateway/secrets/list",
        "/ajax-api/2.0/mlflow/gateway-proxy",
        "/gateway/x/mlflow/invocations",
        "/api/2.0/mlflow/webhooks",
        "/ajax-api/3.0/jobs/1",
        "/ajax-api/3.0/mlflow/jobs/1",
    ],
)
def test_endpoints_that_run_programs_are_closed(path: str, target: Target) -> None:
    for method in ("GET", "POST", "PUT"):
        assert target.ask(method, path, {})[0] == 403


def test_websocket_is_controlled_too() -> None:
    passed, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["type"])

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def ask(kind: str, host: bytes) -> None:
        await AccessControl(app)({"type": kind, "path": "/", "headers": [(b"host", host)]}, None, send)  # type: ignore[arg-type]

    for kind, host in (("websocket", b"evil.example"), ("websocket", b"localhost:1"), ("lifespan", b"")):
        asyncio.run(ask(kind, host))
    assert passed == ["websocket", "lifespan"] and sent == ["websocket.close"]


# ------------------------------------------------------------------------------------------------------------- paths

# Ways to write a path that leads out of a folder, or names one elsewhere; {up} is ../ as often as it takes.
SPELLINGS = {
    "dots": "{up}canary.txt",
    "encoded dots": "{up:.:%2e}canary.txt",
    "encoded slash": "{up:/:%2f}canary.txt",
    "all encoded": "%2e%2e%2fcanary.txt",
    "double encoded": "%252e%252e%252fcanary.txt",
    "triple encoded": "%25252e%25252e%25252fcanary.txt",
    "overlong": "%c0%ae%c0%ae%c0%afcanary.txt",
    "backslash": "..\\canary.txt",
    "encoded backslash": "..%5ccanary.txt",
    "dots behind a folder": "x/{up}{up}canary.txt",
    "dots behind the file": "inside.txt/{up}{up}canary.txt",
    "dot slash": "./{up}canary.txt",
    "four dots": "..../{up}canary.txt",
    "absolute": "{root}/canary.txt",
    "encoded absolute": "{root:/:%2f}%2fcanary.txt",
    "double slash": "//{root}/canary.txt",
    "file uri": "file://{root}/canary.txt",
    "encoded file uri": "file%3a%2f%2f{root}/canary.txt",
    "file uri with a host": "file://localhost{root}/canary.txt",
    "NUL": "{up}canary.txt%00.png",
    "newline": "{up}canary.txt%0a",
    "semicolon": "..;/canary.txt",
    "fragment": "inside.txt%23/{up}{up}canary.txt",
    "home": "~/canary.txt",
}
# The endpoints that take a path: method, address, and how often ../ leads to mlruns/.
ENDPOINTS = {
    "get-artifact": ("GET", "/get-artifact?run_uuid={run}&path={path}", 3),
    "list": ("GET", f"{API}/artifacts/list?run_id={{run}}&path={{path}}", 3),
    "upload": ("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path={path}", 3),
    "download": ("GET", "/api/2.0/mlflow-artifacts/artifacts/{path}", 1),
    "ajax download": ("GET", "/ajax-api/2.0/mlflow-artifacts/artifacts/{path}", 1),
    "put": ("PUT", "/api/2.0/mlflow-artifacts/artifacts/{path}", 1),
    "ajax put": ("PUT", "/ajax-api/2.0/mlflow-artifacts/artifacts/{path}", 1),
    "delete": ("DELETE", "/api/2.0/mlflow-artifacts/artifacts/{path}", 1),
    "ajax delete": ("DELETE", "/ajax-api/2.0/mlflow-artifacts/artifacts/{path}", 1),
    "list all": ("GET", "/api/2.0/mlflow-artifacts/artifacts?path={path}", 1),
    "parts": ("POST", "/api/2.0/mlflow-artifacts/mpu/create/{path}", 1),
    "static": ("GET", "/static-files/{path}", 1),
}


def spelled(spelling: str, root: Path, levels: int) -> str:
    """A spelling with its {name} or {name:old:new} filled in."""
    words = {"up": "../" * levels, "root": str(root)}
    for name, value in words.items():
        while f"{{{name}:" in spelling:
            old, new = spelling.partition(f"{{{name}:")[2].partition("}")[0].split(":")
            spelling = spelling.replace(f"{{{name}:{old}:{new}}}", value.replace(old, new))
        spelling = spelling.replace(f"{{{name}}}", value)
    return spelling


def test_endpoints_serve_files_inside_the_artifacts(target: Target) -> None:
    inside = f"{target.run}/artifacts/inside.txt"
    assert target.ask("GET", f"/get-artifact?run_uuid={target.run}&path=inside.txt") == (200, b"inside")
    assert target.ask("GET", f"/api/2.0/mlflow-artifacts/artifacts/{inside}") == (200, b"inside")
    assert b"inside.txt" in target.ask("GET", f"{API}/artifacts/list?run_id={target.run}")[1]
    assert target.ask("PUT", f"/api/2.0/mlflow-artifacts/artifacts/{target.run}/artifacts/new.txt", b"new")[0] == 200
    assert target.ask("GET", f"/get-artifact?run_uuid={target.run}&path=new.txt") == (200, b"new")
    assert target.ask("DELETE", f"/api/2.0/mlflow-artifacts/artifacts/{target.run}/artifacts/new.txt")[0] == 200
    assert target.ask("GET", f"/get-artifact?run_uuid={target.run}&path=new.txt")[0] == 404


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_path_leads_out_of_the_artifacts(spelling: str, endpoint: str, target: Target) -> None:
    method, address, levels = ENDPOINTS[endpoint]
    before = target.outside()
    for there in ("mlruns", "mlruns/elsewhere", ""):  # as absolute paths
        path = spelled(SPELLINGS[spelling], target.root / there, levels)
        _, content = target.ask(method, address.format(run=target.run, path=path), b"overwritten")
        assert CANARY.encode() not in content and b'"path": "canary.txt"' not in content
    assert target.outside() == before
    assert target.ask("GET", f"/get-artifact?run_uuid={target.run}&path=inside.txt") == (200, b"inside")


# --------------------------------------------------------------------------------------------------------- locations

LOCATIONS = [
    *("{root}", "file://{root}", "file:{root}", "file://localhost{root}", "file:///proc/self/root{root}"),
    *("{root}/mlruns/artifacts/..", "{root}/mlruns/artifacts/../elsewhere", "file://{root}/mlruns/artifacts/%2e%2e"),
    *("{root}/mlruns", "..", "../elsewhere", "/", "s3://bucket/x", "ftp://127.0.0.1:1/x", "http://127.0.0.1:1/x"),
    *("mlflow-artifacts://127.0.0.1:1/x", "mlflow-artifacts:/../..", "runs:/x/y", "dbfs:/x", "FILE://{root}"),
    *("file://{root}?x=1", "sftp://127.0.0.1:1/", "{root}/mlruns/artifactsX", "\\\\127.0.0.1\\share"),
]


@pytest.mark.parametrize("location", LOCATIONS)
def test_no_location_of_a_client_leads_out(location: str, target: Target) -> None:
    before = target.outside()
    location = location.replace("{root}", str(target.root))
    status, made = target.ask("POST", f"{API}/experiments/create", {"name": location, "artifact_location": location})
    assert status >= 400, made
    name = location.encode().hex()
    assert target.ask("POST", f"{API}/registered-models/create", {"name": name})[0] == 200
    for run in ({"run_id": target.run}, {}):
        body = {"name": name, "source": location, **run}
        status, made = target.ask("POST", f"{API}/model-versions/create", body)
        if status == 200:
            version = json.loads(made)["model_version"]["version"]
            for file in ("canary.txt", "mlruns/canary.txt"):
                got = target.ask("GET", f"/model-versions/get-artifact?name={name}&version={version}&path={file}")
                assert got[0] >= 400 and CANARY.encode() not in got[1]
    assert target.outside() == before


@pytest.mark.parametrize("location", ["{root}", "file://{root}/mlruns/elsewhere", "{root}/mlruns", "s3://b/x"])
def test_location_in_the_database_is_not_followed(location: str, target: Target) -> None:
    """As one that came there by another way, or another server's."""
    location = location.replace("{root}", str(target.root))
    client = MlflowTracker(target.root / "mlruns").client
    run = client.create_run(client.create_experiment(f"old {location}", location)).info.run_id
    before = target.outside()
    for method, address, _ in list(ENDPOINTS.values())[:3]:
        status, content = target.ask(method, address.format(run=run, path="canary.txt"), b"overwritten")
        assert status >= 400 and CANARY.encode() not in content
    status, content = target.ask("GET", f"{API}/artifacts/list?run_id={run}")
    assert status >= 400 and b"canary" not in content
    assert target.outside() == before
