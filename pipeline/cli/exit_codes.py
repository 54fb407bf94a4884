"""How a command ends: 0 done, 1 a bug, nothing completed or something found, and these."""

from pipeline.errors import DataError, NotReproduced, PartialFailure, PromotionRefused, UserError

INTERRUPTED = 130
# Kind of error -> exit code and what it means.
_CODES: dict[type[UserError], tuple[int, str]] = {
    UserError: (2, "bad input"),
    DataError: (3, "missing or damaged data"),
    PartialFailure: (4, "some inputs failed"),
    PromotionRefused: (5, "promotion refused"),
    NotReproduced: (6, "not reproduced"),
}
_MEANINGS = [(0, "done"), (1, "a bug"), *_CODES.values(), (INTERRUPTED, "interrupted")]
HELP = f"Exit codes: {', '.join(f'{code} {meaning}' for code, meaning in _MEANINGS)}."


def exit_code(error: UserError) -> int:
    """The code of an error, by its class or the nearest one above it."""
    return next(_CODES[kind][0] for kind in type(error).__mro__ if kind in _CODES)
