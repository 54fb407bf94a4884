"""A model's card (Mitchell et al. 2019, arXiv 1810.03993): what it is, how good, how it was made, where it is weak.

Every number is from the run or from the gate's evidence; nothing is measured here but the intervals.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import Run

from pipeline.evaluation.scores import confusion_matrix
from pipeline.inference.classifier import ModelMetadata
from pipeline.recipe import KIND, Recipe

DESCRIPTION_LIMIT = 5000  # characters; the registry's column, which PostgreSQL holds it to
WEAKEST = 5  # pairs, and errors
_Z = 1.959964  # of a normal distribution's middle 95 %

_LICENCES = {
    "cifar10": "CIFAR-10 has no formal licence; its authors ask to cite Krizhevsky, Learning Multiple Layers of "
    "Features from Tiny Images, 2009.",
    "digits": "Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998), UCI: CC BY 4.0.",
}
_OWN_LICENCE = "A folder of your own; its licence is not known here."


def wilson(hits: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927, JASA 22); (0, 1) of no images."""
    if not total:
        return 0.0, 1.0
    share, spread = hits / total, _Z**2 / total
    middle = (share + spread / 2) / (1 + spread)
    reach = _Z * np.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, float(middle - reach)), min(1.0, float(middle + reach))


def model_card(
    facts: ModelMetadata, run: Run, predictions: Path, latency_ms: float, size: int, evidence: Mapping[str, Any] | None
) -> str:
    """Markdown. `predictions` is the run's predictions.parquet; latency and size (bytes) are those of model.onnx."""
    from pyarrow.parquet import read_table

    table = read_table(predictions)
    ids, labels, predicted, confidence = (table[name].to_numpy() for name in ("id", "label", "predicted", "confidence"))
    confusion = confusion_matrix(labels, predicted, len(facts.classes))
    sections = {
        f"Image classifier: {facts.recipe.model.network} on {facts.recipe.data.dataset}": _head(facts, run, confusion),
        "Validation split": _classes(facts.classes, confusion),
        "Evidence of the gate": _evidence(evidence) if evidence else "None: not judged on the test split.",
        "Calibration": _calibration(facts, run),
        "Known weaknesses": _weaknesses(facts.classes, confusion, ids, labels, predicted, confidence),
        "Data": _data(facts),
        "Recipe": f"Digest `{facts.recipe_digest}`. What differs from the defaults:\n\n{_recipe(facts.recipe)}",
        "Cost": _cost(facts, run, latency_ms, size),
        "Reproduce": _reproduce(run),
    }
    first, *others = (f"{title}\n\n{text}\n" for title, text in sections.items())
    return "\n".join([f"# {first}", *(f"## {other}" for other in others)])


def description(card: str) -> str:
    """The card as far as the registry's description takes it, whole lines."""
    if len(card) <= DESCRIPTION_LIMIT:
        return card
    rest = "\nThe whole card: card.md among the model's files.\n"
    return card[: card.rindex("\n", 0, DESCRIPTION_LIMIT - len(rest)) + 1] + rest


def _head(facts: ModelMetadata, run: Run, confusion: np.ndarray) -> str:
    name = f"{run.info.run_name} of {run.data.tags['study']}" if "study" in run.data.tags else run.info.run_name
    size, hits, total = facts.recipe.data.image_size, int(np.trace(confusion)), int(confusion.sum())
    return (
        f"Takes RGB images of {size} x {size} pixels, gives a probability for each of {len(facts.classes)} classes: "
        f"{', '.join(map(_plain, facts.classes))}.\n\n"
        f"Validation accuracy {_share(hits, total)}, {total:,} images. From {_plain(name)}, run `{facts.run_id}`."
    )


def _classes(classes: Sequence[str], confusion: np.ndarray) -> str:
    hits, true, said = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    rows = [
        (
            _plain(name),
            f"{true[i]:,}",
            _share(hits[i], true[i]),
            _share(hits[i], said[i]),
            _f1(hits[i], true[i] + said[i]),
        )
        for i, name in enumerate(classes)
    ]
    return (
        _table(("class", "images", "recall", "precision", "F1"), rows)
        + "\n\nIn brackets: 95 % intervals over images (Wilson), one class at a time. The split chose this model among "
        "others, which flatters it."
    )


def _calibration(facts: ModelMetadata, run: Run) -> str:
    before, after = run.data.metrics.get("val/ece"), facts.measured["plain"].ece
    return (
        f"Expected calibration error on the validation split {_number(before, '.4f')} as trained, {after:.4f} with the "
        f"temperature {facts.fitted.temperature:.3f} (fitted and judged on different fifths), which the model has inside."
    )


def _weaknesses(
    classes: Sequence[str],
    confusion: np.ndarray,
    ids: np.ndarray,
    labels: np.ndarray,
    predicted: np.ndarray,
    confidence: np.ndarray,
) -> str:
    names = [_plain(name) for name in classes]
    wrong = confusion - np.diag(np.diag(confusion))
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:WEAKEST]
    mixed_up = [
        f"{names[true]} taken for {names[said]}: {wrong[true, said]} of {confusion[true].sum():,}"
        for true, said in zip(*np.unravel_index(pairs, wrong.shape), strict=True)
        if wrong[true, said]
    ]
    order = np.lexsort((np.arange(len(ids)), -confidence))
    errors = order[predicted[order] != labels[order]][:WEAKEST]
    surest = [
        f"image {ids[i]}: {names[labels[i]]}, taken for {names[predicted[i]]} with {confidence[i]:.1%}" for i in errors
    ]
    return (
        f"Most mixed up: {'; '.join(mixed_up) or 'nothing'}.\n\nMost confident errors (place in the training part, "
        f"confidence before the temperature): {'; '.join(surest) or 'none'}.\n\nWhat shows none of its classes gets one "
        "of them all the same; other cameras, sizes and crops than the data set's were not tried."
    )


def _data(facts: ModelMetadata) -> str:
    data = facts.recipe.data
    return (
        f"{_plain(data.dataset)} at {data.image_size} x {data.image_size} pixels, digest `{facts.data_digest}`; "
        f"validation {data.validation_fraction:.0%} of the training part, split digest `{facts.split_digest}`. "
        f"Licence: {_LICENCES.get(data.dataset, _OWN_LICENCE)}"
    )


def _recipe(recipe: Recipe) -> str:
    changed = recipe.model_dump(mode="json", exclude_defaults=True)
    for section, kind in KIND.items():
        changed[section] = {kind: getattr(getattr(recipe, section), kind), **changed.get(section, {})}
    lines = [
        f"- {section}: " + ", ".join(f"{name} {_setting(value)}" for name, value in fields.items())
        for section, fields in changed.items()
    ]
    return "\n".join(map(_plain, lines))


def _setting(value: object) -> str:
    return format(value, ".6g") if isinstance(value, float) else json.dumps(value).strip('"')


def _cost(facts: ModelMetadata, run: Run, latency_ms: float, size: int) -> str:
    metrics, tags = run.data.metrics, run.data.tags
    return (
        f"Trained {facts.recipe.training.epochs} epochs in {_number(metrics.get('time/training_s'), ',.0f')} s on "
        f"{_plain(tags.get('hardware', 'unknown hardware'))} (torch {tags.get('torch', 'unknown')}). "
        f"{_number(metrics.get('model/parameters'), ',.0f')} parameters; model.onnx has {size / 1e6:.2f} MB and takes "
        f"{latency_ms:.2f} ms for an image (onnxruntime, one CPU thread, median, where it was packed)."
    )


def _reproduce(run: Run) -> str:
    tags = run.data.tags
    changed = (
        ", with changes that were not committed: `diff.patch` of the run" if tags.get("git_dirty") == "true" else ""
    )
    return f"`make reproduce RUN={run.info.run_id}`; commit `{tags.get('mlflow.source.git.commit', 'none')}`{changed}."


def _evidence(evidence: Mapping[str, Any]) -> str:
    """What `judging.evidence` says."""
    images, right, run = evidence["images"], evidence["right"], evidence["run"]
    other, verdict = evidence["other"], evidence["verdict"]
    shares = [f"Test accuracy {_share(right[run], images)}, {images:,} images"]
    if against := evidence["against"]:
        shares.append(f"that of the {_plain(other)}, run `{against}`: {_share(right[against], images)}")
    rows = [
        [_plain(its["rule"]), its["number"], its["threshold"], "yes" if its["passed"] else "no", _plain(its["why"])]
        for its in verdict["findings"]
    ]
    passed = "passed" if verdict["passed"] else "refused"
    return (
        f"{'; '.join(shares)}.\n\n"
        f"Against the {_plain(other)}, by {_plain(evidence['by'])} on {evidence['judged'][:10]}: {passed}. Test split "
        f"`{evidence['test_split'][:16]}`.{_reason(evidence['reason'])}\n\n"
        + _table(("rule", "result", "should be", "passed", "how"), rows)
    )


def _reason(text: str) -> str:
    return f" Why this model: {_plain(text)}." if text else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(hits: int, total: int) -> str:
    low, high = wilson(int(hits), int(total))
    return f"{hits / total if total else 0:.1%} ({low:.1%} to {high:.1%})"


def _f1(hits: int, both: int) -> str:
    return f"{2 * hits / both if both else 0:.1%}"


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def _plain(text: str) -> str:
    """A name in Markdown: of a class or a folder, it may hold anything."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#!" else sign if sign.isprintable() else " " for sign in text)
