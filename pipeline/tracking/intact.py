"""What people changed in MLflow's UI at runs that the code reads: which are intact, which is the control, what is omitted."""

from collections.abc import Iterable, Sequence

from pipeline.tracking.tags import RunTags, StoredRun

_TRAINED = ("recipe_digest", "data_digest", "split_digest")
_TRIAL = (*_TRAINED, "study", "trial")
# Role -> the tags without which no command can read such a run.
_REQUIRED = {
    "study": ("study", "objective"),
    "trial": _TRIAL,
    "final": _TRIAL,
    "reproduction": _TRAINED,
    "compressed": (*_TRAINED, "compresses"),
    "ensemble": (*_TRAINED, "method", "members"),
}


def missing_tags(run: StoredRun, with_key: bool = False) -> list[str]:
    """The tags that the code needs of a run and that were removed, or hold what the code never writes.

    Only `role` where that is one of them: it says which others are needed. `with_key` includes `run_key`, which commands
    can do without.
    """
    tags = RunTags.of(run)
    if tags.role is None:
        return ["role"]
    has_ended = tags.role != "study" and run.info.status != "RUNNING"
    required = [*_REQUIRED[tags.role], *(["state"] if has_ended else []), *(["run_key"] if with_key else [])]
    return [name for name in required if getattr(tags, name) is None]


def intact(runs: Iterable[StoredRun]) -> Iterable[StoredRun]:
    """Those of the runs that no tag is missing of."""
    return (run for run in runs if not missing_tags(run))


def control_runs(trials: Sequence[StoredRun]) -> list[StoredRun]:
    """Of a study's trials those of the base recipe: those that are marked as control, else trial 0."""
    return [run for run in trials if _is_marked(run)] or [run for run in trials if RunTags.of(run).trial == 0]


def _is_marked(run: StoredRun) -> bool:
    return bool(RunTags.of(run).control) or (run.info.run_name or "").endswith("(control)")


def describe_omitted(runs: Sequence[StoredRun], deleted: Sequence[StoredRun], restore: str) -> list[str]:
    """A line for a study's deleted trials and finals, and one for those with missing tags; empty where all are intact.

    A deleted run that was trained again is no longer omitted. `restore` says how a deleted run is restored.
    """
    present = {_identity(run) for run in intact(runs)}
    gone = [run for run in deleted if RunTags.of(run).role in ("trial", "final") and _identity(run) not in present]
    broken = [f"{run_label(run)}: {', '.join(names)}" for run in runs if (names := missing_tags(run))]
    lines = []
    if gone:
        pronoun = "it" if len(gone) == 1 else "them"
        names = sorted(str(run.info.run_name) for run in gone)
        retrain = ", or `finals` trains a final again" * any(RunTags.of(run).role == "final" for run in gone)
        restore = restore.replace(" it ", f" {pronoun} ", 1)
        lines.append(f"omitted, deleted in MLflow: {_shortened(names, ', ')}; {restore}{retrain}")
    if broken:
        lines.append(
            f"omitted, tags were removed or changed in MLflow: {_shortened(broken, '; ')}; `audit --fix` restores those of "
            "trials; delete a final without its tags, and `finals` trains it again"
        )
    return lines


def run_label(run: StoredRun) -> str:
    """`trial 3 of attention-v1-digits, run 0123...`."""
    tags = RunTags.of(run)
    of_study = f" of {tags.study}" if tags.study and tags.role != "study" else ""
    return f"{run.info.run_name}{of_study}, run {run.info.run_id}"


def _shortened(names: Sequence[str], separator: str, limit: int = 10) -> str:
    return separator.join([*names[:limit], *["..."][: len(names) > limit]])


def _identity(run: StoredRun) -> tuple[object, ...]:
    tags = RunTags.of(run)
    return tags.role, tags.trial, tags.recipe_digest
