"""Which study is meant by a name."""

from pipeline.errors import UserError, did_you_mean
from pipeline.tracking.study_key import StudyKey
from pipeline.tracking.tracker import MlflowTracker, StudyRuns


def find_studies(tracker: MlflowTracker, name: str) -> list[StudyRuns]:
    """Those of a module's name (`attention`) or of a whole one (`attention-v1-cifar10`), the last one run first.

    A folder's may be named without the digits of its digest, too. UserError where there is none.
    """
    known = tracker.studies()
    found = [study for study in known if study.name == name] or [
        study for study in known if _is_meant(name, study.name)
    ]
    if not found:
        deleted = {its: way for its, way in tracker.deleted_studies().items() if _is_meant(name, its)}
        if deleted:
            goes_on = f"make study NAME={name} goes on with what is left of it"
            raise UserError(
                [f"study {its}: was deleted in MLflow; {way}, or {goes_on}" for its, way in deleted.items()]
            )
        names = sorted(study.name for study in known)
        raise UserError(
            f"no study {name} in the tracking store{did_you_mean(name, names)}; there: {', '.join(names) or 'none'}; "
            "make study makes one, and finds one again whose tags were removed in MLflow"
        )
    return found


def _is_meant(name: str, whole: str) -> bool:
    key = StudyKey.parse(whole)
    return whole == name or bool(key and key.is_meant_by(name))


def find_study(tracker: MlflowTracker, name: str) -> tuple[StudyRuns, str]:
    """The last one run of those that a name means; and a line that says so where there are several, else nothing."""
    first, *others = find_studies(tracker, name)
    names = ", ".join(map(_with_place, others))
    line = f"{_with_place(first)}, the last one run; there are also {names}: NAME= takes whole names"
    return first, line if others else ""


def _with_place(study: StudyRuns) -> str:
    """Its name, and where its data set lay last: digits of a digest tell nobody which folder is meant."""
    return f"{study.name} ({study.places[0]})" if study.places else study.name
