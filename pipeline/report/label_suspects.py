"""Images whose labels the runs of finished studies contradict."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.label_errors import LabelErrors, find_label_errors
from pipeline.report.stored import predictions
from pipeline.tracking import queries
from pipeline.tracking.tags import RunTags, State, StoredRun
from pipeline.tracking.tracker import MlflowTracker

MAX_RUNS = 5  # whose predictions of one validation split are averaged


@dataclass(frozen=True, eq=False)
class Suspects:
    """Suspicious images among those that were predicted by models that weren't trained on them."""

    errors: LabelErrors
    ids: np.ndarray  # int64 (K,): of each error, the image's place in the data set's training part
    num_images: int  # that were predicted
    source: str  # whose predictions these are


def find_suspects(tracker: MlflowTracker, data_digest: str) -> Suspects | None:
    """By the runs on the data set of this digest; None where none finished.

    Finals on folds predict every image: the best recipe's count. Else the best runs' mean on their validation split.
    """
    runs = _finished(tracker, data_digest)
    on_folds = [run for run in runs if RunTags.of(run).role == "final" and int(run.data.params.get("data.folds", 0))]
    chosen = _best_recipe(on_folds) if on_folds else _best_split(runs)[:MAX_RUNS]
    sums, counts, labels = dict[int, np.ndarray](), defaultdict[int, int](int), dict[int, int]()
    for run in chosen:
        if found := predictions(tracker, run.info.run_id):
            for number, label, row in zip(found.ids.tolist(), found.labels.tolist(), found.probabilities, strict=True):
                sums[number] = sums.get(number, 0.0) + row
                counts[number] += 1
                labels[number] = label
    if not sums:
        return None
    ids = np.array(sorted(sums))
    mean = np.stack([sums[number] / counts[number] for number in ids.tolist()])
    errors = find_label_errors(mean, np.array([labels[number] for number in ids.tolist()]))
    what = (
        f"the best recipe on {_num_folds(chosen)} folds"
        if on_folds
        else f"the best {len(chosen)} run{'s' * (len(chosen) != 1)}, validation split"
    )
    names = sorted({str(RunTags.of(run).study) for run in chosen})
    return Suspects(errors, ids[errors.indices], len(ids), f"{what} ({', '.join(names)})")


def _finished(tracker: MlflowTracker, data_digest: str) -> list[StoredRun]:
    """The finished trials and finals on this data, by accuracy."""
    runs = [run for study in queries.studies(tracker) for run in queries.children(tracker, study)]
    tagged = [(run, RunTags.of(run)) for run in runs]
    kept = [
        run
        for run, tags in tagged
        if tags.role in ("trial", "final") and tags.state is State.FINISHED and tags.data_digest == data_digest
    ]
    return sorted(kept, key=_accuracy, reverse=True)


def _best_recipe(runs: list[StoredRun]) -> list[StoredRun]:
    """The runs of the recipe with the highest mean accuracy over the most folds."""
    by_recipe: dict[tuple[str | None, str], list[StoredRun]] = defaultdict(list)
    for run in runs:
        by_recipe[RunTags.of(run).candidate, run.data.params["data.folds"]].append(run)
    return max(by_recipe.values(), key=lambda of_one: (_num_folds(of_one), np.mean([_accuracy(run) for run in of_one])))


def _num_folds(runs: list[StoredRun]) -> int:
    """On how many they were trained: another study may have finals of the same recipe."""
    return len({run.data.params["data.fold"] for run in runs})


def _best_split(runs: list[StoredRun]) -> list[StoredRun]:
    """The runs that share the best one's split."""
    return [run for run in runs if RunTags.of(run).split_digest == RunTags.of(runs[0]).split_digest]


def _accuracy(run: StoredRun) -> float:
    return run.data.metrics.get("val/accuracy", 0.0)
