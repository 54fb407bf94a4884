"""Champions in a real MLflow store: evaluated, registered, moved, rolled back, interrupted and repaired."""

import importlib
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from pipeline import experiment
from pipeline.cli.exit_codes import exit_code
from pipeline.data.prepare import TrainingData
from pipeline.errors import PromotionRefused, UserError
from pipeline.experiment import ExperimentRequest
from pipeline.inference.classifier import Classifier
from pipeline.recipe import Recipe
from pipeline.registry import candidate_evaluation, export
from pipeline.registry import promote as module
from pipeline.registry import test_split as opener
from pipeline.registry.candidate_evaluation import TEST_EVALUATIONS, control_of
from pipeline.registry.gate import GateRecord, Rules, Verdict
from pipeline.registry.ledger import (
    PASSED,
    PROMOTED,
    REFUSED,
    ROLLED_BACK,
    TEST_EVALUATION,
    UNDONE,
    Champion,
    Ledger,
    VerdictEvidence,
)
from pipeline.registry.package import package
from pipeline.registry.promote import Registry, promote, registry_lock, roll_back, settle
from pipeline.tracking.models import digests, find_model
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker

DATA = Path("data")
RULES = Rules(class_margin=100, ece_margin=100, latency_factor=1000)  # a clock decides nothing in a test


@dataclass
class RecordingObserver:
    """Keeps the lines and verdicts."""

    lines: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def note(self, line: str) -> None:
        self.lines.append(line)

    def decided(self, verdict: Verdict, challenger: str, opponent: str) -> None:
        self.verdicts.append(verdict)


@dataclass(frozen=True)
class Store:
    """One study: the control worst, then a good run, the best, and one like it, which has a package."""

    home: Path
    control: str
    good: str
    best: str
    rival: str
    packed: Path

    def registry(self, home: Path, model: str) -> Registry:
        """With a ledger of its own, so that tests share MLflow's store and nothing else."""
        return Registry(MlflowTracker(self.home), Ledger(home), model)


@pytest.fixture(scope="module", autouse=True)
def one_export_a_model() -> Iterator[None]:
    """An export takes seconds, and its file is the same each time."""
    export_onnx, files = export.export_onnx, dict[str, bytes]()

    def cached(classifier: Classifier, path: Path) -> None:
        run = classifier.metadata.run_id
        if run not in files:
            export_onnx(classifier, path)
            files[run] = path.read_bytes()
        path.write_bytes(files[run])

    export.export_onnx = cached
    yield
    export.export_onnx = export_onnx


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, small_recipe: Recipe, digits: TrainingData) -> Store:
    home = tmp_path_factory.mktemp("store") / "mlruns"
    tracker = MlflowTracker(home)
    parent = tracker.open_study("tiny-v1-digits", "?", "val/accuracy", [])
    runs = []
    base = small_recipe.changed({"augmentation.mixup": 0, "augmentation.cutmix": 0, "augmentation.crop_padding": 0})
    for number, changes in enumerate([{"optimizer.lr": 1e-4}, {}, {"training.epochs": 8}, {"training.epochs": 9}]):
        request = ExperimentRequest(
            recipe=base.changed(changes),
            data=digits,
            device=torch.device("cpu"),
            name=f"trial {number}" + " (control)" * (not number),
            parent_run=parent.id,
            tags=RunTags(role="trial", study="tiny-v1-digits", trial=number),
        )
        done = experiment.run(request, tracker)
        runs.append(tracker.id_of(done.run_key))
    parent.end(State.FINISHED)
    assert tracker.flush(60)
    packed = home.parent / "packed"
    with find_model(home, None, runs[3]) as found:
        package(tracker, runs[3], found.folder, packed)
    return Store(home, *runs, packed)


def record(**fields: Any) -> dict[str, Any]:
    """The details of a verdict that no evaluation made."""
    made = GateRecord(
        opponent="champion",
        opponent_run=None,
        verdict=Verdict(results=()),
        rules=RULES,
        recipe_digest="",
        images=0,
        correct={},
        onnx_sha256="",
        predictions_sha256={},
    )
    return made.model_copy(update=fields).model_dump(mode="json")


def kinds(registry: Registry) -> list[str]:
    return [event.kind for event in registry.ledger.events(registry.model)]


# ------------------------------------------------------------------------------------------------- the way of a champion


def test_first_champion_second_champion_and_rollback(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, view = store.registry(tmp_path, "way"), RecordingObserver()
    opened: list[list[str]] = []
    open_test_split = opener.open_test_split

    def watched(*arguments: Any) -> Any:
        opened.append(kinds(registry))
        return open_test_split(*arguments)

    monkeypatch.setattr(opener, "open_test_split", watched)
    first = promote(registry, store.good, RULES, DATA, view, chosen="the best trial")
    assert first == Champion("1", store.good)
    assert opened == [[TEST_EVALUATION], [TEST_EVALUATION, TEST_EVALUATION]], (
        "the ledger has the test evaluation before the split is opened"
    )
    assert kinds(registry) == [TEST_EVALUATION, TEST_EVALUATION, PASSED, "begun", PROMOTED]
    verdict = registry.ledger.events()[2]
    assert verdict.evidence.record.opponent_run == store.control and verdict.reason == "the best trial"
    assert registry.alias("champion") == "1" and registry.alias("previous") is None

    version = registry.tracker.client.get_model_version("way", "1")
    assert version.run_id == store.good and version.description.startswith("# ")
    assert version.tags["ledger_event"] == str(verdict.id) and version.tags["test_split"] == verdict.split
    with find_model(store.home, None, "models:/way@champion") as model:  # compares every digest
        assert VerdictEvidence.model_validate_json((model.folder / "evidence.json").read_text()) == verdict.evidence
        assert digests(model.folder)["model.onnx"] == verdict.evidence.record.onnx_sha256, (
            "what was evaluated is what serves"
        )
    assert "torch in float32 differ by" in view.lines[0] and "the 144 images of the validation split" in view.lines[0]
    assert f"Test accuracy {verdict.evidence.record.correct[store.good] / 359:.1%} (" in version.description

    again = promote(registry, store.good, RULES, DATA, view)
    assert again == first and len(registry.ledger.events()) == 5 and "nothing to do" in view.lines[-1]

    second = promote(registry, store.best, RULES, DATA, view)
    assert second == Champion("2", store.best)
    assert (registry.alias("champion"), registry.alias("previous")) == ("2", "1")
    assert len(opened) == 3, "the champion's predictions were stored"
    assert [e.details["source"] for e in registry.ledger.events() if e.kind == TEST_EVALUATION][-2:] == [
        "images",
        "stored predictions",
    ]
    assert len(view.verdicts) == 2 and view.verdicts[1].passed

    assert roll_back(registry, None, "too slow") == first
    assert (registry.alias("champion"), registry.alias("previous")) == ("1", None)
    assert registry.ledger.events()[-1].reason == "too slow"
    with pytest.raises(UserError, match=r"its champion is the first; there is nothing to go back to"):
        roll_back(registry, None, "again")
    with pytest.raises(PromotionRefused, match=r"passed, and served as way version 2, .*\n.*`rollback --version 2`"):
        promote(registry, store.best, RULES, DATA, view)
    forced = promote(registry, store.best, RULES, DATA, view, forced="the other was slow too")
    assert forced == second, "the version that is there, not another one"
    assert registry.ledger.events()[-1].reason == "the other was slow too"
    assert roll_back(registry, "1", "slow") == first and roll_back(registry, "2", "it wasn't") == second
    assert len(opened) == 3


def test_model_that_is_not_better_is_refused_once(store: Store, tmp_path: Path) -> None:
    registry, view = store.registry(tmp_path, "worse"), RecordingObserver()
    promote(registry, store.best, RULES, DATA, view)
    before = len(registry.ledger.events())
    with pytest.raises(PromotionRefused) as caught:
        promote(registry, store.good, RULES, DATA, view)
    assert exit_code(caught.value) == 5
    assert [line.split(":")[0] for line in caught.value.lines[:3]] == ["better", "gain", "beyond seeds"]
    assert kinds(registry)[before:] == [TEST_EVALUATION, TEST_EVALUATION, REFUSED]
    assert registry.alias("champion") == "1"
    assert registry.tracker.client.list_artifacts(store.good, "gate")
    with pytest.raises(
        PromotionRefused, match=r"was evaluated on this test split by .*, and refused; `--force`"
    ) as caught:
        promote(registry, store.good, RULES, DATA, view)
    assert caught.value.lines[1].startswith("  better: p = ")
    with pytest.raises(PromotionRefused, match=r"^better"):
        promote(registry, store.good, RULES, DATA, view, forced="to be sure")
    last = registry.ledger.events()[-1]
    assert (last.kind, last.reason) == (REFUSED, "to be sure")


def test_control_as_first_champion_must_beat_constant_answer(store: Store, tmp_path: Path) -> None:
    registry, view = store.registry(tmp_path, "control"), RecordingObserver()
    with pytest.raises(PromotionRefused, match=r"^better: .* only the constant answer"):
        promote(registry, store.control, RULES, DATA, view)
    assert "must be better than a constant answer" in view.lines[0]


def test_refusal_against_the_control_names_the_way_out(store: Store, tmp_path: Path) -> None:
    registry = store.registry(tmp_path, "unsure")
    with pytest.raises(PromotionRefused) as caught:
        promote(registry, store.good, RULES.changed(["least_gain=99"]), DATA, RecordingObserver())
    assert caught.value.lines[-1].endswith(f"`promote --run {store.control}` takes that one")
    assert registry.alias("champion") is None


def test_other_onnx_than_was_evaluated_is_not_registered(store: Store, tmp_path: Path) -> None:
    registry, view = store.registry(tmp_path, "other-bytes"), RecordingObserver()
    evaluation = candidate_evaluation.CandidateEvaluation(
        registry.tracker, registry.ledger, registry.model, RULES, DATA, tmp_path / "files", view
    )
    challenger = evaluation.model_of_run(store.best, "challenger")
    split, details = opener.digest_of("digits", DATA), record(onnx_sha256="0" * 64)
    verdict = registry.ledger.record(PASSED, registry.model, store.best, split=split, details=details)
    with pytest.raises(PromotionRefused, match="exported now, its ONNX model isn't the one that was evaluated"):
        evaluation.onnx_of_verdict(challenger, verdict)


def test_first_champion_is_compared_with_a_control_alike(
    tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    """A trial meets the control's trial; the best of several seeds, in finals, the best of the control's seeds."""
    tracker = MlflowTracker(tmp_path / "mlruns")
    parent = tracker.open_study("fair-v1-digits", "?", "val/accuracy", [])

    def made(name: str, score: float, epochs: int = 2, **tags: str) -> str:
        tags |= {"study": "fair-v1-digits"}
        recipe = small_recipe.changed({"training.epochs": epochs})
        with tracker.run(name, recipe, digits, parent.id, tags) as run:
            run.log_metrics({"val/accuracy": score}, 1)
            run.end(State.FINISHED)
        return tracker.id_of(run.key)

    control = made("trial 0 (control)", 0.5, role="trial", trial="0")
    trial = made("trial 1", 0.9, 1, role="trial", trial="1")
    alone = made("final of trial 1, seed 1", 0.9, 1, role="final", trial="1", trial_run=trial)
    assert control_of(tracker, trial) == control and control_of(tracker, control) is None
    assert control_of(tracker, alone) == control, "where the control has no finals"
    lucky = [made(f"seed {n}", score, role="final", trial="0", trial_run=control) for n, score in enumerate((0.6, 0.4))]
    longer = made("seed 1", 0.8, 7, role="final", trial="0", trial_run=control)
    rival = made("seed 1", 0.9, 7, role="final", trial="1", trial_run=trial)
    assert control_of(tracker, alone) == lucky[0] and control_of(tracker, rival) == longer, "of finals as long"
    assert control_of(tracker, trial) == control, "one seed against one"
    assert [control_of(tracker, run) for run in (*lucky, longer)] == [None] * 3, "the control, whatever its seed"


def test_reproduction_is_no_candidate(store: Store, tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> None:
    registry = store.registry(tmp_path, "twice")
    with registry.tracker.run("reproduction", small_recipe, digits, tags={"reproduces": store.good}) as run:
        run.end(State.FINISHED)
    with pytest.raises(UserError, match=rf"a reproduction, which is no candidate; `promote --run {store.good}`"):
        promote(registry, registry.tracker.id_of(run.key), RULES, DATA, RecordingObserver())
    assert not registry.ledger.events()


def test_tampered_predictions_are_not_used(store: Store, tmp_path: Path) -> None:
    registry = store.registry(tmp_path, "tampered")
    promote(registry, store.good, RULES, DATA, RecordingObserver())
    (kept,) = (tmp_path / TEST_EVALUATIONS).glob(f"{store.good}-*")
    pq.write_table(pq.read_table(kept).slice(0, 100), kept)
    promote(registry, store.best, RULES, DATA, RecordingObserver())
    assert [e.details["source"] for e in registry.ledger.events() if e.kind == TEST_EVALUATION][-2:] == [
        "images",
        "images",
    ]


def test_moved_alias_is_reported_with_both_ways_out(store: Store, tmp_path: Path) -> None:
    registry = store.registry(tmp_path, "moved")
    promote(registry, store.good, RULES, DATA, RecordingObserver())
    promote(registry, store.best, RULES, DATA, RecordingObserver())
    registry.point("champion", "1")
    for command in (
        lambda: promote(registry, store.good, RULES, DATA, RecordingObserver()),
        lambda: roll_back(registry, None, "?"),
    ):
        with pytest.raises(UserError) as caught:
            command()
        assert (
            "names version 1, but by the ledger" in caught.value.lines[0]
            and "the champion is version 2" in caught.value.lines[0]
        )
        assert [line.split(" with")[0] for line in caught.value.lines[1:]] == [
            "  `rollback --version 1`",
            "  `rollback --version 2`",
        ]
    assert roll_back(registry, "2", "the ledger is right") == Champion("2", store.best)
    assert registry.champion() == Champion("2", store.best)
    with pytest.raises(UserError, match=r"`--version 7`: moved has no such version"):
        roll_back(registry, "7", "?")
    with pytest.raises(UserError, match=r"`--version 2`: is champion already"):
        roll_back(registry, "2", "?")
    with pytest.raises(UserError, match="`--reason`: is empty; say why"):
        roll_back(registry, None, " ")


@pytest.mark.parametrize("name", ["", "a/b", "a'b", "-x", "a:b", "x" * 101])
def test_model_name_is_a_plain_word(name: str, store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^`--model` "):
        store.registry(tmp_path, name)


# -------------------------------------------------------------------------------------------------- kills, and two at once


def make_champion(registry: Registry, run: str) -> None:
    """A champion, without an evaluation."""
    begun = registry.ledger.begin(PROMOTED, registry.model, run, None, previous=None)
    client = registry.tracker.client
    client.create_registered_model(registry.model)
    tags = {"promotion": begun.details["token"], "sha256.x": "0"}
    version = client.create_model_version(registry.model, f"runs:/{run}/model", run, tags).version
    module._move(registry, begun, str(version))


# An effect that a promotion has, and whether the kill comes before or after it. Once a version of the rival is there, its
# files are not written again, so that the first four come before.
KILLS = [
    ("begin", "after"),
    ("log_artifacts", "before"),
    ("log_artifacts", "after"),
    ("create_model_version", "before"),
    ("create_model_version", "after"),
    ("previous", "after"),
    ("champion", "before"),
    ("champion", "after"),
    ("end", "after"),
]
UNDONE_UNTIL = 4  # of the kills, those before there is a version


def killing(effect: Callable[..., Any], when: str) -> Callable[..., Any]:
    def call(*words: Any, **options: Any) -> Any:
        if when == "after":
            effect(*words, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    return call


def promote_rival(store: Store, home: Path, model: str) -> None:
    """From a verdict that is in the ledger, with a package that is packed already."""
    module._pack = lambda evaluation, challenger, verdict, folder: shutil.copytree(store.packed, folder)  # type: ignore[assignment]
    with registry_lock(home):
        promote(store.registry(home, model), store.rival, RULES, DATA, RecordingObserver())


def be_killed(store: Store, home: Path, model: str, effect: str, when: str) -> None:
    """A real promotion in a real process, which ends at that effect."""
    if effect in ("begin", "end"):
        setattr(Ledger, effect, killing(getattr(Ledger, effect), when))
    elif effect in ("previous", "champion"):
        point = Registry.point
        at = killing(point, when)
        Registry.point = lambda self, alias, version: (at if alias == effect else point)(self, alias, version)  # type: ignore[method-assign]
    else:
        setattr(MlflowClient, effect, killing(getattr(MlflowClient, effect), when))
    promote_rival(store, home, model)


def in_a_fork(work: Callable[[], None]) -> int:
    """The id of a process that does the work: exit code 0, or 5 where it was refused."""
    if pid := os.fork():
        return pid
    try:
        work()
    except PromotionRefused:
        os._exit(5)
    except BaseException:
        os._exit(99)
    os._exit(0)


def kills_and_a_race(store: Store, root: Path) -> None:
    """In a process that has opened no store, as connections must not be forked; what is slow to import is imported once."""
    for name in (
        "mlflow.store.tracking.sqlalchemy_store",
        "mlflow.store.model_registry.sqlalchemy_store",
        "sklearn.datasets",
    ):
        importlib.import_module(name)
    for number, (effect, when) in enumerate(KILLS):
        pid = in_a_fork(lambda: be_killed(store, root / str(number), f"killed-{number}", effect, when))  # noqa: B023
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (effect, when, status)
    read, write = os.pipe()

    def run() -> None:
        os.read(read, 1)
        promote_rival(store, root / "race", "race")

    pids = [in_a_fork(run) for _ in range(2)]
    os.write(write, b"go")
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
    assert codes == [0, 5], codes


@pytest.fixture(scope="module")
def aftermath(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder mlruns for each kill, and `race`: the good run is champion, the rival has passed, and then it happens."""
    root, split = tmp_path_factory.mktemp("aftermath"), opener.digest_of("digits", DATA)
    details = record(opponent="champion", opponent_run=store.good)
    for folder, model in [*((str(n), f"killed-{n}") for n in range(len(KILLS))), ("race", "race")]:
        registry = store.registry(root / folder, model)
        make_champion(registry, store.good)
        registry.ledger.record(PASSED, model, store.rival, split=split, details=details)
    process = multiprocessing.get_context("spawn").Process(target=kills_and_a_race, args=(store, root))
    process.start()
    process.join(400)
    assert process.exitcode == 0
    return root


@pytest.mark.parametrize("number", range(len(KILLS)), ids=lambda number: "-".join(KILLS[number]))
def test_kill_at_any_point_is_repaired_by_the_next_command(
    number: int, store: Store, aftermath: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, view, kill = (
        store.registry(aftermath / str(number), f"killed-{number}"),
        RecordingObserver(),
        KILLS[number],
    )
    moved = kill in (("champion", "after"), ("end", "after"))
    assert registry.alias("champion") == ("2" if moved else "1")
    with registry_lock(registry.ledger.home):
        settle(registry.tracker, registry.ledger, view.note)
    assert not registry.ledger.unfinished()
    if number < UNDONE_UNTIL:
        assert kinds(registry)[-1] == UNDONE
        assert "was undone (its version was not registered yet): version 1 is champion" in view.lines[0]
    else:
        assert kinds(registry)[-1] == PROMOTED
        assert kill == ("end", "after") or "was finished: version 2 is champion" in view.lines[0]
    assert registry.champion() == Champion(*(("1", store.good) if number < UNDONE_UNTIL else ("2", store.rival)))

    monkeypatch.setattr(module, "_pack", lambda b, c, v, folder: shutil.copytree(store.packed, folder))
    champion = promote(registry, store.rival, RULES, DATA, view)
    assert champion == Champion("2", store.rival), "the same command repeats it, without another test evaluation"
    assert (registry.alias("champion"), registry.alias("previous")) == ("2", "1")
    assert TEST_EVALUATION not in kinds(registry)
    with find_model(store.home, None, f"models:/{registry.model}@champion") as model:
        assert (model.folder / "model.onnx").exists()


def test_of_two_concurrent_promotions_one_wins(store: Store, aftermath: Path) -> None:
    registry = store.registry(aftermath / "race", "race")
    assert kinds(registry).count(PROMOTED) == 2 and registry.champion() == Champion("2", store.rival)
    with (
        registry_lock(aftermath),
        pytest.raises(PromotionRefused, match=r"another promotion or rollback is under way"),
        registry_lock(aftermath),
    ):
        pass


def test_interrupted_rollback_is_finished(store: Store, tmp_path: Path) -> None:
    registry, view = store.registry(tmp_path, "cut"), RecordingObserver()
    make_champion(registry, store.good)
    first, *_ = registry.ledger.champions("cut")
    version = registry.tracker.client.create_model_version("cut", "runs:/x", store.best).version
    begun = registry.ledger.begin(PROMOTED, "cut", store.best, first, version=str(version), previous="1")
    module._move(registry, begun, str(version))
    registry.ledger.begin(
        ROLLED_BACK, "cut", store.good, Champion("2", store.best), version="1", previous=None, reason="bad"
    )
    settle(registry.tracker, registry.ledger, view.note)
    assert registry.champion() == first and registry.ledger.events()[-1].reason == "bad"
    assert "a rollback of cut" in view.lines[0] and "was finished: version 1 is champion" in view.lines[0]


def test_interrupted_change_keeps_a_moved_alias(store: Store, tmp_path: Path) -> None:
    registry, view = store.registry(tmp_path, "hand"), RecordingObserver()
    make_champion(registry, store.good)
    client = registry.tracker.client
    begun = registry.ledger.begin(PROMOTED, "hand", store.best, Champion("1", store.good), previous="1")
    for token in (begun.details["token"], "another"):
        client.create_model_version("hand", "runs:/x", store.best, {"promotion": token})
    registry.point("champion", "3")
    settle(registry.tracker, registry.ledger, view.note)
    assert "the alias was moved by hand meanwhile" in view.lines[0] and registry.alias("champion") == "3"
