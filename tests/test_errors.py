"""Errors of the user's input: problems as text, several at once, and those of pydantic's validation."""

import pickle
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ValidationError

from pipeline.data.images import BadImage
from pipeline.errors import (
    DataError,
    PartialFailure,
    Problem,
    UserError,
    did_you_mean,
    escape_control,
    first_line,
    first_names,
    proxies,
    validation_problems,
)


@pytest.mark.parametrize(
    ("problem", "lines"),
    [
        (Problem("a.b = 1", "should be 2", "say 2"), ["a.b = 1: should be 2; say 2"]),
        (Problem("a.b = 1", remedy="say 2"), ["a.b = 1; say 2"]),
        (Problem("", "rule of several fields"), ["rule of several fields"]),
        (Problem("a", "b", details=("c", "d")), ["a: b", "  c", "  d"]),
        (Problem("a\nb\x1b[2J", "c\u202e"), ["a\\nb\\x1b[2J: c\\u202e"]),
    ],
)
def test_problem_is_one_line_and_indented_details(problem: Problem, lines: list[str]) -> None:
    assert problem.lines == lines


def test_long_problem_is_cut() -> None:
    assert len(Problem("x" * 10_000).lines[0]) == 5_000


def test_user_error_renders_all_of_its_problems() -> None:
    one = UserError("lr = -1", "should be above 0", "raise it", ["seen in trial 3"])
    assert one.lines == ["lr = -1: should be above 0; raise it", "  seen in trial 3"]
    many = DataError.many([*one.problems, Problem("epochs = 0", "should be at least 1")])
    assert type(many) is DataError
    assert str(many) == "lr = -1: should be above 0; raise it\n  seen in trial 3\nepochs = 0: should be at least 1"


@pytest.mark.parametrize(
    "error",
    [
        UserError("a", "b", "c", ("d",)),
        PartialFailure.many([Problem("a", "b"), Problem("c")]),
        BadImage(Path("cat.png"), "is cut off"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_between_processes(error: UserError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and vars(again) == vars(error) and str(again) == str(error)


def test_closest_known_word_is_suggested() -> None:
    assert did_you_mean("atention", ["attention", "plain"]) == " (did you mean attention?)"
    assert did_you_mean("xyz", iter(["attention"])) == ""


class Section(BaseModel):
    model_config = {"extra": "forbid"}

    name: Literal["one"] = "one"
    size: int


def problems_of(values: dict[str, object]) -> list[Problem]:
    with pytest.raises(ValidationError) as caught:
        Section.model_validate(values)
    return validation_problems(caught.value)


def test_validation_problems_name_subject_and_rule() -> None:
    assert problems_of({"size": "x" * 200, "colour": 1, "name": "two"}) == [
        Problem("name = two", "should be 'one'"),
        Problem(f"size = {'x' * 77}...", "should be a whole number"),
        Problem("colour", "no such field"),
    ]
    assert problems_of({}) == [Problem("size", "needs a value")]


def test_control_characters_are_escaped() -> None:
    assert escape_control("a\tb\r\nc é 猫") == "a\\tb\\r\\nc é 猫"


def test_first_line_is_the_class_where_there_is_no_message() -> None:
    assert first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(OSError("host hunter2 refused"), "db://ann:hunter2@host/x") == "host *** refused"


def test_proxies_are_shown_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("http", "https", "all", "ftp", "no"):
        for name in (f"{scheme}_proxy", f"{scheme.upper()}_PROXY"):
            monkeypatch.delenv(name, raising=False)
    assert proxies() == ""
    monkeypatch.setenv("http_proxy", "http://ann:secret@proxy:1")
    monkeypatch.setenv("no_proxy", "localhost")
    assert proxies() == "http_proxy=http://***@proxy:1"


def test_first_names_say_how_many_more_there_are() -> None:
    assert first_names(("cat", "dog"), 2) == "cat, dog"
    assert first_names(["cat", "dog", "cow"], 1) == "cat and 2 more"
