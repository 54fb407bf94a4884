"""A model's card (Mitchell et al. 2019, arXiv 1810.03993): what it is, how good, how it was made, where it is weak.

Every number is from the run or from the gate's evidence; nothing is measured here but the intervals.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mlflow.entities import Run

from pipeline.evaluation.calibration import reweighting_line
from pipeline.evaluation.scores import SCORE_NAMES, confusion_matrix
from pipeline.evaluation.significance import wilson
from pipeline.inference.classifier import ModelMetadata
from pipeline.models.build import weights_origin
from pipeline.recipe import KIND, Recipe
from pipeline.registry.export import GEOMETRIES
from pipeline.registry.gate import ACCURACY
from pipeline.registry.ledger import VerdictEvidence
from pipeline.tracking.tags import RunTags

DESCRIPTION_LIMIT = 5000  # characters; the registry's column, which PostgreSQL holds it to
WEAKEST = 5  # pairs, and errors

_LICENCES = {
    "cifar10": "CIFAR-10 has no formal licence; its authors ask to cite Krizhevsky, Learning Multiple Layers of "
    "Features from Tiny Images, 2009.",
    "digits": "Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998), UCI: CC BY 4.0.",
}
_OWN_LICENCE = "Images of your own; their licence is not known here."


@dataclass(frozen=True)
class ModelCosts:
    """What model.onnx costs."""

    latency_ms: float  # one image
    bytes: int


def model_card(
    metadata: ModelMetadata, run: Run, predictions: Path, costs: ModelCosts, evidence: VerdictEvidence | None
) -> str:
    """Markdown. `predictions` is the run's predictions.parquet."""
    from pyarrow.parquet import read_table

    table = read_table(predictions)
    ids, labels, predicted, confidence = (table[name].to_numpy() for name in ("id", "label", "predicted", "confidence"))
    reweighted = reweighting_line(metadata.recipe.flat(), np.stack(table["probabilities"].to_numpy()), labels)
    confusion = confusion_matrix(labels, predicted, len(metadata.classes))
    sections = {
        f"Image classifier: {_kind(metadata)} on {metadata.recipe.data.dataset}": _head(metadata, run, confusion),
        **({"Members": _members(metadata)} if metadata.members else {}),
        "Validation split": _classes(metadata.classes, confusion),
        "Evidence of the gate": _evidence(evidence) if evidence else "None: not evaluated on the test split.",
        "Calibration": _calibration(metadata, run, confusion)
        + (f"\n\nAs trained, {reweighted}." if reweighted else ""),
        "Known weaknesses": _weaknesses(metadata.classes, confusion, ids, labels, predicted, confidence),
        "Data": _data(metadata, len(labels)),
        **({"Weights": weights} if (weights := _weights(weights_origin(metadata.recipe), RunTags.of(run))) else {}),
        "Recipe": _recipe(metadata),
        "Cost": _cost(metadata, run, costs),
        "Reproduce": _reproduce(metadata, run),
    }
    first, *others = (f"{title}\n\n{text}\n" for title, text in sections.items())
    return "\n".join([f"# {first}", *(f"## {other}" for other in others)])


def description(card: str) -> str:
    """The card as far as the registry's description takes it, whole lines."""
    if len(card) <= DESCRIPTION_LIMIT:
        return card
    rest = "\nThe whole card: card.md among the model's files.\n"
    return card[: card.rindex("\n", 0, DESCRIPTION_LIMIT - len(rest)) + 1] + rest


def _head(metadata: ModelMetadata, run: Run, confusion: np.ndarray) -> str:
    name = run.info.run_name
    if study := RunTags.of(run).study:
        name = f"{name} of {study}"
    (size, geometry, _), hits, total = metadata.recipe.data.form, int(np.trace(confusion)), int(confusion.sum())
    return (
        f"Takes RGB images of {size} x {size} pixels, gives a probability for each of {len(metadata.classes)} classes: "
        f"{', '.join(map(_plain, metadata.classes))}. Of an image of another shape it sees {GEOMETRIES[geometry]}.\n\n"
        f"Validation accuracy {share(hits, total)}, {total:,} images. From {_plain(name)}, run `{metadata.run_id}`."
    )


def _kind(metadata: ModelMetadata) -> str:
    networks = ", ".join(dict.fromkeys(member.recipe.model.network for member in metadata.members or (metadata,)))
    return f"{metadata.method} of {len(metadata.members)} networks ({networks})" if metadata.members else networks


def _members(metadata: ModelMetadata) -> str:
    how = {
        "mean": "The mean of their probabilities, each with its own temperature.",
        "soup": "One network with the mean of their weights, batch norm's statistics measured anew.",
    }
    rows = [
        (
            f"`{member.run_id}`",
            member.recipe.model.network,
            str(member.recipe.training.seed),
            f"{member.measured['plain'].accuracy:.2%}",
            f"`{member.recipe_digest[:16]}`",
        )
        for member in metadata.members
    ]
    heads = ("run", "network", "seed", "validation accuracy", "recipe's digest")
    return f"{how[metadata.method]} Their recipes are in checkpoint.json.\n\n" + _table(heads, rows)


def _classes(classes: Sequence[str], confusion: np.ndarray) -> str:
    hits, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    rows = [
        (
            _plain(name),
            f"{true[i]:,}",
            share(hits[i], true[i]),
            share(hits[i], predicted[i]),
            _f1(hits[i], true[i] + predicted[i]),
        )
        for i, name in enumerate(classes)
    ]
    return (
        _table(("class", "images", "recall", "precision", "F1"), rows)
        + "\n\nIn brackets: 95 % intervals over images (Wilson), one class at a time. The split chose this model among "
        "others, which flatters it."
    )


def _calibration(metadata: ModelMetadata, run: Run, confusion: np.ndarray) -> str:
    before, after = run.data.metrics.get("val/ece"), metadata.measured["plain"].ece
    wrong = int(confusion.sum() - np.trace(confusion))
    return (
        f"Expected calibration error on the validation split {_number(before, '.4f')} as trained, {after:.4f} with the "
        f"temperature {metadata.calibration.temperature:.3f} (fitted and measured on different fifths), which the model "
        f"has inside. What calibration is known from: {confusion.sum():,} images, {wrong:,} of them wrong."
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
    confusions = [
        f"{names[true]} taken for {names[other]}: {wrong[true, other]} of {confusion[true].sum():,}"
        for true, other in zip(*np.unravel_index(pairs, wrong.shape), strict=True)
        if wrong[true, other]
    ]
    order = np.lexsort((np.arange(len(ids)), -confidence))
    errors = order[predicted[order] != labels[order]][:WEAKEST]
    most_confident = [
        f"image {ids[i]}: {names[labels[i]]}, taken for {names[predicted[i]]} with {confidence[i]:.1%}" for i in errors
    ]
    return (
        f"Most mixed up: {'; '.join(confusions) or 'nothing'}.\n\nMost confident errors (place in the training part, "
        f"confidence before the temperature): {'; '.join(most_confident) or 'none'}.\n\nWhat shows none of its classes gets "
        "one of them all the same; other cameras, sizes and crops than the data set's were not tried."
    )


def _data(metadata: ModelMetadata, num_validation: int) -> str:
    data = metadata.recipe.data
    return (
        f"{_plain(data.dataset)} at {data.image_size} x {data.image_size} pixels, digest `{metadata.data_digest}`; "
        f"validation split of {num_validation:,} images, split digest `{metadata.split_digest}`. "
        f"Licence: {_LICENCES.get(data.dataset, _OWN_LICENCE)}"
    )


def _weights(origin: str | None, tags: RunTags) -> str:
    lines = [f"Started from {origin}"] if origin else []
    if origin and tags.weights_sha256:
        lines.append(f"SHA-256 of the file: `{tags.weights_sha256}`.")
    if tags.pruner:
        lines.append(f"They are the most important channels of run `{tags.compresses}`, by {tags.pruner}.")
    elif tags.compresses:
        lines.append(f"Started from random ones, and learnt from the predictions of run `{tags.compresses}`, too.")
    return " ".join(lines)


def _recipe(metadata: ModelMetadata) -> str:
    whose = f" of the first member, run `{metadata.members[0].run_id}`" if metadata.members else ""
    head = f"Digest `{metadata.recipe_digest}`{whose}. What differs from the defaults:"
    return f"{head}\n\n{_changes(metadata.recipe)}"


def _changes(recipe: Recipe) -> str:
    return "\n".join(_plain(f"- {section}: {fields}") for section, fields in settings(recipe).items())


def settings(recipe: Recipe) -> dict[str, str]:
    """Section -> its kind, and its fields that differ from the defaults."""
    changed = recipe.model_dump(mode="json", exclude_defaults=True)
    for section, kind in KIND.items():
        changed[section] = {kind: getattr(getattr(recipe, section), kind), **changed.get(section, {})}
    return {
        section: ", ".join(f"{name} {_setting(value)}" for name, value in fields.items())
        for section, fields in changed.items()
    }


def _setting(value: object) -> str:
    return format(value, ".6g") if isinstance(value, float) else json.dumps(value).strip('"')


def _cost(metadata: ModelMetadata, run: Run, costs: ModelCosts) -> str:
    metrics, tags = run.data.metrics, RunTags.of(run)
    epochs = sum(each.recipe.training.epochs for each in metadata.members or (metadata,))
    return (
        f"Trained {epochs} epochs in {_number(metrics.get('time/training_s'), ',.0f')} s on "
        f"{_plain(tags.hardware or 'unknown hardware')} (torch {tags.torch or 'unknown'}). "
        f"{_number(metrics.get('model/parameters'), ',.0f')} parameters; model.onnx has {costs.bytes / 1e6:.2f} MB and takes "
        f"{costs.latency_ms:.2f} ms for an image (onnxruntime, one CPU thread, median, where it was packed)."
    )


def _reproduce(metadata: ModelMetadata, run: Run) -> str:
    tags = RunTags.of(run)
    if metadata.members:
        members = " ".join(member.run_id for member in metadata.members)
        return f"`reproduce` each member; `ensemble --runs '{members}' --method {metadata.method}` combines them."
    return f"`reproduce {run.info.run_id}`; commit `{tags.commit or 'none'}`{tags.uncommitted}."


def _evidence(evidence: VerdictEvidence) -> str:
    record = evidence.record
    opponent, correct = _plain(record.opponent), record.correct
    shares = [f"Test accuracy {share(correct[evidence.run], record.images)}, {record.images:,} images"]
    if run := record.opponent_run:
        shares.append(f"that of the {opponent}, run `{run}`: {share(correct[run], record.images)}")
    if record.objective != ACCURACY:  # by which it was compared
        runs = [evidence.run, record.opponent_run]
        values = " against ".join(f"{record.scores[run]:.1%}" for run in runs if run)
        shares.append(f"{SCORE_NAMES[record.objective]}, the study's objective: {values}")
    rows = [
        [_plain(result.rule), result.number, result.threshold, "yes" if result.passed else "no", _plain(result.reason)]
        for result in record.verdict.results
    ]
    passed = "passed" if record.verdict.passed else "refused"
    return (
        f"{'; '.join(shares)}.\n\n"
        f"Against the {opponent}{record.terms}, by {_plain(evidence.user)} on {evidence.decided[:10]}: {passed}. Test split "
        f"`{evidence.test_split[:16]}`, comparison number {record.comparison} on it.{_reason(evidence.reason)}"
        f"{_caution(record.caution)}\n\n" + _table(("rule", "result", "should be", "passed", "how"), rows)
    )


def _reason(text: str) -> str:
    return f" Why this model: {_plain(text)}." if text else ""


def _caution(text: str) -> str:
    return f"\n\nCaution: {_plain(text)}." if text else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(hits: int, total: int) -> str:
    """A rate with its 95 % interval: `80.0% (79.2% to 80.8%)`."""
    low, high = wilson(hits, total) if total else (0.0, 1.0)
    return f"{hits / total if total else 0:.1%} ({low:.1%} to {high:.1%})"


def _f1(hits: int, both: int) -> str:
    return f"{2 * hits / both if both else 0:.1%}"


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def _plain(text: str) -> str:
    """A name in Markdown: of a class or a folder, it may hold anything."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#!" else sign if sign.isprintable() else " " for sign in text)
