"""Which study is meant by a name."""

import re

from pipeline.errors import UserError, did_you_mean
from pipeline.tracking.runs import MlflowTracker, StudyRuns


def find_studies(tracker: MlflowTracker, name: str) -> list[StudyRuns]:
    """Those of a module's name (`attention`) or of a whole one (`attention-v1-cifar10`), the last one run first.

    UserError where there is none.
    """
    known = tracker.studies()
    found = [study for study in known if study.name == name or re.match(rf"{re.escape(name)}-v\d+-", study.name)]
    if not found:
        names = sorted(study.name for study in known)
        raise UserError(
            f"no study {name} in the tracking store{did_you_mean(name, names)}; there: {', '.join(names) or 'none'}"
        )
    return found


def find_study(tracker: MlflowTracker, name: str) -> tuple[StudyRuns, str]:
    """The last one run of those that a name means; and a line that says so where there are several, else nothing."""
    first, *others = find_studies(tracker, name)
    names = ", ".join(study.name for study in others)
    return first, f"{first.name}, the last one run; there are also {names}: NAME= takes whole names" if others else ""
