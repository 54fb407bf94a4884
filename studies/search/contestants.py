"""Who is compared, and on what: SYSTEMS are questions, VARIANTS ways to search for an answer.

A new way is a line in VARIANTS: mostly a search with another sampler, pruner or start.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from meter import Meter
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from pipeline.recipe import Recipe
from pipeline.search.requeue import release_trials
from pipeline.search.search import Search
from pipeline.search.starts import starts
from pipeline.search.study import load_study
from pipeline.search.trial_attributes import TrialAttributes
from pipeline.training.loop import Diverged

# The hand-picked recipe (studies/README.md, "One training of each network"): the same for all but the highest rate.
HAND = {
    "augmentation.policy": "none",
    "augmentation.crop_padding": 4,
    "augmentation.crop_mode": "reflect",
    "augmentation.horizontal_flip": 0.5,
    "augmentation.erasing": 0,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.05,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 5e-4,
    "schedule.name": "one_cycle",
    "schedule.peak": 0.25,
}


@dataclass(frozen=True)
class System:
    """A study as it is asked here: `changes` hold for all trials, as SET= does; `hand` is its hand-picked recipe."""

    study: str
    epochs: int  # of a full training
    hand: Mapping[str, Any]
    changes: Mapping[str, Any] = field(default_factory=dict)

    def search(self, seed: int) -> Search:
        """The search of this seed, which seeds the trainings of its trials too, as in the command."""
        study = load_study(self.study)
        settings = {**self.changes, "training.epochs": self.epochs, "training.seed": seed}
        return Search(self.study, study, study.settings(settings), study.version, study.trials, None)


THIRD = {"data.train_fraction": 1 / 3}
SYSTEMS: Mapping[str, System] = {
    "digits": System(  # in a minute: to try the script
        "baseline",
        4,
        HAND,
        {"data.dataset": "digits", "data.image_size": 16, "training.batch_size": 64},
    ),
    "baseline": System("baseline", 20, HAND),
    "baseline-third": System("baseline", 20, HAND, THIRD),
    "plain-third": System(
        "plain",
        12,
        HAND | {"loss.label_smoothing": 0.1},
        THIRD | {"model.widths": (16, 32, 64, 128)},
    ),
    "improved-third": System(
        "improved",
        12,
        HAND | {"optimizer.lr": 0.1, "loss.label_smoothing": 0.1, "model.dropout": 0.3},
        THIRD | {"model.widths": (16, 32, 64), "model.hidden": 128},
    ),
}


@dataclass(frozen=True)
class Step:
    """A training of a search ended; `best` is the returned recipe if it stopped now."""

    recipe: Recipe
    state: str  # complete, pruned, diverged
    epochs: int  # trained, of the recipe's
    score: float | None  # its last
    best: Recipe | None
    best_score: float | None  # as the search saw it


# A way to search: trains by the meter until that raises Spent, and tells of each training.
Strategy = Callable[[Search, Meter], Iterator[Step]]


@dataclass(frozen=True, kw_only=True)
class OptunaSearch:
    """Trials one after the other, as `make study` runs them in one process, with the parts of a study changed.

    The first trials are the product's: the control, then the starts, unless `first` is false. With a `pruner` no trial is
    short.
    """

    sampler: Callable[[Search], BaseSampler] = lambda search: search.sampler(1)  # the control is there when it is made
    pruner: Callable[[], BasePruner] | None = None
    first: bool = True
    start_from: Any = "all"

    def __call__(self, search: Search, meter: Meter) -> Iterator[Step]:
        """See Strategy."""
        pruner = self.pruner() if self.pruner else None
        search = replace(search, study=replace(search.study, pruner=pruner), trials=1000, start_from=self.start_from)
        study = optuna.create_study(direction="maximize", sampler=self.sampler(search), pruner=search.pruner())
        if self.first:
            study.enqueue_trial(search.control(), user_attrs=TrialAttributes(control=True).to_optuna())
            for start in starts(search, search.start_from, []):
                attributes = TrialAttributes(start=start.source, short=search.shortens)
                study.enqueue_trial(dict(start.params), user_attrs=attributes.to_optuna())
        best, best_score = None, -math.inf
        while True:
            release_trials(study, search, study.get_trials(deepcopy=False), 1, search.trials)
            trial = study.ask()
            search.ask(trial)
            recipe, short = search.recipe(trial.params), TrialAttributes.of(trial).short
            recipe = search.short(recipe) if short else recipe
            scores: list[float] = []
            try:
                score = meter.train(recipe, _reporter(trial, search, recipe, scores))
            except optuna.TrialPruned:
                state = "pruned"
                study.tell(trial, state=TrialState.PRUNED)
            except Diverged:
                state = "diverged"
                study.tell(trial, state=TrialState.FAIL)
            else:
                state = "short" if short else "complete"
                study.tell(trial, None if short else score, state=TrialState.PRUNED if short else None)
                if not short and score > best_score:
                    best, best_score = recipe, score
            yield Step(recipe, state, len(scores), scores[-1] if scores else None, best, best_score if best else None)


def _reporter(trial: optuna.Trial, search: Search, recipe: Recipe, scores: list[float]) -> Callable[[int, float], None]:
    short = TrialAttributes.of(trial).short

    def report(epoch: int, score: float) -> None:
        scores.append(score)
        trial.report(score, search.step(epoch, recipe, short))
        if epoch < recipe.training.epochs and trial.should_prune():
            raise optuna.TrialPruned

    return report


@dataclass(frozen=True)
class Line:
    """No search: one recipe, for nothing."""

    recipe: Callable[[Search], Recipe]

    def __call__(self, search: Search, meter: Meter) -> Iterator[Step]:
        """See Strategy."""
        recipe = self.recipe(search)
        yield Step(recipe, "given", 0, None, recipe, None)


def _first_start(search: Search) -> Recipe:
    study = optuna.create_study(sampler=RandomSampler(seed=0))  # which draws what the start leaves open
    study.enqueue_trial(dict(next(iter(starts(search, "all", []))).params))
    trial = study.ask()
    search.ask(trial)
    return search.recipe(trial.params)


def hand_of(system: System) -> Line:
    """The hand's recipe for a system."""
    return Line(lambda search: search.base.changed(system.hand))


def seeded(make: Callable[..., BaseSampler], **options: Any) -> Callable[[Search], BaseSampler]:
    """A sampler with the search's seed."""
    return lambda search: make(seed=search.base.training.seed, **options)


OURS = OptunaSearch()
VARIANTS: Mapping[str, Strategy] = {
    "control": Line(lambda search: search.base),
    "first-start": Line(_first_start),
    # `hand` depends on the system: see `hand_of`.
    "ours": OURS,
    "optuna": OptunaSearch(sampler=seeded(TPESampler), pruner=MedianPruner, first=False),
    "random": OptunaSearch(sampler=seeded(RandomSampler), pruner=NopPruner, first=False),
    "ours-no-starts": replace(OURS, start_from="none"),
    "ours-tpe": replace(
        OURS, sampler=seeded(TPESampler, multivariate=True, group=True, constant_liar=True, n_startup_trials=5)
    ),
    "ours-random": replace(OURS, sampler=seeded(RandomSampler)),
    "ours-gp": replace(OURS, sampler=seeded(GPSampler)),
    "ours-cmaes": replace(OURS, sampler=seeded(CmaEsSampler)),
}
