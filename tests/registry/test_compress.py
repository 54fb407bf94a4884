"""A run is pruned, trained on under a run of its own, and from there on is a run like any other."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from pipeline.data.prepare import TrainingData
from pipeline.disk import sha256_of
from pipeline.errors import DataError, UserError
from pipeline.inference.classifier import Classifier
from pipeline.registry import compress, initial_weights, reproduce
from pipeline.registry.compress import Compression
from pipeline.registry.gate import Rules
from pipeline.registry.opponents import seed_scores
from pipeline.registry.promote import promote
from pipeline.sections.curriculum import Curriculum
from pipeline.tracking import queries
from pipeline.tracking.models import find_model
from pipeline.tracking.tags import RunTags
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.checkpoints import WEIGHTS, read_checkpoint
from registry.helpers import DATA, RULES, RecordingObserver, Store

CHEAPER = {"may_lose": 1, "size_factor": 0.9999}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Done:
    """A compression that was trained."""

    tracker: MlflowTracker
    plan: Compression
    run: str


def plans_of(store: Store, tracker: MlflowTracker, run: str, distil: bool = False) -> list[Compression]:
    with find_model(store.home, None, run) as model:
        original = Classifier.load(model.folder, CPU)
    return compress.plan_compressions(tracker, original, 0.05, None, distil, CPU)


@pytest.fixture(scope="module")
def done(store: Store, digits: TrainingData) -> Done:
    tracker = MlflowTracker(store.home)
    [plan] = plans_of(store, tracker, store.rival)
    outcome = compress.train(tracker, plan, digits, CPU)
    return Done(tracker, plan, tracker.id_of(outcome.run_key))


def test_pruned_network_is_a_child_of_its_run(store: Store, done: Done) -> None:
    recipe, original = done.plan.recipe, done.plan.original.metadata.recipe
    run = done.tracker.client.get_run(done.run)
    tags = RunTags.of(run)
    assert (tags.role, tags.compresses, tags.parent_run) == ("compressed", store.rival, store.rival)
    assert (tags.sparsity, tags.study, tags.method) == (0.05, "tiny-v1-digits", "pruned")
    assert (tags.pruner or "").startswith("torch-pruning ")
    assert (
        run.data.metrics["model/parameters"] < done.tracker.client.get_run(store.rival).data.metrics["model/parameters"]
    )
    changed = original.difference(recipe)
    assert changed.keys() == {"model.widths", "optimizer.lr", "training.epochs", "transfer.weights"}
    assert changed["training.epochs"] == (9, 3) and changed["optimizer.lr"][1] == pytest.approx(0.03)
    file = recipe.transfer.weights_file
    assert file and tags.weights_sha256 == file[1] == sha256_of(Path(file[0]))
    [study] = queries.studies(done.tracker)
    assert done.run not in {child.info.run_id for child in queries.children(done.tracker, study)}


def test_trained_only_once(store: Store, done: Done) -> None:
    pruned, distilled = plans_of(store, done.tracker, store.rival, distil=True)
    assert compress.finished_run(done.tracker, pruned) == done.run
    assert compress.finished_run(done.tracker, distilled) is None


def test_pruned_network_is_trained_on_with_whole_images(done: Done) -> None:
    original = done.plan.original
    growing = original.metadata.recipe.changed({"curriculum.start_size": 4, "curriculum.start_strength": 0.2})
    metadata = original.metadata.model_copy(update={"recipe": growing})
    [plan] = compress.plan_compressions(done.tracker, replace(original, metadata=metadata), 0.05, None, False, CPU)
    assert plan.recipe.curriculum == Curriculum()


def test_found_where_the_weights_lie_elsewhere(done: Done) -> None:
    """As after a move of the folder; the run gets what a kill kept away."""
    moved = done.plan.recipe.transfer.weights.replace("/weights/", "/other/weights/")
    file, (there, _) = Path((done.plan.recipe.transfer.weights_file or ("",))[0]), (moved.split("#"))
    Path(there).parent.mkdir(parents=True)
    shutil.copyfile(file, there)
    plan = replace(done.plan, recipe=done.plan.recipe.changed({"transfer.weights": moved}))
    folder = queries.artifact_folder(done.tracker.client.get_run(done.run))
    assert folder
    (folder / initial_weights.ARTIFACT).unlink()
    assert compress.finished_run(done.tracker, plan) == done.run
    assert sha256_of(folder / initial_weights.ARTIFACT) == sha256_of(file)


def test_distilled_network_learns_by_the_recipe_of_its_teacher(store: Store, done: Done) -> None:
    pruned, distilled = plans_of(store, done.tracker, store.rival, distil=True)
    assert distilled.recipe.model == pruned.recipe.model
    changed = distilled.original.metadata.recipe.difference(distilled.recipe)
    assert changed.keys() == {"model.widths", "loss.teacher"}
    folder, sha256 = distilled.recipe.loss.teacher_folder or ("", "")
    with find_model(store.home, None, store.rival) as model:
        assert sha256_of(model.folder / WEIGHTS) == sha256 == sha256_of(Path(folder) / WEIGHTS)
    with pytest.raises(UserError, match=rf"^run {done.run}: started from trained weights, so its recipe doesn't suit"):
        plans_of(store, done.tracker, done.run, distil=True)


def test_seeds_are_those_of_the_original(store: Store, done: Done) -> None:
    original, pruned = (seed_scores(done.tracker, run, "val/accuracy") for run in (store.rival, done.run))
    assert original == pruned and len(original) == 1


def test_its_checkpoint_holds_what_its_record_names(done: Done) -> None:
    artifacts = done.tracker.home / "artifacts" / done.run / "artifacts"
    assert (artifacts / initial_weights.ARTIFACT).exists()
    read_checkpoint(artifacts)  # or `audit` finds a fault in every compressed run


def test_reproduced_bit_for_bit_where_the_initial_weights_are_gone(done: Done, digits: TrainingData) -> None:
    path, _ = done.plan.recipe.transfer.weights_file or ("", "")
    original = reproduce.find_original(done.tracker, done.run)
    Path(path).unlink()
    outcome = reproduce.reproduce(done.tracker, original, digits, CPU)
    comparison = reproduce.compare(done.tracker, original, done.tracker.id_of(outcome.run_key), 144, None)
    assert comparison.equal, comparison.lines
    assert Path(path).exists()


@pytest.mark.usefixtures("one_export_a_model")
def test_promoted_as_a_cheaper_model(store: Store, done: Done, tmp_path: Path) -> None:
    registry, observer = store.registry(tmp_path, "small"), RecordingObserver()
    champion = promote(registry, done.run, Rules(**RULES.model_dump() | CHEAPER), DATA, observer)
    assert champion.run == done.run and observer.verdicts[0].passed
    assert [result.rule for result in observer.verdicts[0].results][:2] == ["not worse", "F1 by class"]
    card = registry.tracker.client.get_model_version("small", champion.version).description
    assert "Against the control, as a cheaper model that may lose 1 point of accuracy, by " in str(card)
    assert f"the most important channels of run `{store.rival}`, by torch-pruning" in str(card)


def test_model_whose_run_is_not_here_is_refused(done: Done) -> None:
    metadata = done.plan.original.metadata.model_copy(update={"run_id": "0" * 32})
    with pytest.raises(UserError, match=r"^run 0{32}: is not in this tracking store.*`--tracking-uri`"):
        compress.plan_compressions(done.tracker, replace(done.plan.original, metadata=metadata), 0.05, None, False, CPU)


def test_other_data_is_refused(done: Done, digits: TrainingData) -> None:
    with pytest.raises(DataError, match="trained on other data than is here"):
        compress.train(done.tracker, done.plan, replace(digits, digest="other"), CPU)
