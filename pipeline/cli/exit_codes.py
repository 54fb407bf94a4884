"""How a command ends: 0 done, 1 a bug or nothing completed, and these."""

from pipeline.errors import DataError, NotReproduced, PartialFailure, PromotionRefused, UserError

INTERRUPTED = 130
_CODES: dict[type[UserError], int] = {
    UserError: 2,
    DataError: 3,
    PartialFailure: 4,
    PromotionRefused: 5,
    NotReproduced: 6,
}


def exit_code(error: UserError) -> int:
    """Of an error, by its class or the nearest one above it."""
    return next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)
