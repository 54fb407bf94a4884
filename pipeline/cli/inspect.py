"""`inspect`: a data set before anything is trained on it."""

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from pipeline.cli.common import HOME, data_folder, existing_tracker, make_console, page_file, print_next, say
from pipeline.cli.make import COMMAND_LINE
from pipeline.cli.options import DataDirOption, StudyOptions, TrackingOption, file_problems, with_study_options
from pipeline.cli.views import print_table
from pipeline.errors import Problem, UserError, counted, validation_problems

if TYPE_CHECKING:
    from pipeline.report.inspection import Inspection
    from pipeline.sections.data import Data

_OF_FILES = ("columns", "test_fraction", "duplicates")
_MOST_CLASSES = 20  # that the terminal lists


@with_study_options(*(name for name in StudyOptions.model_fields if name not in _OF_FILES))
def inspect(
    dataset: Annotated[
        str,
        typer.Argument(metavar="DATASET", help="cifar10, digits, a folder of images by class, or a manifest."),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; default mlruns/reports/inspect-<data set>.html.")
    ] = None,
    data_dir: DataDirOption = Path("data"),
    tracking_uri: TrackingOption = None,
    **typed: str | bool | None,
) -> None:
    """Look at a data set before a search: counts, sizes, damaged files, duplicates, suspected labels; a page and a table."""
    about = _about(dataset, typed)

    from pipeline.report.inspection import inspect as look
    from pipeline.report.inspection_page import findings, inspection_page
    from pipeline.report.render import write

    console = make_console()
    file = page_file(output) if output else None
    tracker = existing_tracker(tracking_uri)
    with make_console(stderr=True).status("looking at every image"):
        found = look(about, data_folder(data_dir, about.dataset).absolute(), HOME, tracker)
    file = file or HOME / "reports" / f"inspect-{found.name}.html"
    _print_counts(found)
    say(console, *found.notes, *found.lines())
    table = file.with_name(f"{file.stem}-findings.csv")  # photos.csv may be the manifest
    page = inspection_page(found, table.name, COMMAND_LINE.word)
    write(page, file)
    write(findings(found).to_csv(index=False), table)
    say(console, f"page: {file} ({len(page.encode()) / 1e6:.1f} MB, opens offline); all that was found: {table}")
    if steps := _next(found, about):
        print_next(console, steps)


def _about(dataset: str, typed: dict[str, str | bool | None]) -> "Data":
    """The data set's section of a recipe; UserError for options that are none."""
    from pipeline.data.datasets import listed
    from pipeline.sections.data import Data

    problems: list[Problem] = []
    options = StudyOptions.parse(typed, problems)
    fields = {name: value for name in _OF_FILES if (value := getattr(options, name)) is not None}
    typed_fields = {f"data.{name}": value for name, value in fields.items()}
    problems += file_problems(typed_fields, dataset, None)
    if problems:
        raise UserError.many(problems)
    try:
        about = Data.model_validate({"dataset": os.path.expanduser(dataset), **fields})
        if options.test_fraction and (problems := file_problems(typed_fields, dataset, listed(about, HOME))):
            raise UserError.many(problems)
        return about
    except ValidationError as error:
        problems = validation_problems(error)
        raise UserError.many([replace(problem, subject=f"data.{problem.subject}") for problem in problems]) from None


def _next(found: "Inspection", about: "Data") -> dict[str, str]:
    """What to do with the data set, and the command; nothing where a study would refuse it."""
    from pipeline.data.listing import VALIDATION

    if VALIDATION not in found.counts:
        return {}
    what, given = "search on it", [name for name in ("dataset", *_OF_FILES) if name in about.model_fields_set]
    options = [f"--{name.replace('_', '-')} {shlex.quote(str(getattr(about, name)))}" for name in given]
    if unreadable := found.survey.unreadable:
        what += f", without {counted(len(unreadable), 'file')} that can't be read"
        options.append("--corrupt skip")
    return {what: f"study NAME {' '.join(options)}"}


def _print_counts(found: "Inspection") -> None:
    """Images of each class by split, the classes with the fewest training images first."""
    counts = list(found.counts.values())
    order = sorted(range(len(found.classes)), key=lambda label: counts[0][label])
    rows = [[found.classes[label][:40], *(f"{of[label]:,}" for of in counts)] for label in order[:_MOST_CLASSES]]
    if len(order) > _MOST_CLASSES:
        rest = [sum(int(of[label]) for label in order[_MOST_CLASSES:]) for of in counts]
        rows.append([f"{len(order) - _MOST_CLASSES} more", *(f"{count:,}" for count in rest)])
    rows.append(["all", *(f"{of.sum():,}" for of in counts)])
    print_table(make_console(), ["class", *found.counts], rows)
