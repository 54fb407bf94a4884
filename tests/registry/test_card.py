"""A card shows its run: numbers with their intervals, weaknesses, where it comes from."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Trained

from pipeline.registry import card
from pipeline.registry.package import Package
from pipeline.tracking.tracker import MlflowTracker


def test_shares_have_intervals_also_of_no_images() -> None:
    shares = [card.share(*counts) for counts in ((81, 263), (0, 20), (20, 20), (0, 0))]
    assert shares[0] == "30.8% (25.5% to 36.6%)", "Newcombe 1998"
    assert shares[1:] == ["0.0% (0.0% to 16.1%)", "100.0% (83.9% to 100.0%)", "0.0% (0.0% to 100.0%)"]


def test_card_shows_what_the_run_predicted(packed: Package, trained: Trained) -> None:
    tracker = MlflowTracker(trained.home)
    stored = pq.read_table(tracker.client.download_artifacts(trained.finished, "predictions.parquet")).to_pandas()
    right = stored.label == stored.predicted
    assert f"Validation accuracy {right.mean():.1%} (" in packed.card
    [row] = [line for line in packed.card.splitlines() if line.startswith("| 4 |")]
    fours = stored[stored.label == 4]
    assert row.startswith(f"| 4 | {len(fours)} | {(fours.predicted == 4).mean():.1%} (")
    wrong = stored[~right]
    assert f"What calibration is known from: {len(stored)} images, {len(wrong)} of them wrong." in packed.card
    surest = wrong.loc[wrong.confidence.idxmax()]
    error = f"image {surest.id:.0f}: {surest.label:.0f}, taken for {surest.predicted:.0f} with {surest.confidence:.1%}"
    assert f"before the temperature): {error}; " in packed.card
    (true, taken), count = next(iter(wrong.value_counts(["label", "predicted"]).items()))
    assert f"taken for {taken}: {count} of {(stored.label == true).sum()}" in packed.card


def test_card_shows_origin_evidence_and_how_to_reproduce(packed: Package, trained: Trained) -> None:
    run = MlflowTracker(trained.home).client.get_run(trained.finished)
    for text in (
        f"`reproduce {trained.finished}`",
        f"commit `{run.data.tags['mlflow.source.git.commit']}`",
        f"digest `{run.data.tags['data_digest']}`",
        f"split digest `{run.data.tags['split_digest']}`",
        f"Digest `{run.data.tags['recipe_digest']}`",
        "- model: network attention, widths \\[4, 8\\], ",
        "UCI: CC BY 4.0",
        f"{run.data.metrics['model/parameters']:,.0f} parameters",
        f"{run.data.metrics['val/ece']:.4f} as trained, {run.data.metrics['calibration/ece']:.4f} with the temperature",
        "Test accuracy 75.0% (68.6% to 80.5%), 200 images; that of the control, run `c0ffee`: 60.0% (53.1% to 66.5%)",
        "Against the control, by me on 2026-01-02: passed. Test split `abababababababab`, comparison number 1 on it. "
        "Why this model: finals\\_won.",
        "| better | p = 0.0123 | at most 0.05 | yes | McNemar |",
    ):
        assert text in packed.card
    assert "beta2" not in packed.card and "warmup" not in packed.card, "only what differs from the defaults"


def test_long_card_is_cut_at_a_line_for_the_registry() -> None:
    text = "".join(f"| line {number} |\n" for number in range(1000))
    cut = card.description(text)
    assert len(cut) <= card.DESCRIPTION_LIMIT
    assert cut.endswith(" |\n\nThe whole card: card.md among the model's files.\n")
    assert text.startswith(cut.partition("\nThe whole")[0])
    assert card.description(cut) == cut


def test_odd_names_stay_in_their_cell() -> None:
    classes = ["a|b", "`x`\n# y", "<img src=z>"]
    table = card._classes(classes, np.diag([3, 0, 5])).splitlines()
    assert [line.count(" | ") for line in table[:5]] == [4] * 5
    assert table[3].startswith("| \\`x\\` \\# y | 0 | 0.0% (0.0% to 100.0%)")
    assert "\\<img src=z\\>" in table[4]


@pytest.mark.parametrize(("dataset", "licence"), [("cifar10", "Krizhevsky"), ("pets", "not known here")])
def test_licence_is_that_of_the_data_set(dataset: str, licence: str, packed: Package) -> None:
    from pipeline.inference.classifier import ModelMetadata
    from pipeline.training.checkpoints import read_checkpoint

    metadata = ModelMetadata.model_validate(read_checkpoint(packed.folder))
    data = metadata.recipe.data.model_copy(update={"dataset": dataset})
    changed = metadata.model_copy(update={"recipe": metadata.recipe.model_copy(update={"data": data})})
    assert licence in card._data(changed, 144)


def test_folder_keeps_card_and_evidence(packed: Package) -> None:
    assert (Path(packed.folder) / "card.md").read_text() == packed.card
    assert '"p = 0.0123"' in (packed.folder / "evidence.json").read_text()
