"""Errors of the user's input: what is wrong, which rule it breaks, and the way out.

The library names commands and options neutrally, in backticks: `promote attention`, `--data-dir`. The command line words
them as its user types them (`make promote NAME=attention`, `DATA_DIR=`), and knows the exit code of each error.
"""

import difflib
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote

from pydantic import ValidationError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

NO_SUCH_FIELD = "no such field"  # the rule of `validation_problems` for an unknown field
_MAX_LINE = 5_000  # characters
# pydantic's type of fault -> the rule for a reader, where its own words are a programmer's.
_PLAIN = {
    "int_parsing": "should be a whole number",
    "float_parsing": "should be a number",
    "bool_parsing": "should be true or false",
    "tuple_type": "should be a list, e.g. [16, 32]",
}


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be: in a user's input, or found by an audit."""

    subject: str  # the field and its value, the file, the run: `optimizer.lr = -1`
    rule: str = ""  # what it should be, or what is wrong with it
    remedy: str = ""  # the way out, where there is one
    details: tuple[str, ...] = ()  # further lines, shown indented below

    @property
    def lines(self) -> list[str]:
        """As text, without secrets and control characters."""
        text = "; ".join(filter(None, (": ".join(filter(None, (self.subject, self.rule))), self.remedy)))
        lines = (text, *(f"  {detail}" for detail in self.details))
        return [escape_control(redact_secrets(line))[:_MAX_LINE] for line in lines]


def lines_of(problems: Iterable[Problem]) -> list[str]:
    """All problems as text."""
    return [line for problem in problems for line in problem.lines]


class UserError(Exception):
    """Bad input: one problem, or several at once by `many`. The command line prints them and ends with an exit code."""

    def __init__(self, subject: str, rule: str = "", remedy: str = "", details: Sequence[str] = ()):
        super().__init__(subject, rule, remedy, details)
        self.problems: tuple[Problem, ...] = (Problem(subject, rule, remedy, tuple(details)),)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).__new__, (type(self), *self.args), vars(self)  # a subclass may be made from other arguments

    @classmethod
    def many(cls, problems: Sequence[Problem]) -> Self:
        """An error of several problems, at least one."""
        error = cls("")
        error.problems = tuple(problems)
        return error

    @property
    def lines(self) -> list[str]:
        """All problems as text."""
        return lines_of(self.problems)

    def __str__(self) -> str:
        return "\n".join(self.lines)


class DataError(UserError):
    """The data set is missing, damaged or not what it was."""


class PartialFailure(UserError):
    """Some of the inputs could not be used; all the others were."""


class PromotionRefused(UserError):
    """The candidate breaks rules of promotion; each problem is one of them, with its numbers."""


class NotReproduced(UserError):
    """A repeated run differs from the first one by more than the tolerance."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` where one of the known words is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def validation_problems(error: ValidationError, tags: Collection[str] = ()) -> list[Problem]:
    """One problem per fault of a pydantic model: subject `optimizer.lr = -0.1`, rule `should be greater than 0`.

    pydantic puts the chosen kind of a union into the path (`optimizer.sgd.lr`); the user knows no such level, so
    `tags`, the names of kinds, are left out.
    """
    return [_validation_problem(fault, tags) for fault in error.errors()]


def _validation_problem(fault: "ErrorDetails", tags: Collection[str]) -> Problem:
    field = ".".join(str(part) for part in fault["loc"] if part not in tags)
    rule = _PLAIN.get(fault["type"], fault["msg"].removeprefix("Input ").removeprefix("Value error, "))
    match fault["type"]:
        case "extra_forbidden":
            return Problem(field, NO_SUCH_FIELD)
        case "missing":
            return Problem(field, "needs a value")
        case "union_tag_invalid":
            context = fault["ctx"]
            kind, tag = context["discriminator"].strip("'"), context["tag"]
            known = [name.strip("' ") for name in context["expected_tags"].split(",")]
            return Problem(
                f"{field}.{kind} = {_shortened(tag)}", f"not one of {', '.join(known)}{did_you_mean(tag, known)}"
            )
    if isinstance(fault["input"], dict):  # a rule over several fields names them itself
        return Problem(field, rule)
    return Problem(f"{field} = {_shortened(fault['input'])}", rule)


def counted(number: int, what: str) -> str:
    """`1 trial`, `1,200 trials`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def first_names(names: Sequence[str], most: int) -> str:
    """`cat, dog and 3 more`: at most so many of them by name."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def escape_control(text: str) -> str:
    """Line breaks and control characters as escapes, so that a value can't look like a message or move the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def path_text(path: str | os.PathLike[str]) -> str:
    """A path on one line of valid UTF-8, which tables, pages and terminals need and file names need not be."""
    return escape_control(os.fsencode(path).decode("utf-8", "backslashreplace"))


def redact_secrets(text: str, uri: str = "") -> str:
    """A message with `***` for users, passwords and queries of addresses, and for values named as a password or token.

    Any part of the password of `uri`, where the error arose, is replaced too: a driver that misreads an address, as
    where the password has an @ in it, shows the rest as a host. Takes linear time, because the text may be anybody's.
    """
    password = (uri.partition("://")[2] or uri).rpartition("@")[0].partition(":")[2]
    for part in {*re.split("[:@]", password), *re.split("[:@]", unquote(password))}:
        if len(part) > 2:
            text = text.replace(part, "***")
    text = re.sub(r"[^\s'\"]+", lambda word: _without_user(word[0]), text)
    return re.sub(_NAMED_SECRET, r"\1***", text)


_SECRETS = "password|passwd|passphrase|pwd|secret|token|api_?key"
_NAMED_SECRET = rf"""(?i)((?:{_SECRETS})\w{{0,20}}=)('[^'\n]{{0,200}}'|"[^"\n]{{0,200}}"|[^\s&;,]+)"""


def _without_user(word: str) -> str:
    """`postgresql://ann:pw@host/db?x=y` as `postgresql://***@host/db?***`."""
    scheme, is_address, rest = word.partition("://")
    if not is_address:
        return word
    user, at, host = rest.rpartition("@")
    host, question_mark, _ = host.partition("?")
    return f"{scheme}://{'***' if user else ''}{at}{host}{'?***' if question_mark else ''}"


def first_line(error: BaseException, uri: str = "") -> str:
    """The first line of an error's message without secrets, or its class where there is no message.

    The parts of the password of `uri` are replaced as by `redact_secrets`.
    """
    if "ProxyError(" in str(error):  # the message of five nested exceptions
        return f"the proxy does not answer: {proxies()}; no_proxy=HOST,... goes around it"
    return redact_secrets((str(error).strip().splitlines() or [type(error).__name__])[0], uri)[:300]


def proxies() -> str:
    """`http_proxy=http://host:1 https_proxy=...` as the environment has them, without secrets; empty where it has none."""
    from urllib.request import getproxies_environment

    uris = {scheme: uri for scheme, uri in getproxies_environment().items() if scheme != "no"}
    return " ".join(f"{scheme}_proxy={redact_uri(uri)}" for scheme, uri in sorted(uris.items()))


def redact_uri(uri: str) -> str:
    """An address without its secrets; it may be mistyped, without `://` or with blanks in its password."""
    return redact_secrets(re.sub(r"(?s)^(\w[\w+]*://)?.*@", r"\1***@", uri))


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
