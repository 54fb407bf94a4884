"""Several runs as one model, from members to champion, in a real MLflow store."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.audit import audit
from pipeline.cli.main import app
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.inference.classifier import Classifier
from pipeline.registry import ensemble as module
from pipeline.registry.decision import FinalsDecision
from pipeline.registry.ensemble import TrainedMember, find_members, greedy_soup, make_ensemble, seeds_of_winner
from pipeline.registry.opponents import control_of, seed_scores
from pipeline.registry.promote import promote
from pipeline.registry.reproduce import find_original
from pipeline.tracking import queries
from pipeline.tracking.models import find_model
from pipeline.tracking.tags import RunTags
from pipeline.tracking.tracker import MlflowTracker
from registry.helpers import DATA, RULES, RecordingObserver, Store

pytestmark = pytest.mark.usefixtures("one_export_a_model")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def members(store: Store) -> list[TrainedMember]:
    return find_members(MlflowTracker(store.home), [store.good, store.best], CPU)


def command(store: Store, *words: str) -> str:
    done = CliRunner().invoke(app, ["ensemble", "--runs", f"{store.good} {store.best}", *words])
    assert not done.exception, done.exception
    return " ".join(done.output.split())


def test_mean_of_two_runs_becomes_champion(
    store: Store,
    members: list[TrainedMember],
    digits: TrainingData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(store.home.parent)
    said, tracker = command(store), MlflowTracker(store.home)
    [run] = [run for run in queries.ensembles(tracker) if RunTags.of(run).method == "mean"]
    run_id, tags = run.info.run_id, RunTags.of(run)
    assert f"promote --run {run_id} --rules 'latency_factor=3 size_factor=3'" in said
    assert list(tags.members or ()) == [store.best, store.good] and tags.study == "tiny-v1-digits"
    assert f"made before: run {run_id}" in command(store), "it would be evaluated twice"
    assert control_of(tracker, run_id) == store.control
    assert seed_scores(tracker, run_id, "val/accuracy") == [members[0].accuracy]
    assert not audit(None, tracker).findings

    images = digits.validation.images
    registry = store.registry(tmp_path, "mean")
    champion = promote(registry, run_id, RULES, DATA, RecordingObserver())
    with find_model(store.home, None, "models:/mean@champion") as model:
        classifier = Classifier.load(model.folder, CPU)
        card = (model.folder / "card.md").read_text()
    assert champion.run == run_id
    scaled = classifier.probabilities(images) ** classifier.metadata.calibration.temperature
    mean = np.mean([member.classifier.probabilities(images) for member in members], axis=0)
    np.testing.assert_allclose(scaled / scaled.sum(1, keepdims=True), mean, atol=1e-6)
    stored = run.data.metrics["val/accuracy"]
    assert abs((mean.argmax(1) == digits.validation.labels.numpy()).mean() - stored) < 0.02
    assert card.startswith("# Image classifier: mean of 2 networks (attention) on digits")
    for member in members:
        assert f"| `{member.run.info.run_id}` | attention | 0 | {member.accuracy:.2%} |" in card
    with pytest.raises(UserError, match=f"an ensemble, .* `ensemble --runs '{store.best} {store.good}' --method mean`"):
        find_original(tracker, run_id)
    with pytest.raises(UserError, match="is an ensemble itself; name its members"):
        find_members(tracker, [run_id, store.best], CPU)


def perturbed(member: TrainedMember, seed: int, size: float) -> TrainedMember:
    """Its network moved by noise of so many times each tensor's standard deviation."""
    network, generator = member.metadata.build_network().eval(), torch.Generator().manual_seed(seed)
    state = member.classifier.network.state_dict()
    moved = {
        name: tensor + size * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in state.items()
        if tensor.is_floating_point() and tensor.numel() > 1
    }
    network.load_state_dict(state | moved)
    return replace(member, classifier=replace(member.classifier, network=network), weights_sha256=str(seed))


def test_soup_takes_in_what_makes_it_no_worse(store: Store, members: list[TrainedMember], digits: TrainingData) -> None:
    best, lines = members[0], list[str]()
    near, far = replace(perturbed(best, 1, 0.002), run=members[1].run), perturbed(best, 2, 5.0)
    made = make_ensemble(MlflowTracker(store.home), [best, near, far], "soup", digits, lines.append)
    assert made.members == [best, near] and [line.rpartition("; ")[2] for line in lines] == ["taken in", "left out"]
    with find_model(store.home, None, made.run_id) as model:
        network = Classifier.load(model.folder, CPU).network
    states = [member.classifier.network.state_dict() for member in made.members]
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), (states[0][name] + states[1][name]) / 2)
    norm = next(name for name in states[0] if name.endswith("running_mean"))
    mean = (states[0][norm] + states[1][norm]) / 2
    assert not torch.allclose(network.state_dict()[norm], mean, rtol=1e-3), "measured anew"


def test_soup_of_one_is_that_run_and_no_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store.home.parent)
    monkeypatch.setattr(module, "greedy_soup", lambda members, data, note: (members[:1], None))
    said = command(store, "--method", "soup")
    assert "no soup: with any other run accuracy falls" in said and f"promote --run {store.best}" in said


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"classes": ("a", "b")}, "knows other classes than"),
        ({"split_digest": "0" * 64}, "images that validate the one may have trained the other"),
        ({"data_digest": "0" * 64}, "another data set or split"),
        ({"data.image_size": 16}, "data.image_size and data.geometry should be the same"),
        ({"data.geometry": "pad"}, "data.image_size and data.geometry should be the same"),
    ],
)
def test_runs_that_cannot_be_combined_are_refused(
    changes: dict[str, object],
    fault: str,
    store: Store,
    members: list[TrainedMember],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, other = members
    fields = {name: value for name, value in changes.items() if "." not in name}
    recipe = other.metadata.recipe.changed({name: value for name, value in changes.items() if "." in name})
    metadata = other.metadata.model_copy(update={"recipe": recipe, **fields})
    odd = replace(other, classifier=replace(other.classifier, metadata=metadata))
    monkeypatch.setattr(module, "_load", lambda tracker, run, device: first if run == store.best else odd)
    with pytest.raises(UserError, match=f"^{odd.name}: .*{fault}"):
        find_members(MlflowTracker(store.home), [store.best, store.good], CPU)


def test_members_are_several_different_models(store: Store, members: list[TrainedMember], digits: TrainingData) -> None:
    tracker = MlflowTracker(store.home)
    with pytest.raises(UserError, match=r"has the weights of trial 2 .*; each has one vote"):
        find_members(tracker, [store.best, store.best], CPU)
    with pytest.raises(UserError, match="has 2 to 40 members, these are 1"):
        find_members(tracker, [store.best], CPU)
    first, other = members
    wider = other.metadata.recipe.changed({"model.widths": [8, 8]})
    classifier = replace(other.classifier, metadata=other.metadata.model_copy(update={"recipe": wider}))
    with pytest.raises(UserError, match=r"model sections differ, .*; `--method mean` averages predictions"):
        greedy_soup([first, replace(other, classifier=classifier)], digits, lambda line: None)


def test_study_means_the_seeds_of_its_winner(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = MlflowTracker(store.home)
    [study] = queries.studies(tracker)
    with pytest.raises(UserError, match=r"has no finals with a winner; `finals tiny-v1-digits` trains seeds"):
        seeds_of_winner(tracker, study)
    seeds = [SimpleNamespace(run_id=run_id, score=score) for run_id, score in (("a", 0.5), ("b", None), ("c", 0.7))]
    candidates = [SimpleNamespace(digest="1", runs=()), SimpleNamespace(digest="2", runs=seeds)]
    decision = SimpleNamespace(candidates=candidates, winner=SimpleNamespace(digest="2"))
    monkeypatch.setattr(FinalsDecision, "load", lambda tracker, study: decision)
    assert seeds_of_winner(tracker, study) == ["a", "c"], "not the one that diverged"
