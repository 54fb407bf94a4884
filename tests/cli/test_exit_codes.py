"""Exit codes by kind of error."""

from pipeline.cli.exit_codes import HELP, exit_code
from pipeline.errors import DataError, NotReproduced, PartialFailure, PromotionRefused, UserError


def test_each_kind_of_error_has_its_exit_code() -> None:
    class Damaged(DataError):
        pass

    kinds = (UserError, DataError, PartialFailure, PromotionRefused, NotReproduced, Damaged)
    assert [exit_code(kind("x")) for kind in kinds] == [2, 3, 4, 5, 6, 3]


def test_help_names_every_code() -> None:
    assert HELP.startswith("Exit codes: 0 done, 1 a bug, 2 bad input, 3 missing or damaged data, ") and HELP.endswith(
        "130 interrupted."
    )
