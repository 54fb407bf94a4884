"""Several trained runs as one model, to compare and promote as any: the mean of their probabilities, or a soup of weights.

An ensemble is a run of its own, scored on the validation split, whose tags name its members. Its checkpoint holds all that
it needs, so it outlives them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch
from mlflow.entities import Run as StoredRun
from torch import Tensor, nn

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.disk import sha256_of
from pipeline.errors import Problem, UserError
from pipeline.evaluation.logits import predict_logits
from pipeline.inference.classifier import MOST_MEMBERS, Classifier, ModelMetadata, mean_of
from pipeline.registry.decision import FinalsDecision
from pipeline.registry.finals import check_same_data
from pipeline.tracking import queries
from pipeline.tracking.intact import run_label
from pipeline.tracking.models import find_model
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker, RunRequest
from pipeline.training.averaging import mean_weights, measure_norms
from pipeline.training.checkpoints import WEIGHTS
from pipeline.training.loop import Result

Method = Literal["mean", "soup"]
NORM_IMAGES = 5000  # training images that a soup's batch norm is measured on


@dataclass(frozen=True, eq=False)
class TrainedMember:
    """A run that may be a member, and its model on the device."""

    run: StoredRun
    classifier: Classifier
    weights_sha256: str

    @property
    def name(self) -> str:
        """For a person."""
        return run_label(self.run)

    @property
    def metadata(self) -> ModelMetadata:
        """Of its model."""
        return self.classifier.metadata

    @property
    def accuracy(self) -> float:
        """On the validation split."""
        return self.metadata.measured["plain"].accuracy


@dataclass(frozen=True)
class MadeEnsemble:
    """The ensemble's run. `members` are those in it, the best first; of a soup of one, that member's own run."""

    run_id: str
    members: Sequence[TrainedMember]


# ------------------------------------------------------------------------------------------------------------- members


def seeds_of_winner(tracker: MlflowTracker, study: StudyRuns) -> list[str]:
    """The runs of the recipe that won a study's finals, one for each seed; UserError where there are not several."""
    decision = FinalsDecision.load(tracker, study)
    if decision is None or decision.winner is None:
        remedy = f"`finals {study.name}` trains seeds to combine, `--runs` names other runs"
        raise UserError(study.name, "has no finals with a winner", remedy)
    [result] = [candidate for candidate in decision.candidates if candidate.digest == decision.winner.digest]
    return [seed.run_id for seed in result.runs if seed.run_id and seed.score is not None]


def find_members(tracker: MlflowTracker, run_ids: Sequence[str], device: torch.device) -> list[TrainedMember]:
    """The models of these runs, the best on the validation split first.

    UserError where they can't be combined: where one has trained on images that validate another, sees other images or
    classes, or is none of a training of its own.
    """
    if not 2 <= len(run_ids) <= MOST_MEMBERS:
        raise UserError("an ensemble", f"has 2 to {MOST_MEMBERS} members, these are {len(run_ids)}")
    members = sorted(
        (_load(tracker, run_id, device) for run_id in run_ids), key=lambda each: (-each.accuracy, each.run.info.run_id)
    )
    first, *others = members
    problems = [Problem(other.name, fault) for other in others if (fault := _misfit(other, first))]
    for _, alike in groupby(sorted(members, key=lambda each: each.weights_sha256), lambda each: each.weights_sha256):
        one, *copies = alike
        problems += [Problem(copy.name, f"has the weights of {one.name}; each has one vote") for copy in copies]
    if problems:
        raise UserError.many(problems)
    return members


def _load(tracker: MlflowTracker, run_id: str, device: torch.device) -> TrainedMember:
    with find_model(tracker.home, tracker.uri, run_id) as model:
        member = TrainedMember(
            tracker.client.get_run(run_id), Classifier.load(model.folder, device), sha256_of(model.folder / WEIGHTS)
        )
    if member.metadata.members:
        raise UserError(member.name, "is an ensemble itself", "name its members")
    return member


def _misfit(member: TrainedMember, first: TrainedMember) -> str:
    """Why two runs can't be members of one ensemble, or nothing."""
    mine, others = member.metadata, first.metadata
    if mine.classes != others.classes:
        return f"knows other classes than {first.name}"
    if (mine.data_digest, mine.split_digest) != (others.data_digest, others.split_digest):
        return (
            f"was trained on another data set or split than {first.name}: images that validate the one may have trained "
            "the other"
        )
    if mine.recipe.data.form[:2] != others.recipe.data.form[:2]:
        return f"sees images in another form than {first.name}: data.image_size and data.geometry should be the same"
    return ""


# ----------------------------------------------------------------------------------------------------------- combining


def make_ensemble(
    tracker: MlflowTracker,
    members: Sequence[TrainedMember],
    method: Method,
    data: TrainingData,
    note: Callable[[str], None],
) -> MadeEnsemble:
    """Combine members, as `find_members` gives them, under a run of its own; or find the run where that was done before.

    A soup in which only the best run is left is that run. UserError where a soup's networks differ, DataError where the
    data is not what the members were trained on.
    """
    first = members[0]
    check_same_data(first.name, RunTags.of(first.run), data)
    if method == "mean":
        network: nn.Module = mean_of([m.metadata for m in members], [m.classifier.network for m in members])
        mean, std = torch.zeros(3), torch.ones(3)  # each member normalises for itself
    else:
        mean, std = torch.tensor(first.metadata.mean), torch.tensor(first.metadata.std)
        data = _normalised(data, mean, std)
        members, network = greedy_soup(members, data, note)
        if len(members) == 1:
            return MadeEnsemble(first.run.info.run_id, members)
    if made := _made_before(tracker, method, members):
        note(f"made before: run {made}")
        return MadeEnsemble(made, members)
    network = network.to(first.classifier.device).eval()
    return MadeEnsemble(_publish(tracker, network, method, members, _normalised(data, mean, std)), members)


def greedy_soup(
    members: Sequence[TrainedMember], data: TrainingData, note: Callable[[str], None]
) -> tuple[list[TrainedMember], nn.Module]:
    """The greedy soup of Wortsman et al. 2022 (arXiv 2203.05482): the members in it, and the network with their mean weights.

    Each run, the best first, is taken in where validation accuracy doesn't fall. Weights that don't share their start can
    seldom be averaged. UserError where the networks differ.
    """
    first, *others = members
    differing = [other for other in others if other.metadata.recipe.model != first.metadata.recipe.model]
    if differing:
        rule = f"its network is not that of {first.name}: model sections differ, so weights can't be averaged"
        raise UserError.many([Problem(other.name, rule, "`--method mean` averages predictions") for other in differing])
    chosen, best, best_accuracy = [first], first.classifier.network, _accuracy(first.classifier.network, first, data)
    images = data.sample(NORM_IMAGES).to(data.mean.device)
    for other in others:
        tried = first.metadata.build_network().to(first.classifier.device).to(memory_format=torch.channels_last)
        tried.load_state_dict(mean_weights([each.classifier.network for each in (*chosen, other)]))
        measure_norms(tried, images, data.mean, data.std, first.metadata.recipe.training.precision)
        accuracy = _accuracy(tried, first, data)
        verdict = "taken in" if accuracy >= best_accuracy else "left out"
        note(f"{other.name}: with it {accuracy:.4f}, without it {best_accuracy:.4f}; {verdict}")
        if accuracy >= best_accuracy:
            chosen, best, best_accuracy = [*chosen, other], tried, accuracy
    return chosen, best


def _accuracy(network: nn.Module, first: TrainedMember, data: TrainingData) -> float:
    logits = _logits(network, first, data)
    return (logits.argmax(1) == data.validation.labels).double().mean().item()


def _logits(network: nn.Module, first: TrainedMember, data: TrainingData) -> Tensor:
    """Of the validation images, (N, C)."""
    precision = first.metadata.recipe.training.precision
    return predict_logits(network, data.validation.images, data.mean, data.std, precision)


def _normalised(data: TrainingData, mean: Tensor, std: Tensor) -> TrainingData:
    return replace(data, mean=mean.to(data.mean.device), std=std.to(data.std.device))


# ------------------------------------------------------------------------------------------------------------- tracking


def _tag_of(members: Sequence[TrainedMember]) -> Mapping[str, str]:
    return {member.run.info.run_id: member.weights_sha256 for member in members}


def _made_before(tracker: MlflowTracker, method: Method, members: Sequence[TrainedMember]) -> str | None:
    """The finished run of this ensemble: under a second name it would be evaluated twice on the test split."""
    for run in queries.ensembles(tracker):
        tags = RunTags.of(run)
        if (tags.method, tags.members, tags.state) == (method, _tag_of(members), State.FINISHED):
            return str(run.info.run_id)
    return None


def _publish(
    tracker: MlflowTracker, network: nn.Module, method: Method, members: Sequence[TrainedMember], data: TrainingData
) -> str:
    """Score the ensemble and track it, as a child of the study that all its members are of; the run's id."""
    first = members[0]
    origins = {(tags.study, tags.parent_run) for tags in (RunTags.of(member.run) for member in members)}
    study, parent = origins.pop() if len(origins) == 1 else (None, None)
    request = RunRequest(
        name=f"{method} of {len(members)} runs",
        recipe=first.metadata.recipe,
        data=data,
        parent_run=parent,
        tags=RunTags(
            role="ensemble",
            study=study,
            method=method,
            members=_tag_of(members),
            device=str(first.classifier.device),
        ),
    )
    seconds = sum(member.run.data.metrics.get("time/training_s", 0.0) for member in members)
    with tracker.run(request) as tracked:
        result = Result(network, None, _logits(network, first, data), [], seconds)
        all_metadata = [member.metadata for member in members]
        scores = experiment.publish(tracked, request.recipe, data, result, method, all_metadata)
        tracked.log_metrics(scores, 1)
        tracked.end(State.FINISHED)
    return tracker.id_of(tracked.key)
