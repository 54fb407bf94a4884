"""Who is compared, and on what: SYSTEMS are questions, VARIANTS ways to search for an answer.

A new way is a line in VARIANTS: mostly an OptunaSearch with another sampler, pruner, portfolio or space.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import optuna
from meter import Meter
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from pipeline.recipe import Recipe
from pipeline.search.pruner import MIN_UNPRUNED_TRIALS, RecentTrialsPruner
from pipeline.search.study import Search, load_study
from pipeline.training.loop import Diverged

# The hand's recipe (studies/README.md, "One training of each system"): one setting, the same for all but the highest rate.
HAND = {
    "augmentation.crop_padding": 4,
    "augmentation.crop_mode": "reflect",
    "augmentation.horizontal_flip": 0.5,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.05,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 5e-4,
    "schedule.name": "one_cycle",
    "schedule.peak": 0.25,
}
STRENGTHS = ("rotation", "perspective", "brightness", "contrast", "saturation", "hue", "erasing", "mixup", "cutmix")
NO_STRENGTH = {f"augmentation.{name}": 0 for name in STRENGTHS}


@dataclass(frozen=True)
class System:
    """A study as it is asked here: `changes` hold for all trials, as SET= does; `hand` is what a hand picked for it."""

    study: str
    epochs: int  # of a whole training
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
        3,
        NO_STRENGTH | HAND,
        {"data.dataset": "digits", "data.image_size": 16, "training.batch_size": 64},
    ),
    "baseline": System("baseline", 20, NO_STRENGTH | HAND),
    "baseline-third": System("baseline", 20, NO_STRENGTH | HAND, THIRD),
    "plain-third": System(
        "plain",
        12,
        NO_STRENGTH | HAND | {"loss.label_smoothing": 0.1},
        THIRD | {"model.widths": (16, 32, 64, 128)},
    ),
    "improved-third": System(
        "improved",
        12,
        NO_STRENGTH | HAND | {"optimizer.lr": 0.1, "loss.label_smoothing": 0.1, "model.dropout": 0.3},
        THIRD | {"model.widths": (16, 32, 64), "model.hidden": 128},
    ),
    "fast-third": System("fast", 5, {}, THIRD | {"model.widths": (32, 128, 128), "training.batch_size": 500}),
}

# Recipes that are strong for many networks, none of them picked for one of the systems; in a study's space each becomes
# the nearest that the space can give.
PORTFOLIO: tuple[Mapping[str, Any], ...] = (
    NO_STRENGTH | HAND | {"optimizer.lr": 0.1},
    NO_STRENGTH
    | {
        "augmentation.crop_padding": 4,
        "augmentation.horizontal_flip": 0.5,
        "optimizer.name": "adamw",
        "optimizer.lr": 2e-3,
        "optimizer.weight_decay": 5e-2,
        "schedule.name": "cosine",
        "schedule.warmup": 0.05,
    },
    NO_STRENGTH | HAND | {"optimizer.lr": 0.03, "augmentation.erasing": 0.25, "loss.label_smoothing": 0.1},
    NO_STRENGTH
    | HAND
    | {"optimizer.lr": 0.1, "augmentation.brightness": 0.1, "augmentation.contrast": 0.1, "augmentation.cutmix": 0.3},
)


@dataclass(frozen=True)
class Step:
    """A training of a search ended; `best` is what the search would hand over if it stopped now."""

    recipe: Recipe
    state: str  # complete, pruned, diverged
    epochs: int  # trained, of the recipe's
    score: float | None  # its last
    best: Recipe | None
    best_score: float | None  # as the search saw it


# A way to search: trains by the meter until that raises Spent, and tells of each training.
Strategy = Callable[[Search, Meter], Iterator[Step]]


@dataclass(frozen=True)
class Best:
    """The recipe that is handed over: of the longest trainings the one with the best score."""

    recipe: Recipe | None = None
    score: float | None = None

    def or_else(self, recipe: Recipe, score: float) -> "Best":
        """The better of the two."""
        if self.recipe is None or self.score is None:
            return Best(recipe, score)
        here, there = (self.recipe.training.epochs, self.score), (recipe.training.epochs, score)
        return Best(recipe, score) if there > here else self


@dataclass(frozen=True, kw_only=True)
class OptunaSearch:
    """Trials of full length, one after the other, as `make study` runs them in one process."""

    sampler: Callable[[Search], BaseSampler]
    pruner: Callable[[Search], BasePruner] = lambda search: NopPruner()
    starts_with_control: bool = True
    portfolio: tuple[Mapping[str, Any], ...] = ()
    never_pruned: int = 0  # so many first trials
    space: Callable[[Search], Search] = lambda search: search

    def __call__(self, search: Search, meter: Meter) -> Iterator[Step]:
        """See Strategy."""
        search = self.space(search)
        study = optuna.create_study(direction="maximize", sampler=self.sampler(search), pruner=self.pruner(search))
        for params in self.starts(search):
            study.enqueue_trial(params)
        best = Best()
        while True:
            trial = study.ask()
            search.ask(trial)
            recipe = search.recipe(trial.params)
            scores: list[float] = []
            try:
                score = meter.train(recipe, self._reporter(trial, search, recipe, scores))
            except optuna.TrialPruned:
                state = "pruned"
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            except Diverged:
                state = "diverged"
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                state, best = "complete", best.or_else(recipe, score)
                study.tell(trial, score)
            yield Step(recipe, state, len(scores), scores[-1] if scores else None, best.recipe, best.score)

    def starts(self, search: Search) -> list[dict[str, Any]]:
        """The parameters of the first trials, each once."""
        first = [search.control()] if self.starts_with_control else []
        first += [nearest(search, changes) for changes in self.portfolio]
        return [params for number, params in enumerate(first) if params not in first[:number]]

    def _reporter(
        self, trial: optuna.Trial, search: Search, recipe: Recipe, scores: list[float]
    ) -> Callable[[int, float], None]:
        def report(epoch: int, score: float) -> None:
            scores.append(score)
            trial.report(score, search.step(epoch, recipe))
            is_judged = trial.number >= self.never_pruned and epoch < recipe.training.epochs
            if is_judged and trial.should_prune():
                raise optuna.TrialPruned

        return report


@dataclass(frozen=True, kw_only=True)
class AnnealedHalving:
    """Successive halving over lengths: every training ends its own schedule, so that no unfinished one is judged.

    A bracket is ETA**2 recipes of a ninth of the length; the best third is trained anew for a third, the best of those in
    full. The sampler learns from the shortest trainings, of which there are most.
    """

    sampler: Callable[[Search], BaseSampler]
    portfolio: tuple[Mapping[str, Any], ...] = ()
    space: Callable[[Search], Search] = lambda search: search
    eta: int = 3

    def __call__(self, search: Search, meter: Meter) -> Iterator[Step]:
        """See Strategy."""
        search = self.space(search)
        study = optuna.create_study(direction="maximize", sampler=self.sampler(search))
        for params in OptunaSearch(sampler=self.sampler, portfolio=self.portfolio).starts(search):
            study.enqueue_trial(params)
        full = search.base.training.epochs
        lengths = sorted({math.ceil(full / self.eta**power) for power in (2, 1, 0)})
        best = Best()
        while True:
            recipes: list[Recipe] = []
            scored: dict[int, float] = {}
            for place in range(self.eta ** (len(lengths) - 1)):
                trial = study.ask()
                search.ask(trial)
                recipes.append(search.recipe(trial.params))
                step, best = self._train(recipes[place], lengths[0], meter, best)
                if step.score is None:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    study.tell(trial, step.score)
                    scored[place] = step.score
                yield step
            for length in lengths[1:]:
                chosen = sorted(scored, key=lambda place: -scored[place])[: max(1, len(scored) // self.eta)]
                scored = {}
                for place in chosen:
                    step, best = self._train(recipes[place], length, meter, best)
                    if step.score is not None:
                        scored[place] = step.score
                    yield step

    def _train(self, recipe: Recipe, length: int, meter: Meter, best: Best) -> tuple[Step, Best]:
        recipe = recipe.changed({"training.epochs": length})
        before = meter.used
        try:
            score = meter.train(recipe)
        except Diverged:
            return Step(recipe, "diverged", meter.used - before, None, best.recipe, best.score), best
        best = best.or_else(recipe, score)
        return Step(recipe, "complete", length, score, best.recipe, best.score), best


@dataclass(frozen=True, kw_only=True)
class ShortFirst:
    """Every recipe is trained for a share of the length first, with its whole schedule; the best 1/eta of them in full.

    As asynchronous successive halving with two rungs, but no schedule is judged before its end. The control is trained in
    full. The sampler learns from the short trainings.
    """

    sampler: Callable[[Search], BaseSampler]
    portfolio: tuple[Mapping[str, Any], ...] = ()
    space: Callable[[Search], Search] = lambda search: search
    share: float = 1 / 4
    eta: int = 4

    def __call__(self, search: Search, meter: Meter) -> Iterator[Step]:
        """See Strategy."""
        search = self.space(search)
        study = optuna.create_study(direction="maximize", sampler=self.sampler(search))
        for params in OptunaSearch(sampler=self.sampler, portfolio=self.portfolio).starts(search):
            study.enqueue_trial(params)
        full = search.base.training.epochs
        short = math.ceil(full * self.share)
        train, best = AnnealedHalving(sampler=self.sampler)._train, Best()
        step, best = train(search.base, full, meter, best)
        yield step
        scored: dict[int, float] = {}
        recipes: list[Recipe] = []
        promoted: set[int] = set()
        while True:
            trial = study.ask()
            search.ask(trial)
            recipes.append(search.recipe(trial.params))
            step, best = train(recipes[-1], short, meter, best)
            if step.score is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, step.score)
                scored[len(recipes) - 1] = step.score
            yield step
            chosen = sorted(scored, key=lambda place: -scored[place])[: len(scored) // self.eta]
            for place in [place for place in chosen if place not in promoted]:
                promoted.add(place)
                step, best = train(recipes[place], full, meter, best)
                yield step


@dataclass(frozen=True)
class Line:
    """No search: one recipe, for nothing."""

    recipe: Callable[[Search], Recipe]

    def __call__(self, search: Search, meter: Meter) -> Iterator[Step]:
        """See Strategy."""
        recipe = self.recipe(search)
        yield Step(recipe, "given", 0, None, recipe, None)


class NearestTrial:
    """Answers a space's questions with a recipe's values, moved to the nearest that the range has."""

    def __init__(self, wanted: Mapping[str, Any]):
        self.params: dict[str, Any] = {}
        self._wanted = wanted

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """As optuna.Trial.suggest_float."""
        value = min(max(self._wanted_for(name, low), low), high)
        self.params[name] = min(low + round((value - low) / step) * step, high) if step else value
        return self.params[name]

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """As optuna.Trial.suggest_int."""
        return int(self.suggest_float(name, low, high, step=step))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """As optuna.Trial.suggest_categorical; of numbers the one with the nearest logarithm."""
        wanted = self._wanted_for(name, choices[0])
        if wanted not in choices:
            numbers = [choice for choice in choices if isinstance(choice, (int, float))]
            assert numbers and isinstance(wanted, (int, float)), f"{name} = {wanted}: not one of {choices}"
            wanted = min(numbers, key=lambda choice: abs(math.log(choice + 1e-9) - math.log(wanted + 1e-9)))
        self.params[name] = wanted
        return wanted

    def _wanted_for(self, name: str, default: Any) -> Any:
        return self._wanted.get(name.partition("@")[0], default)


def nearest(search: Search, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that give the recipe with these changes, or the one nearest to it that the space has."""
    if isinstance(search, KindedSearch):
        return search.near(changes)
    flat = search.base.changed(changes).flat()
    trial = NearestTrial(search.params_of(flat) if isinstance(search, OneScaleSearch) else flat)
    search.ask(trial)
    return trial.params


def hand_of(system: System) -> Line:
    """The hand's recipe for a system."""
    return Line(lambda search: search.base.changed(system.hand))


# --- Spaces ---


def fewer_strengths(search: Search) -> Search:
    """Without what bends or colours the image: crop, flip, erasing and CutMix are left."""
    gone = ("rotation", "perspective", "brightness", "contrast", "saturation", "hue", "mixup")
    changes = {f"augmentation.{name}": 0 for name in gone}
    return replace(search, settings={**search.settings, **changes})


def no_strengths(search: Search) -> Search:
    """Crop and flip are all."""
    return replace(search, settings={**search.settings, **NO_STRENGTH})


ADAPTIVE_SCALE = 20  # Adam's usual 1e-3 to 5e-3 for SGD's 0.02 to 0.1


class OneScaleSearch(Search):
    """The rate that is asked is SGD's; Adam and AdamW get a twentieth of it, so that one range is at home for all."""

    def recipe(self, params: Mapping[str, Any]) -> Recipe:
        """See Search."""
        return super().recipe(self._scaled(params, 1 / ADAPTIVE_SCALE))

    def control(self) -> dict[str, Any]:
        """See Search."""
        return self.params_of(super().control())

    def params_of(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe's fields as they would be asked."""
        return self._scaled(flat, ADAPTIVE_SCALE)

    def _scaled(self, values: Mapping[str, Any], factor: float) -> dict[str, Any]:
        is_adaptive = values.get("optimizer.name", self.study.base.optimizer.name) in ("adam", "adamw")
        return {**values, "optimizer.lr": values["optimizer.lr"] * factor} if is_adaptive else dict(values)


def one_scale(search: Search) -> Search:
    """One range of rates that means the same for every optimizer."""
    return OneScaleSearch(**{each.name: getattr(search, each.name) for each in fields(search)})


def lean(search: Search) -> Search:
    """Fewer strengths, rates on one scale, label smoothing."""
    return one_scale(with_smoothing(fewer_strengths(search)))


def with_smoothing(search: Search) -> Search:
    """Label smoothing is asked too."""

    def space(trial: Any) -> None:
        search.study.space(trial)
        trial.suggest_float("loss.label_smoothing", 0, 0.2, step=0.1)

    return replace(search, study=replace(search.study, space=space))


class KindedSearch(Search):
    """A space whose names may end in `@kind`, so that each kind has a range of its own; and with a policy of strengths.

    `augmentation.policy` none: no strength; custom: those of the base recipe, or asked.
    """

    def recipe(self, params: Mapping[str, Any]) -> Recipe:
        """See Search."""
        changes = {name.partition("@")[0]: value for name, value in params.items()}
        if changes.pop("augmentation.policy", "custom") == "none":
            changes |= NO_COLOUR
        return super().recipe(changes)

    def control(self) -> dict[str, Any]:
        """See Search."""
        trial = NearestTrial(self._flat({}))
        self.ask(trial)
        return trial.params

    def near(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters nearest to the base recipe with these changes."""
        trial = NearestTrial(self._flat(changes))
        self.ask(trial)
        return trial.params

    def _flat(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        flat = Search.recipe(self, {}).changed(changes).flat()
        is_custom = any(flat[name] for name in NO_COLOUR)
        return {**flat, "augmentation.policy": "custom" if is_custom else "none"}


COLOUR = ("rotation", "perspective", "brightness", "contrast", "saturation", "hue")
NO_COLOUR = {f"augmentation.{name}": 0 for name in COLOUR}


def kinded(search: Search) -> Search:
    """A smaller space: ranges by kind of optimizer, strengths only under a policy, label smoothing and batch size."""

    base = search.study.base

    def space(trial: Any) -> None:
        trial.suggest_int("augmentation.crop_padding", 0, 4, step=2)
        trial.suggest_float("augmentation.horizontal_flip", 0, 0.5, step=0.5)
        trial.suggest_float("augmentation.erasing", 0, 0.5, step=0.25)
        trial.suggest_float("augmentation.cutmix", 0, 0.5, step=0.25)
        if trial.suggest_categorical("augmentation.policy", ["none", "custom"]) == "custom":
            trial.suggest_float("augmentation.rotation", 0, 15, step=5)
            for name in ("brightness", "contrast", "saturation"):
                trial.suggest_float(f"augmentation.{name}", 0, 0.4, step=0.1)
            trial.suggest_float("augmentation.hue", 0, 0.1, step=0.05)
        optimizers = ["sgd", "adamw"] + (["adam"] if base.optimizer.name == "adam" else [])
        optimizer = trial.suggest_categorical("optimizer.name", optimizers)
        if optimizer == "sgd":
            trial.suggest_float("optimizer.lr@sgd", 5e-3, 0.5, log=True)
            trial.suggest_categorical("optimizer.weight_decay@sgd", [0, 1e-4, 5e-4, 2e-3])
            trial.suggest_categorical("optimizer.nesterov", [False, True])
        else:
            trial.suggest_float(f"optimizer.lr@{optimizer}", 3e-4, 1e-2, log=True)
            decays = [0, 1e-4, 5e-4, 2e-3] if optimizer == "adam" else [0, 1e-2, 5e-2, 0.2]
            trial.suggest_categorical(f"optimizer.weight_decay@{optimizer}", decays)
        kinds = ["one_cycle", "cosine"] + (["constant"] if base.schedule.name == "constant" else [])
        schedule = trial.suggest_categorical("schedule.name", kinds)
        if schedule == "one_cycle":
            trial.suggest_float("schedule.peak", 0.1, 0.4)
        elif schedule == "cosine":
            trial.suggest_float("schedule.warmup", 0, 0.2, step=0.05)
        trial.suggest_float("loss.label_smoothing", 0, 0.1, step=0.05)
        trial.suggest_categorical("training.batch_size", [64, 128, 256])
        for name, high in (("model.dropout", 0.5), ("model.convolution_dropout", 0.2)):
            if name in base.flat():
                trial.suggest_float(name, 0, high, step=0.1)

    study = replace(search.study, space=space)
    values = {each.name: getattr(search, each.name) for each in fields(search)}
    return KindedSearch(**{**values, "study": study})


# --- Samplers and pruners ---


def ours(search: Search) -> BaseSampler:
    """The project's sampler."""
    return search.sampler(1)  # the control is there when it is made


def seeded(make: Callable[..., BaseSampler], **options: Any) -> Callable[[Search], BaseSampler]:
    """A sampler with the search's seed."""
    return lambda search: make(seed=search.base.training.seed, **options)


def recent(*shares: float) -> Callable[[Search], BasePruner]:
    """The project's pruner with its decisions after these shares of the epochs."""

    def make(search: Search) -> RecentTrialsPruner:
        pruner = RecentTrialsPruner(search.max_epochs)
        pruner.rungs = sorted({math.ceil(search.max_epochs * share) for share in shares})
        return pruner

    return make


MULTIVARIATE = seeded(TPESampler, multivariate=True, group=True, n_startup_trials=5)
# Nearer to the best quarter: what is not known yet counts as a fifth of a trial.
LOCAL = seeded(
    TPESampler,
    multivariate=True,
    group=True,
    n_startup_trials=5,
    prior_weight=0.2,
    gamma=lambda n: max(1, math.ceil(n / 4)),
)
DEFAULT = OptunaSearch(sampler=ours, pruner=lambda search: search.pruner(), never_pruned=MIN_UNPRUNED_TRIALS)
VARIANTS: Mapping[str, Strategy] = {
    "control": Line(lambda search: search.base),
    # `hand` depends on the system: see `hand_of`.
    "default": DEFAULT,
    "optuna": OptunaSearch(sampler=seeded(TPESampler), pruner=lambda search: MedianPruner(), starts_with_control=False),
    "random": OptunaSearch(sampler=seeded(RandomSampler), starts_with_control=False),
    "portfolio": replace(DEFAULT, portfolio=PORTFOLIO),
    "no-pruning": replace(DEFAULT, pruner=lambda search: NopPruner()),
    "later-rungs": replace(DEFAULT, pruner=recent(1 / 2, 3 / 4)),
    "fewer-strengths": replace(DEFAULT, space=fewer_strengths),
    "no-strengths": replace(DEFAULT, space=no_strengths),
    "annealed-halving": AnnealedHalving(sampler=ours),
    "portfolio-annealed-halving": AnnealedHalving(sampler=ours, portfolio=PORTFOLIO),
    "portfolio-no-pruning": replace(DEFAULT, portfolio=PORTFOLIO, pruner=lambda search: NopPruner()),
    "portfolio-smoothing": replace(DEFAULT, portfolio=PORTFOLIO, space=with_smoothing),
    "one-scale": replace(DEFAULT, space=one_scale),
    "lean": replace(DEFAULT, space=lean),
    "portfolio-lean": replace(DEFAULT, portfolio=PORTFOLIO, space=lean),
    "portfolio-lean-annealed-halving": AnnealedHalving(sampler=ours, portfolio=PORTFOLIO, space=lean),
    "kinded": replace(DEFAULT, space=kinded),
    "portfolio-kinded": replace(DEFAULT, portfolio=PORTFOLIO, space=kinded),
    "portfolio-kinded-multivariate": replace(
        DEFAULT,
        portfolio=PORTFOLIO,
        space=kinded,
        sampler=MULTIVARIATE,
    ),
    "portfolio-kinded-early": replace(
        DEFAULT, portfolio=PORTFOLIO, space=kinded, sampler=seeded(TPESampler, n_startup_trials=5)
    ),
    "short-first": ShortFirst(sampler=MULTIVARIATE, portfolio=PORTFOLIO, space=kinded),
    "short-first-third": ShortFirst(sampler=MULTIVARIATE, portfolio=PORTFOLIO, space=kinded, share=1 / 3, eta=3),
    "portfolio-kinded-local": replace(DEFAULT, portfolio=PORTFOLIO, space=kinded, sampler=LOCAL),
    "short-first-local": ShortFirst(sampler=LOCAL, portfolio=PORTFOLIO, space=kinded),
    "kinded-random": replace(DEFAULT, space=kinded, sampler=seeded(RandomSampler), pruner=lambda search: NopPruner()),
    "kinded-optuna": OptunaSearch(
        sampler=seeded(TPESampler), pruner=lambda search: MedianPruner(), starts_with_control=False, space=kinded
    ),
    "gp": replace(DEFAULT, sampler=seeded(GPSampler)),
}
