"""What people did in MLflow's pages to runs that the code reads: which are whole, which is the control, what is left out."""

import re
from collections.abc import Iterable, Sequence

from mlflow.entities import Run as StoredRun

from pipeline.tracking.store import RUN_KEY

_KEY, _DIGEST = r"[0-9a-f]{32}", r".+"
_TRAINED = {"recipe_digest": _DIGEST, "data_digest": _DIGEST, "split_digest": _DIGEST}
_OF_STUDY = {"study": r".+", "trial": r"\d+"}
# Role -> the tags that are read of its runs, each with its form. Whoever may delete a tag in MLflow may not break a command.
_FORMS = {
    "study": {"study": r".+", "objective": r"val/(accuracy|f1_macro)"},
    "trial": _TRAINED | _OF_STUDY,
    "final": _TRAINED | _OF_STUDY,
    "reproduction": _TRAINED,
}
_STATE = {"state": "finished|pruned|failed|interrupted"}


def broken_tags(run: StoredRun, has_key: bool = False) -> list[str]:
    """The tags that the code needs of a run and that are gone, or hold what the code never writes; `role` if that is one.

    Its key is one of them where it `has_key`: runs older than keys go on without.
    """
    tags = run.data.tags
    forms = _FORMS.get(tags.get("role", ""))
    if forms is None:
        return ["role"]
    if tags["role"] != "study" and run.info.status != "RUNNING":
        forms = forms | _STATE
    if has_key:
        forms = forms | {RUN_KEY: _KEY}
    return [name for name, form in forms.items() if not re.fullmatch(form, tags.get(name, ""), re.DOTALL)]


def whole(runs: Iterable[StoredRun]) -> Iterable[StoredRun]:
    """Those whose tags are all there."""
    return (run for run in runs if not broken_tags(run))


def controls(trials: Sequence[StoredRun]) -> list[StoredRun]:
    """Of a study's trials those of the base recipe; the run's name may be another by now, trial 0 is always one."""
    marked = [run for run in trials if _is_marked(run)]
    return marked or [run for run in trials if run.data.tags.get("trial") == "0"]


def _is_marked(run: StoredRun) -> bool:
    return run.data.tags.get("control") == "true" or (run.info.run_name or "").endswith("(control)")


def left_out(runs: Sequence[StoredRun], deleted: Sequence[StoredRun], way_back: str) -> list[str]:
    """A line for the trials and finals of a study that were deleted, one for those that lost tags; nothing where all is there.

    Not those that were trained again.
    """
    there = {_identity(run) for run in whole(runs)}
    gone = [run for run in deleted if run.data.tags.get("role") in ("trial", "final") and _identity(run) not in there]
    broken = [f"{called(run)}: {', '.join(names)}" for run in runs if (names := broken_tags(run))]
    lines = []
    if gone:
        them = "it" if len(gone) == 1 else "them"
        names = sorted(str(run.info.run_name) for run in gone)
        anew = ", or make finals trains a final anew" * any(run.data.tags["role"] == "final" for run in gone)
        way_back = way_back.replace(" it ", f" {them} ", 1)
        lines.append(f"left out, deleted in MLflow: {_first(names, ', ')}; to have {them} back, {way_back}{anew}")
    if broken:
        lines.append(
            f"left out, tags were removed or changed in MLflow: {_first(broken, '; ')}; make audit FIX=1 writes those of "
            "trials again; a final without can be deleted, and is trained anew"
        )
    return lines


def called(run: StoredRun) -> str:
    """`trial 3 of attention-v1-digits (run 0123...)`."""
    study = run.data.tags.get("study")
    of = f" of {study}" if study and run.data.tags.get("role") != "study" else ""
    return f"{run.info.run_name}{of} (run {run.info.run_id})"


def _first(names: Sequence[str], separator: str, most: int = 10) -> str:
    return separator.join([*names[:most], *["..."][: len(names) > most]])


def _identity(run: StoredRun) -> tuple[str | None, ...]:
    return tuple(run.data.tags.get(name) for name in ("role", "trial", "recipe_digest"))
