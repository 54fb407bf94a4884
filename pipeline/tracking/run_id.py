"""The form of a run's id in MLflow, and of the key by which our own processes know a run."""

import re

from pipeline.errors import UserError


def is_run_id(text: str) -> bool:
    """Whether it has that form."""
    return bool(re.fullmatch(r"[0-9a-f]{32}", text))


def not_a_run(subject: str) -> UserError:
    """The error for what should name a run and hasn't that form."""
    return UserError(subject, "not a run's id (32 of 0-9a-f)", "`ui` shows them")
