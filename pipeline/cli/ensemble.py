"""`ensemble`: the mean of several predictions."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import expand, make_console, say
from pipeline.errors import UserError


def ensemble(
    files: Annotated[
        list[Path], typer.Argument(metavar="TABLE...", help="Two or more tables that predict --output wrote.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where the mean goes: .csv or .parquet.")],
) -> None:
    """Average the probabilities of several predictions of the same images."""
    from pipeline.inference.predictions import average, check_output, read_predictions, write_predictions

    output, files = expand(output), [expand(file) for file in files]
    check_output(output)
    if len(files) < 2:
        raise UserError(str(files[0]), "is one file; an ensemble needs at least two")
    resolved = [file.resolve() for file in files]
    if repeated := [file for i, file in enumerate(files) if resolved[i] in resolved[:i]]:
        raise UserError(str(repeated[0]), "is named twice; each file has one vote")
    table = average({str(file): read_predictions(file) for file in files})
    write_predictions(table, output)
    say(make_console(), f"{output}: {len(table):,} images, the mean of {len(files)} files")
