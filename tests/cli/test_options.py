"""Options are validated once, all problems together."""

from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from PIL import Image

from pipeline.cli.common import load_data
from pipeline.cli.options import (
    StudyOptions,
    budget_of,
    budget_problems,
    cluster_problems,
    database_problems,
    resolve,
)
from pipeline.data import datasets
from pipeline.errors import Problem, UserError
from pipeline.search.budget import Budget
from pipeline.search.worker import packed


def test_durations_are_seconds_or_have_a_unit() -> None:
    options = StudyOptions.parse({"timeout": "90", "stall_timeout": "1.5h"}, [])
    assert (options.timeout, options.stall_timeout) == (90, 5400)


def test_all_problems_are_reported_together() -> None:
    problems: list[Problem] = []
    typed = {"trials": "0", "stall_timeout": "soon", "cluster": "a b", "epochs": "3"}
    assert StudyOptions.parse(typed, problems) == StudyOptions(), "nothing of what was typed is used"
    subjects = {"`--trials 0`", "`--cluster a b`", "`--stall-timeout soon`"}
    assert {problem.subject for problem in problems} == subjects
    assert "should be a time: seconds, or 90s, 30m, 2h or 1d" in {problem.rule for problem in problems}
    with pytest.raises(UserError) as refused:
        resolve("attention", StudyOptions(), None, ["lr", "optimizer.lr=-1"], problems)
    assert len(refused.value.problems) == 5
    assert subjects | {"`--set lr`"} < {problem.subject for problem in refused.value.problems}


def test_settings_reach_the_search() -> None:
    options = StudyOptions.parse({"trials": "7", "epochs": "3", "seed": "5", "version": "2", "timeout": "1m"}, [])
    search = resolve("attention", options, "digits", ["training.batch_size=32 optimizer.lr=0.5"])
    assert (search.trials, search.version, search.timeout_s) == (7, 2, 60)
    assert search.settings["data.dataset"] == "digits" and search.settings["training.epochs"] == 3
    base = search.base
    assert (base.training.seed, base.training.batch_size, base.optimizer.lr) == (5, 32, 0.5)


def test_a_variant_is_told_as_far_as_nothing_else_was_given() -> None:
    def told(typed: dict[str, str | bool | None], *changes: str) -> str:
        lines = resolve("attention", StudyOptions.parse(typed, []), "digits", changes).remarks()
        return " ".join(lines).partition(": ")[2].partition(" for all")[0]

    assert told({}) == "trials=10 training.epochs=8 training.batch_size=64"
    assert told({"budget": "5m"}) == "training.epochs=8 training.batch_size=64"
    assert told({"trials": "3", "epochs": "2"}, "training.batch_size=32") == ""


def test_a_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hundreds of thousands of images that takes seconds."""
    monkeypatch.chdir(tmp_path)
    for number in range(40):
        folder = tmp_path / "pets" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 14), (number, 0, 0)).save(folder / f"{number}.png")
    read, listings = datasets.read_folder, []

    def counted(root: Path) -> Any:
        listings.append(read(root))
        return listings[-1]

    monkeypatch.setattr(datasets, "read_folder", counted)
    search = resolve("attention", StudyOptions(), "pets", [])
    data = load_data(search, tmp_path, torch.device("cpu"))
    assert len(listings) == 1 and data.listed and data.listed.listing.test_digest
    assert cloudpickle.loads(packed(search)).listed is None, "other processes look themselves"
    assert resolve("attention", StudyOptions(), None, ["data.dataset=pets"]).base == search.base, "however it is named"


def test_options_of_files_that_would_change_nothing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        folder = tmp_path / "pets" / ("test" if number > 7 else "train") / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    typed: dict[str, str | bool | None] = {"columns": "label=x", "test_fraction": "0.2", "corrupt": "skip"}

    def refused(dataset: str) -> list[str]:
        with pytest.raises(UserError) as error:
            resolve("attention", StudyOptions.parse(typed, []), dataset, [])
        return error.value.lines

    rest = "is for folders and manifests, not for digits; leave it out"
    values = ("columns = label=x", "test_fraction = 0.2", "corrupt = skip")
    assert refused("digits") == [f"data.{value}: {rest}" for value in values]
    (tmp_path / "digits").mkdir()
    assert (
        "not the folder here: `--dataset ./digits`" in resolve("attention", StudyOptions(), "digits", []).remarks()[0]
    )
    assert refused("pets") == [
        "data.columns = label=x: is for manifests, and pets is a folder; leave it out",
        "data.test_fraction = 0.2: is for data without test images, and pets has some; leave it out",
    ]


def test_a_cluster_needs_reachable_databases() -> None:
    subjects = [problem.subject for problem in cluster_problems(None, "sqlite:///x.db", "cuda:1")]
    assert subjects == ["`--storage`", "`--tracking-uri`", "`--device cuda:1`"]
    assert not cluster_problems("postgresql://host/optuna", "http://host:5000", "cuda")


def test_optuna_and_mlflow_need_a_database_each() -> None:
    assert not database_problems(None, None)
    [problem] = database_problems("sqlite:///a.db", "sqlite:///./a.db")
    assert problem.subject == "`--storage` and `--tracking-uri`"


def test_a_budget_keeps_what_was_typed() -> None:
    def budget(changes: str = "", **typed: str) -> Any:
        options = StudyOptions.parse(typed, [])
        return budget_of(options, [changes] if changes else [], started=5.0)

    assert budget(trials="7") is None
    assert budget(budget="2h", trials="7") == Budget(7200, 5.0, trials=7)
    assert budget(budget="90", epochs="3") == budget("training.epochs=3", budget="90") == Budget(90, 5.0, None, True)


def test_a_budget_contradicts_a_timeout_and_a_cluster() -> None:
    typed = {"budget": "1h", "timeout": "1h", "cluster": "auto"}
    subjects = [problem.subject for problem in budget_problems(StudyOptions.parse(typed, []))]
    assert subjects == ["`--budget` and `--timeout`", "`--budget`"]
    assert not budget_problems(StudyOptions.parse(typed | {"budget": None}, []))
    problems: list[Problem] = []
    StudyOptions.parse({"budget": "soon"}, problems)
    assert [problem.subject for problem in problems] == ["`--budget soon`"]
