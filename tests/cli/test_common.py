"""What several commands need."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import typer
from mlflow.exceptions import MlflowException
from rich.table import Table

from pipeline.cli import common
from pipeline.cli.common import (
    expand,
    find_device,
    is_away,
    make_console,
    print_links,
    print_next,
    say,
    settle,
    writable,
)
from pipeline.cli.main import app
from pipeline.cli.options import _remember
from pipeline.errors import UserError


def test_say_prints_odd_names_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(make_console(), ":smile: [red]\x1b[31m\n" + "x" * 300)
    assert capsys.readouterr().out == ":smile: [red]\\x1b[31m\\n" + "x" * 300 + "\n"


def test_a_mistyped_folder_of_data_begins_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"`--data-dir dta`: there is no such folder; name the folder that has cifar10"):
        common.data_folder(Path("dta"), "cifar10")
    (tmp_path / "mine").mkdir()
    for place in (Path("data"), Path("mine")):  # the default is made on its first use
        assert common.data_folder(place, "cifar10") == place
    assert common.data_folder(Path("dta"), "digits") == Path("dta"), "which are downloaded nowhere"


def test_a_narrow_terminal_cuts_no_number(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    table = Table("parameters", "latency", "validation")
    table.add_row("2,707,745", "15.11 ms", "0.97221234")
    make_console().print(table)
    printed = capsys.readouterr().out
    assert "2,707,745" in printed and "0.97221234" in printed and "…" not in printed


def test_links_stand_in_two_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_links(make_console(), "Next:", [("a", "link"), ("long", "other")])
    assert capsys.readouterr().out == "Next:\n  a     link\n  long  other\n"


def test_named_commands_stay_with_the_stores_and_hide_passwords(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common.COMMAND_LINE, "commands", typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    monkeypatch.setattr(common.COMMAND_LINE, "stores", {})
    tracking, storage = (Mock(opts=[option]) for option in ("--tracking-uri", "--storage"))
    python, make = "python -m pipeline", "make"
    shown = {
        "finals a-v1-digits": (
            f"{python} finals a-v1-digits --tracking-uri 'http://***@host/a b'",
            f"{make} finals NAME=a-v1-digits TRACKING_URI='http://***@host/a b'",
        ),
        "plan a": (
            f"{python} plan a --tracking-uri 'http://***@host/a b' --storage sqlite:///o.db",
            f"{make} plan NAME=a TRACKING_URI='http://***@host/a b' STORAGE=sqlite:///o.db",
        ),
        "fields": (f"{python} fields", f"{make} fields"),
    }
    for by_make in (False, True):
        monkeypatch.setattr(common.COMMAND_LINE, "by_make", by_make)
        assert _remember(tracking, "http://ann:secret@host/a b") == "http://ann:secret@host/a b"
        assert _remember(storage, "sqlite:///o.db") == "sqlite:///o.db"
        for command, typed in shown.items():
            print_next(make_console(), {"do": command}, [("see", "link")])
            assert capsys.readouterr().out == f"Next:\n  do   {typed[by_make]}\n  see  link\n"
        assert _remember(tracking, None) is _remember(storage, None) is None
        say(make_console(), "do `audit`")
        assert capsys.readouterr().out == f"do `{make if by_make else python} audit`\n"


def test_paths_that_can_not_be_are_refused(tmp_path: Path) -> None:
    assert expand(tmp_path / "none") == tmp_path / "none"
    for path in ("a\0b", "x" * 300):
        with pytest.raises(UserError):
            expand(tmp_path / path)


def test_outputs_are_checked_before_anything_is_measured(tmp_path: Path) -> None:
    assert writable(tmp_path / "new" / "a.json") == tmp_path / "new" / "a.json"
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "a.json"):
        with pytest.raises(UserError, match="can't be written"):
            writable(path)


def test_unknown_devices_are_refused() -> None:
    assert find_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="`--device gpu`: should be auto"):
        find_device("gpu")


def test_a_database_that_goes_away_is_no_bug() -> None:
    lost = "(psycopg.OperationalError) connection failed (Background on this error at: https://sqlalche.me/e/20/e3q8)"
    assert is_away(MlflowException(lost))
    assert is_away(MlflowException("API request to http://127.0.0.1:5000/ failed"))
    assert not is_away(MlflowException("no such run"))
    assert not is_away(RuntimeError(lost)), "Optuna's storage waits for its database itself"


@pytest.mark.parametrize(
    ("outage_s", "words"), [(0.0, "MLflow has not taken all yet: 1 run"), (31.0, "MLflow doesn't answer: 1 run")]
)
def test_a_slow_server_is_not_said_to_be_away(outage_s: float, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    tracker: Any = SimpleNamespace(wait_until_sent=lambda: False, unsent={"a"}, rejected={}, outage_s=outage_s)
    assert not settle(make_console(), tracker)
    assert words in capsys.readouterr().out
