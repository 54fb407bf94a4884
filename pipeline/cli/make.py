"""make's variables and a command's options: one is the other in capitals, in both directions.

`VARIABLE=value` words become a command's options, and commands and options that the library names in backticks are worded
as their user types them: `make finals NAME=attention` for a user of make, else `python -m pipeline finals attention`.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import Problem, UserError, did_you_mean

FROM_ENVIRONMENT = "DATA_DIR"  # names like VERSION mean other things elsewhere


@dataclass
class CommandLine:
    """What is known of the command line of this process."""

    commands: Mapping[str, Any] = field(default_factory=dict)  # name -> its command, as click has it
    by_make: bool = False
    stores: dict[str, str] = field(
        default_factory=dict
    )  # option -> address without secrets: commands that are named look there

    @property
    def flags(self) -> set[str]:
        """The variables of options without a value."""
        return {
            name for command in self.commands.values() for name, each in variables(command).items() if is_flag(each)
        }

    def word(self, text: str) -> str:
        """A text whose commands and options in backticks are worded as the user types them."""
        return re.sub(r"`([^`\n]+)`", lambda match: f"`{self._worded(match[1])}`", text)

    def command(self, text: str) -> str:
        """A whole command as the user types it, e.g. of `compare attention`."""
        return self._worded(text)

    def _worded(self, text: str) -> str:
        name, _, rest = text.partition(" ")
        is_command = name in self.commands
        if not is_command and not text.startswith("--"):
            return text
        for option, address in self.stores.items():
            if is_command and option in self._options(name) and option not in text:
                text, rest = (f"{words} {option} {shlex.quote(address)}".strip() for words in (text, rest))
        if not self.by_make:
            return f"python -m pipeline {text}" if is_command else text
        made = _assignments(
            rest if is_command else text, positional(self.commands[name]) if is_command else [], self.flags
        )
        return " ".join([f"make {name}", *made] if is_command else made)

    def _options(self, command: str) -> set[str]:
        return {name for each in self.commands[command].params for name in each.opts}


COMMAND_LINE = CommandLine()


def variable(option: str) -> str:
    """`--data-dir` -> `DATA_DIR`."""
    return option.removeprefix("--").replace("-", "_").upper()


def is_flag(parameter: Any) -> bool:
    """Whether an option takes no value."""
    return bool(getattr(parameter, "is_flag", False))


def positional(command: Any) -> list[str]:
    """The variables of a command's argument; several are the same to it."""
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    return [name for each in arguments for name in re.findall(r"[A-Z]+", each.metavar or each.name.upper())]


def variables(command: Any) -> dict[str, Any]:
    """Variable -> parameter of a command."""
    known: dict[str, Any] = {}
    for each in command.params:
        names = positional(command) if each.param_type_name == "argument" else [variable(each.opts[-1])]
        known |= dict.fromkeys(names, each)
    return known


def to_options(command: Any, words: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """A command's options of `VARIABLE=value` words; UserError for each variable that it doesn't have.

    An empty value is none. A flag is 1 or 0. What the environment says of FROM_ENVIRONMENT counts where no word does.
    """
    known, options, arguments, problems = variables(command), [], {}, []
    given = dict(word.partition("=")[::2] for word in words)
    if FROM_ENVIRONMENT in known and environment.get(FROM_ENVIRONMENT):
        given.setdefault(FROM_ENVIRONMENT, environment[FROM_ENVIRONMENT])
    for name, value in given.items():
        if name not in known:
            remedy = f"there are {', '.join(sorted(known))}" if known else "it takes none"
            problems.append(
                Problem(name, f"no such variable of `{command.name}`{did_you_mean(name.upper(), known)}", remedy)
            )
        elif is_flag(known[name]):
            if value not in ("", "0", "1"):
                problems.append(Problem(f"{name}={value}", "should be 1 or 0"))
            parameter = known[name]
            options += {"1": parameter.opts[-1:], "0": parameter.secondary_opts[-1:]}.get(value, [])
        elif value:
            if name in positional(command):
                arguments[name] = value
            else:
                options.append(f"{known[name].opts[-1]}={value}")
    if len(arguments) > 1:
        problems.append(Problem(" and ".join(arguments), "are the same here", "give one of them"))
    if problems:
        raise UserError.many(problems)
    return [*options, *(["--", *arguments.values()] if arguments else [])]


def _assignments(text: str, arguments: Sequence[str], flags: set[str]) -> list[str]:
    """`attention --version 2` as `NAME=attention VERSION=2`; a word in capitals is a placeholder, `...` then."""
    try:
        words = shlex.split(text)
    except ValueError:  # an apostrophe in a value
        words = text.split()
    values: dict[str, list[str]] = {}
    name = arguments[0] if arguments else ""
    for word in words:
        option, equals, value = word.partition("=")
        if word.startswith("--"):
            name = variable(option)
            values[name] = [value] if equals else ["1"] if name in flags else []
            name = (arguments[0] if arguments else "") if equals or name in flags else name
        else:
            values.setdefault(word if word in arguments else name, []).append(word)
            name = arguments[0] if arguments else name
    return [f"{name}={_value(' '.join(words))}" for name, words in values.items()]


def _value(text: str) -> str:
    """As a shell takes it: quoted where it must be."""
    return "..." if re.fullmatch(r"[A-Z]+", text) else shlex.quote(text) if text else ""
