"""Champions in a real MLflow store: registered, moved, rolled back, interrupted and repaired."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trained
from mlflow import MlflowClient

from pipeline.data.prepare import TrainingData
from pipeline.errors import DataError, PromotionRefused, UserError
from pipeline.inference.classifier import Classifier
from pipeline.recipe import Recipe
from pipeline.registry import export
from pipeline.registry import promote as module
from pipeline.registry import test_split as opener
from pipeline.registry.ledger import (
    BEGUN,
    PASSED,
    PROMOTED,
    ROLLED_BACK,
    TEST_EVALUATION,
    UNDONE,
    Champion,
    Ledger,
    VerdictEvidence,
)
from pipeline.registry.package import Package
from pipeline.registry.promote import promote, promotion_lock, registry_lock, roll_back, settle
from pipeline.registry.registered_model import Registry
from pipeline.registry.speed_runs import SPEED_RUNS
from pipeline.sections.data import Data
from pipeline.tracking.models import digests, find_model
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker, RunRequest
from registry.helpers import DATA, RULES, RecordingObserver, Store, copy_of, export_once, kinds, record

pytestmark = pytest.mark.usefixtures("one_export_a_model")

# ------------------------------------------------------------------------------------------------- the way of a champion


def test_first_champion_second_champion_and_rollback(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, view = store.registry(tmp_path, "way"), RecordingObserver()
    opened: list[list[str]] = []
    read_test_split = opener.read_test_split

    def watched(*arguments: Any) -> Any:
        opened.append(kinds(registry))
        return read_test_split(*arguments)

    monkeypatch.setattr(opener, "read_test_split", watched)
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
    assert "images of the test split: the challenger " in view.lines[1], "the number that a promotion is about"
    assert f"Test accuracy {verdict.evidence.record.correct[store.good] / 359:.1%} (" in version.description

    again = promote(registry, store.good, RULES, DATA, view)
    assert again == first and len(registry.ledger.events()) == 5 and "nothing to do" in view.lines[-1]

    second = promote(registry, store.best, RULES, DATA, view)
    assert second == Champion("2", store.best)
    assert [event.evidence.record.comparison for event in registry.ledger.events() if event.kind == PASSED] == [1, 2]
    [line] = [line for line in view.lines if line.startswith("comparison number")]
    assert line.startswith("comparison number 2 on this test split: alpha = 0.05") and "up to 10 %" in line
    assert (registry.alias("champion"), registry.alias("previous")) == ("2", "1")
    assert len(opened) == 3, "the champion's predictions were stored"
    assert [e.details["source"] for e in registry.ledger.events() if e.kind == TEST_EVALUATION][-2:] == [
        "images",
        "stored predictions",
    ]
    assert len(view.verdicts) == 2 and view.verdicts[1].passed
    with pytest.raises(
        PromotionRefused,
        match=r"version 1, which is champion no more; .*\n.*`rollback --version 1 --model way` with a `--reason` makes",
    ):
        promote(registry, store.good, RULES, DATA, view)
    with pytest.raises(PromotionRefused, match=r"and passed, to become way; `--force`"):
        promote(Registry(registry.tracker, registry.ledger, "way-too"), store.best, RULES, DATA, view)

    [files] = store.home.glob(f"**/{store.good}/**/model/model.onnx")
    files.rename(files.with_name("gone"))
    with pytest.raises(
        DataError, match=r"way version 1, .*: its files are not those .*; put them back.*gone for good, delete"
    ):
        roll_back(registry, None, "too slow")
    assert registry.champion() == second and not registry.ledger.unfinished()
    files.with_name("gone").rename(files)

    assert roll_back(registry, None, "too slow") == first
    assert (registry.alias("champion"), registry.alias("previous")) == ("1", None)
    assert registry.ledger.events()[-1].reason == "too slow"
    with pytest.raises(UserError, match=r"its champion is the first; there is nothing to go back to"):
        roll_back(registry, None, "again")
    with pytest.raises(
        PromotionRefused, match=r"passed, and served as way version 2, .*\n.*`rollback --version 2 --model way`"
    ):
        promote(registry, store.best, RULES, DATA, view)
    forced = promote(registry, store.best, RULES, DATA, view, forced="the other was slow too")
    assert forced == second, "the version that is there, not another one"
    assert registry.ledger.events()[-1].reason == "the other was slow too"
    newest = next(event for event in reversed(registry.ledger.events()) if event.kind == PASSED)
    version = registry.tracker.client.get_model_version("way", "2")
    assert (version.tags["ledger_event"], version.tags["against"]) == (str(newest.id), store.good)
    assert version.description.startswith(f"Promoted by the verdict of {newest.time}, ")
    assert "\n# Image classifier: " in version.description and len(version.description) <= 5000
    assert roll_back(registry, "1", "slow") == first and roll_back(registry, "2", "it wasn't") == second
    assert len(opened) == 3


def test_speed_runs_in_the_ledger_are_no_registered_model(store: Store, tmp_path: Path) -> None:
    registry, notes = store.registry(tmp_path, "beside"), list[str]()
    registry.ledger.record(TEST_EVALUATION, SPEED_RUNS, "", split="a digest", reason="bench-gpu")
    settle(registry.tracker, registry.ledger, notes.append)
    assert notes == []


def test_refusal_against_the_control_names_the_way_out(store: Store, tmp_path: Path) -> None:
    registry = store.registry(tmp_path, "unsure")
    with pytest.raises(PromotionRefused) as caught:
        promote(registry, store.good, RULES.changed(["least_gain=99"]), DATA, RecordingObserver())
    assert caught.value.lines[-1].endswith(f"`promote --run {store.control} --model unsure` takes that one")
    assert registry.alias("champion") is None


def test_champion_whose_files_are_gone_names_the_way_out(store: Store, tmp_path: Path) -> None:
    registry, view = store.registry(tmp_path, "gone"), RecordingObserver()
    make_champion(registry, store.good, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="gone for good, delete this version in MLflow, and `promote` does without it"):
        promote(registry, store.best, RULES, DATA, view)
    assert kinds(registry)[-1] == PROMOTED and registry.alias("champion") == "1", "nothing was decided"
    registry.tracker.client.delete_model_version("gone", "1")
    settle(registry.tracker, registry.ledger, view.note)
    assert promote(registry, store.best, RULES, DATA, view) == Champion("2", store.best)


def test_champion_whose_run_was_removed_for_good_is_recorded_as_deleted(candidates: Store, tmp_path: Path) -> None:
    home = tmp_path / "mlruns"
    Trained(candidates.home, candidates.best, "").copy(home)
    registry, view = Registry(MlflowTracker(home), Ledger(home), "image-classifier"), RecordingObserver()
    make_champion(registry, candidates.good)
    registry.tracker.client.delete_run(candidates.good)
    database = f"sqlite:///{home / 'mlflow.db'}"
    words = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", database, "--run-ids", candidates.good]
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, "MLFLOW_TRACKING_URI": database})
    settle(registry.tracker, registry.ledger, view.note)
    assert "version 1, the champion, was deleted in MLflow, or its run for good" in view.lines[0]
    assert registry.champion() is None and registry.alias("champion") is None
    assert promote(registry, candidates.best, RULES, DATA, view) == Champion("2", candidates.best)


def test_reproduction_is_no_candidate(store: Store, tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> None:
    registry = store.registry(tmp_path, "twice")
    with registry.tracker.run(
        RunRequest(
            name="reproduction", recipe=small_recipe, data=digits, tags=RunTags.parse({"reproduces": store.good})
        )
    ) as run:
        run.end(State.FINISHED)
    with pytest.raises(
        UserError, match=rf"a reproduction, which is no candidate; `promote --run {store.good} --model twice`"
    ):
        promote(registry, registry.tracker.id_of(run.key), RULES, DATA, RecordingObserver())
    assert not registry.ledger.events()


def test_infeasible_run_is_no_candidate(store: Store, tmp_path: Path) -> None:
    registry = store.registry(tmp_path, "infeasible")
    parent = registry.tracker.client.get_run(store.good).data.tags["mlflow.parentRunId"]
    registry.tracker.client.set_tag(parent, "constraints", '{"model/parameters": 10}')
    try:
        with pytest.raises(PromotionRefused, match=r"infeasible: model/parameters 1,770, at most 10; `promote tiny-v1"):
            promote(registry, store.good, RULES, DATA, RecordingObserver())
    finally:
        registry.tracker.client.delete_tag(parent, "constraints")
    assert not registry.ledger.events()


def test_moved_alias_is_reported_with_both_ways_out(store: Store, tmp_path: Path) -> None:
    registry = store.registry(tmp_path, "moved")
    promote(registry, store.good, RULES, DATA, RecordingObserver())
    promote(registry, store.best, RULES, DATA, RecordingObserver())
    registry.set_alias("champion", "1")
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
            "  `rollback --version 1 --model moved`",
            "  `rollback --version 2 --model moved`",
        ]
    assert roll_back(registry, "2", "the ledger is right") == Champion("2", store.best)
    assert registry.champion() == Champion("2", store.best)
    with pytest.raises(UserError, match=r"`--version 7`: moved has no such version"):
        roll_back(registry, "7", "?")
    registry.tracker.client.create_model_version("moved", f"runs:/{store.control}/model", store.control)
    registry.set_alias("champion", "3")
    with pytest.raises(UserError, match=r"\n  version 3 was registered by hand: remove its alias champion in MLflow\n"):
        registry.champion()
    registry.set_alias("champion", "2")
    with pytest.raises(UserError, match=r"`--version 3`: was registered by hand and never evaluated; `promote --run"):
        roll_back(registry, "3", "?")
    with pytest.raises(UserError, match=r"`--version 2`: is champion already"):
        roll_back(registry, "2", "?")
    with pytest.raises(UserError, match="`--reason`: is empty; say why"):
        roll_back(registry, None, " ")


# -------------------------------------------------------------------------------------------------- kills, and two at once


def make_champion(registry: Registry, run: str, files: str = "") -> None:
    """A champion, without an evaluation; `files` is where its model lies, if not with the run."""
    begun = registry.ledger.begin(PROMOTED, registry.model, run, None, previous=None)
    client = registry.tracker.client
    client.create_registered_model(registry.model)
    tags = {"promotion": begun.details["token"], "sha256.x": "0"}
    version = client.create_model_version(registry.model, files or f"runs:/{run}/model", run, tags).version
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
# The same of a first promotion, with its own evaluation and package: after an event of the ledger or an effect -> the run.
FIRST_KILLS = {TEST_EVALUATION: "good", PASSED: "best", "create_registered_model": "rival"}


def killing(effect: Callable[..., Any], when: str) -> Callable[..., Any]:
    def call(*words: Any, **options: Any) -> Any:
        if when == "after":
            effect(*words, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    return call


def package_of(store: Store) -> Package:
    """The rival's package, which was made before."""
    return Package(store.packed, digests(store.packed), "", 0, 0.0, None)


def promote_rival(store: Store, home: Path, model: str) -> None:
    """From a verdict that is in the ledger, with a package that is packed already."""
    module._pack = lambda *_: package_of(store)
    promote(store.registry(home, model), store.rival, RULES, DATA, RecordingObserver())


def be_killed(store: Store, home: Path, model: str, effect: str, when: str) -> None:
    """A real promotion in a real process, which ends at that effect."""
    if effect in ("begin", "end"):
        setattr(Ledger, effect, killing(getattr(Ledger, effect), when))
    elif effect in ("previous", "champion"):
        set_alias = Registry.set_alias
        at = killing(set_alias, when)
        Registry.set_alias = lambda self, alias, version: (at if alias == effect else set_alias)(self, alias, version)  # type: ignore[method-assign]
    else:
        setattr(MlflowClient, effect, killing(getattr(MlflowClient, effect), when))
    promote_rival(store, home, model)


def be_killed_at_first(store: Store, home: Path, model: str, effect: str) -> None:
    """As `be_killed`, without a champion, and from the beginning."""
    if effect in (TEST_EVALUATION, PASSED):
        append = Ledger.record
        at = killing(append, "after")
        Ledger.record = lambda self, kind, *words, **options: (  # type: ignore[method-assign]
            (at if kind == effect else append)(self, kind, *words, **options)
        )
    else:
        setattr(MlflowClient, effect, killing(getattr(MlflowClient, effect), "after"))
    promote(store.registry(home, model), getattr(store, FIRST_KILLS[effect]), RULES, DATA, RecordingObserver())


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


def kills_and_a_race(store: Store, new_store: Store, root: Path, exports: dict[str, bytes]) -> None:
    """In a process that has opened no store, as connections must not be forked; what is slow to import is imported once."""
    for name in (
        "mlflow.store.tracking.sqlalchemy_store",
        "mlflow.store.model_registry.sqlalchemy_store",
        "sklearn.datasets",
        "mlflow.onnx",
        "onnxruntime",
    ):
        importlib.import_module(name)
    export_once(exports)
    for number, (effect, when) in enumerate(KILLS):
        pid = in_a_fork(lambda: be_killed(store, root / str(number), f"killed-{number}", effect, when))  # noqa: B023
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (effect, when, status)
    for number, effect in enumerate(FIRST_KILLS):
        model = f"first-{number}"
        pid = in_a_fork(lambda: be_killed_at_first(new_store, root / model, model, effect))  # noqa: B023
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (effect, status)
    read, write = os.pipe()

    def run() -> None:
        os.read(read, 1)
        promote_rival(store, root / "race", "race")

    pids = [in_a_fork(run) for _ in range(2)]
    os.write(write, b"go")
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
    assert codes == [0, 5], codes


@pytest.fixture(scope="module")
def new_store(candidates: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A copy in which nothing is registered."""
    return copy_of(candidates, "new", tmp_path_factory)


@pytest.fixture(scope="module")
def aftermath(
    store: Store, new_store: Store, exports: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder mlruns for each kill, and `race`: the good run is champion, the rival has passed, and then it happens.

    And one for each of FIRST_KILLS, which happens in `new_store`, where there is no champion.
    """
    exports[store.rival] = (store.packed / "model.onnx").read_bytes()
    for run in (store.control, store.good, store.best):  # once here, not in each process that is killed
        with find_model(store.home, None, run) as model:
            export.export_onnx(
                Classifier.load(model.folder, torch.device("cpu")), tmp_path_factory.mktemp("onnx") / "x"
            )
    root, split = tmp_path_factory.mktemp("aftermath"), opener.digest_of(Data(dataset="digits"), DATA)
    details = record(opponent="champion", opponent_run=store.good)
    for folder, name in [*((str(n), f"killed-{n}") for n in range(len(KILLS))), ("race", "race")]:
        registry = store.registry(root / folder, name)
        make_champion(registry, store.good)
        registry.ledger.record(PASSED, name, store.rival, split=split, details=details)
    process = multiprocessing.get_context("spawn").Process(
        target=kills_and_a_race, args=(store, new_store, root, exports)
    )
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
        assert "was undone (its version is not in the registry): version 1 is champion" in view.lines[0]
    else:
        assert kinds(registry)[-1] == PROMOTED
        assert kill == ("end", "after") or "was finished: version 2 is champion" in view.lines[0]
    assert registry.champion() == Champion(*(("1", store.good) if number < UNDONE_UNTIL else ("2", store.rival)))

    monkeypatch.setattr(module, "_pack", lambda *_: package_of(store))
    champion = promote(registry, store.rival, RULES, DATA, view)
    assert champion == Champion("2", store.rival), "the same command repeats it, without another test evaluation"
    assert (registry.alias("champion"), registry.alias("previous")) == ("2", "1")
    assert TEST_EVALUATION not in kinds(registry)
    with find_model(store.home, None, f"models:/{registry.model}@champion") as model:
        assert (model.folder / "model.onnx").exists()


@pytest.mark.parametrize(
    ("effect", "before", "after"),
    [
        (TEST_EVALUATION, [TEST_EVALUATION], [TEST_EVALUATION, TEST_EVALUATION, PASSED, BEGUN, PROMOTED]),
        (PASSED, [TEST_EVALUATION, TEST_EVALUATION, PASSED], [BEGUN, PROMOTED]),
        (
            "create_registered_model",
            [TEST_EVALUATION, TEST_EVALUATION, PASSED, BEGUN],
            [UNDONE, BEGUN, PROMOTED],
        ),
    ],
)
def test_first_promotion_that_was_killed_is_repeated(
    effect: str, before: list[str], after: list[str], new_store: Store, aftermath: Path
) -> None:
    model = f"first-{list(FIRST_KILLS).index(effect)}"
    registry, run = new_store.registry(aftermath / model, model), getattr(new_store, FIRST_KILLS[effect])
    assert kinds(registry) == before and registry.alias("champion") is None and registry.version_of(run) is None
    assert promote(registry, run, RULES, DATA, RecordingObserver()) == registry.champion() == Champion("1", run)
    assert kinds(registry) == before + after
    passed = next(event for event in registry.ledger.events() if event.kind == PASSED)
    with find_model(new_store.home, None, f"models:/{model}@champion") as found:  # compares every digest
        assert VerdictEvidence.model_validate_json((found.folder / "evidence.json").read_text()) == passed.evidence


def test_of_two_concurrent_promotions_one_wins(store: Store, aftermath: Path) -> None:
    registry = store.registry(aftermath / "race", "race")
    assert kinds(registry).count(PROMOTED) == 2 and registry.champion() == Champion("2", store.rival)
    with (
        promotion_lock(aftermath / "race"),
        pytest.raises(PromotionRefused, match=r"another promotion is under way"),
    ):
        promote(registry, store.good, RULES, DATA, RecordingObserver())


def test_rollback_does_not_wait_for_an_evaluation(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, split = store.registry(tmp_path, "meanwhile"), opener.digest_of(Data(dataset="digits"), DATA)
    make_champion(registry, store.good)
    client, (first,) = registry.tracker.client, registry.ledger.champions("meanwhile")
    begun = registry.ledger.begin(PROMOTED, "meanwhile", store.control, first, previous="1")
    client.create_model_version("meanwhile", "runs:/x", store.control, {"promotion": begun.details["token"]})
    details = record(opponent="champion", opponent_run=store.control)
    registry.ledger.record(PASSED, "meanwhile", store.rival, split=split, details=details)
    monkeypatch.setattr(module, "find_model", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(module, "_pack", lambda *_: package_of(store))

    class RollingBack(RecordingObserver):
        def note(self, line: str) -> None:
            super().note(line)
            if line.startswith("evaluated already"):
                with registry_lock(tmp_path):
                    roll_back(registry, None, "while another is evaluated")

    view = RollingBack()
    with pytest.raises(
        PromotionRefused, match=r"champion changed meanwhile \(version 1, .*; `--force` with `--reason`"
    ):
        promote(registry, store.rival, RULES, DATA, view)
    assert "was finished: version 2 is champion" in view.lines[0], "what was interrupted before"
    assert kinds(registry)[-2:] == ["begun", ROLLED_BACK] and registry.champion() == first


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
    registry.ledger.begin(ROLLED_BACK, "cut", store.best, first, version="2", previous="1")
    registry.tracker.client.delete_model_version("cut", "2")
    settle(registry.tracker, registry.ledger, view.note)
    assert "was undone (its version is not in the registry)" in view.lines[1] and registry.champion() == first


def test_interrupted_change_keeps_a_moved_alias(store: Store, tmp_path: Path) -> None:
    registry, view = store.registry(tmp_path, "hand"), RecordingObserver()
    make_champion(registry, store.good)
    client = registry.tracker.client
    begun = registry.ledger.begin(PROMOTED, "hand", store.best, Champion("1", store.good), previous="1")
    for token in (begun.details["token"], "another"):
        client.create_model_version("hand", "runs:/x", store.best, {"promotion": token})
    registry.set_alias("champion", "3")
    settle(registry.tracker, registry.ledger, view.note)
    assert "the alias was moved by hand meanwhile" in view.lines[0] and registry.alias("champion") == "3"


def test_another_tracking_store_ends_no_champion(store: Store, tmp_path: Path) -> None:
    registry, view = store.registry(tmp_path, "far"), RecordingObserver()
    make_champion(registry, store.good)
    begun = registry.ledger.begin(PROMOTED, "far", store.best, Champion("1", store.good), previous="1")
    other = Registry(MlflowTracker(tmp_path / "other"), registry.ledger, "far")
    settle(other.tracker, other.ledger, view.note)
    assert view.lines == [] and registry.ledger.events("far")[-1] == begun
    with pytest.raises(UserError, match=r"^far: none of its runs .* is in this tracking store; `--tracking-uri`"):
        promote(other, store.best, RULES, DATA, view)
    assert other.deleted() == [] and registry.champion() == Champion("1", store.good)
