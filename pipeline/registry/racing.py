"""Which recipe wins by its scores over several seeds, and which can no longer win: a function of numbers alone.

Racing by paired tests: Maron and Moore, Hoeffding races (NIPS 1993); Birattari et al., F-Race (GECCO 2002).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pipeline.evaluation.significance import Sample, fold_overlap, paired_t, sample
from pipeline.recipe import Recipe

MIN_SEEDS = 3  # with fewer nothing is more than chance
ALPHA = 0.05

RULES = (
    f"stopped early: worse than the best mean so far by a paired t test over at least {MIN_SEEDS} seeds, one-sided, its "
    f"level {ALPHA} shared among all pairs and tests; the control never, and the others not for long where that best one "
    "diverges or is infeasible later",
    "winner: the highest mean of the feasible recipes; what a two-sided paired t test "
    f"({ALPHA}, of the k-th decision over more and more seeds {ALPHA} / k²; none under {MIN_SEEDS} seeds) can't tell from it "
    "ties with it; a tie goes to the cheapest: FLOP of a "
    "prediction, then epochs, then the control, then the mean",
)

FOLDS_RULE = (
    "folds: each seed trains on another fold. Any two share most of their training images, so their scores depend on each "
    "other: intervals and tests are widened by the correction of Nadeau and Bengio (2003), which is approximate"
)


def seedless(recipe: Recipe) -> str:
    """A digest that does not change with the seed."""
    return recipe.changed({"training.seed": 0}).digest()


@dataclass(frozen=True)
class Candidate:
    """A recipe to be trained again, with seeds other than its own."""

    recipe: Recipe
    trial: int
    trial_run: str
    is_control: bool
    score: float | None  # of its trial; None where the control's did not finish
    seconds: float  # that one training should take, by its trial

    @cached_property
    def digest(self) -> str:
        """Of the recipe whatever its seed."""
        return seedless(self.recipe)

    @property
    def name(self) -> str:
        """`trial 3`, or `trial 0 (control)`."""
        return f"trial {self.trial}" + (" (control)" if self.is_control else "")

    def with_seed(self, seed: int, folds: int = 0, fold: int = 0) -> Recipe:
        """What is trained; on one of so many folds, where there are any."""
        on_fold = {"data.folds": folds, "data.fold": fold} if folds else {}
        return self.recipe.changed({"training.seed": seed, **on_fold})


@dataclass(frozen=True)
class Final:
    """One training of a candidate that finished or diverged, as it would each time."""

    run_id: str | None  # None where MLflow had not answered yet
    score: float | None  # None where it diverged
    seconds: float
    infeasible: str = ""  # the constraints of its study that it breaks
    run_key: str = ""  # of a training of this process


class Racing:
    """The scores so far, and which candidates are stopped.

    `least_sd` is the step that one image of the validation split makes in a score (`image_step`). Where each seed trains
    on another of `folds`, tests and intervals account for what these share.
    """

    def __init__(self, candidates: Sequence[Candidate], num_seeds: int, least_sd: float, folds: int = 0):
        self.candidates, self.num_seeds, self.least_sd, self.folds = candidates, num_seeds, least_sd, folds
        self.finals: dict[str, dict[int, Final]] = {candidate.digest: {} for candidate in candidates}
        self.stopped: dict[str, str] = {}  # digest -> reason
        self.beaten_by: dict[str, str] = {}  # digest of one that was stopped as beaten -> of the leader then

    def running(self) -> list[Candidate]:
        """Those still trained; the control always is."""
        return [c for c in self.candidates if c.is_control or c.digest not in self.stopped]

    def following(self, seeds: Sequence[int]) -> tuple[Candidate, int] | None:
        """What is trained next, so that all have these seeds; None where nothing is missing."""
        return next(((c, seed) for seed in seeds for c in self.running() if seed not in self.finals[c.digest]), None)

    def add(self, candidate: Candidate, seed: int, final: Final) -> list[str]:
        """A training ended. A recipe that diverges, or is infeasible, with some seed is stopped: it isn't reliable.

        What was stopped as beaten by it goes on, a line for each: that one can't win any more.
        """
        self.finals[candidate.digest][seed] = final
        if final.score is None:
            self.stopped.setdefault(candidate.digest, f"diverged with seed {seed}")
        if final.infeasible:
            self.stopped.setdefault(candidate.digest, f"infeasible with seed {seed}: {final.infeasible}")
        if candidate.digest not in self.stopped:
            return []
        lines = []
        for other in self.candidates:
            if self.beaten_by.get(other.digest) == candidate.digest:
                del self.beaten_by[other.digest], self.stopped[other.digest]
                lines.append(f"{other.name}: goes on, as {candidate.name}, which was ahead of it, can't win")
        return lines

    def learn_ids(self, id_of: Callable[[str], str]) -> None:
        """MLflow's ids of what this process trained, by their run keys."""
        for finals in self.finals.values():
            for seed, final in finals.items():
                if final.run_key:
                    finals[seed] = replace(final, run_id=id_of(final.run_key))

    def scores(self, candidate: Candidate) -> dict[int, float]:
        """By seed, of those that did not diverge."""
        return {seed: f.score for seed, f in self.finals[candidate.digest].items() if f.score is not None}

    def mean(self, candidate: Candidate) -> float:
        """Over the seeds so far."""
        scores = self.scores(candidate)
        return sum(scores.values()) / len(scores)

    def differences(self, first: Candidate, second: Candidate) -> list[float]:
        """First less second, by common seed."""
        minuends, subtrahends = self.scores(first), self.scores(second)
        return [minuends[seed] - subtrahends[seed] for seed in minuends if seed in subtrahends]

    def p_value(self, first: Candidate, second: Candidate) -> float:
        """Two-sided, of the paired t test."""
        return paired_t(self.differences(first, second), self.least_sd, self.overlap)

    def sample(self, values: Sequence[float]) -> Sample:
        """Of scores or differences, one for each seed."""
        return sample(values, self.least_sd, self.overlap)

    @property
    def overlap(self) -> float:
        """See `significance.sample`."""
        return fold_overlap(self.folds)

    @property
    def unit(self) -> str:
        """What a score belongs to, in the plural."""
        return "folds" if self.folds else "seeds"

    def eligible(self) -> list[Candidate]:
        """Those that may win."""
        return [candidate for candidate in self.candidates if candidate.digest not in self.stopped]

    def stop_the_beaten(self) -> list[str]:
        """After a seed: stops those that can no longer win; a line for each. See RULES.

        One-sided level of each test: ALPHA over the other candidates and the seeds after which is tested (Bonferroni),
        so that the truly best recipe is taken for beaten, by any other after any seed, in at most ALPHA of all finals.
        """
        eligible = self.eligible()
        num_tests = self.num_seeds - MIN_SEEDS  # after the last seed there is nothing to save
        n = max((len(self.scores(candidate)) for candidate in eligible), default=0)
        if not MIN_SEEDS <= n < self.num_seeds:
            return []
        leader = max(eligible, key=self.mean)
        level = 2 * ALPHA / (max(len(self.candidates) - 1, 1) * num_tests)  # of a two-sided p-value whose sign is known
        lines = []
        for candidate in eligible:
            p = self.p_value(leader, candidate)
            if candidate is not leader and not candidate.is_control and p < level:
                gap = 100 * (self.mean(leader) - self.mean(candidate))
                reason = f"{gap:.2f} points behind {leader.name} after {n} seeds, p = {p / 2:.1g} under {level / 2:.1g}"
                self.stopped[candidate.digest] = f"stopped early: {reason}"
                self.beaten_by[candidate.digest] = leader.digest
                lines.append(f"{candidate.name}: can no longer win, {reason}")
        return lines


def choose(racing: Racing, flop: Mapping[str, int], looks: int = 1) -> tuple[Candidate, list[Candidate], str] | None:
    """(the winner, those that tie with the highest mean, the reason); None where every candidate is stopped. See RULES.

    It is the decision number `looks` over more and more seeds. At one level for all, equal recipes would differ in 12 % of
    the cases after looks at 3, 5 and 10 seeds; at ALPHA / looks² they do in 6 % (simulated). `flop` is what a prediction
    costs, by digest: it is paid for as long as the model is used, a training once. Both are counted and not timed, since
    other work on the machine changes times by more than recipes do.
    """
    eligible = racing.eligible()
    if not eligible:
        return None
    leader, level = max(eligible, key=racing.mean), ALPHA / looks**2
    tied = [c for c in eligible if c is leader or racing.num_seeds < MIN_SEEDS or racing.p_value(leader, c) >= level]
    if len(tied) == 1:
        stopped = "every other recipe was stopped early, diverged or is infeasible"
        sole = stopped if len(racing.candidates) > 1 else "the only recipe in the finals"
        return leader, tied, "beyond the noise" if len(eligible) > 1 else sole

    def cost(c: Candidate) -> tuple[float, ...]:
        return flop[c.digest], c.recipe.training.epochs, not c.is_control, -racing.mean(c)

    first, second = sorted(tied, key=cost)[:2]
    reasons = (
        "cheaper to predict with",
        "trained in fewer epochs",
        "the control, which changes nothing",
        "the higher mean",
    )
    differ = [a != b for a, b in zip(cost(first), cost(second), strict=True)]
    return first, tied, reasons[differ.index(True)] if any(differ) else "as good in every respect"
