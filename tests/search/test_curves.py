"""Learning curves collected: drawn the same for ever, written whole, gone on with after a kill."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.prepare import TrainingData
from pipeline.errors import DataError, UserError
from pipeline.recipe import Recipe
from pipeline.search.curves import averaging, collect, draw, load_curves, scores
from pipeline.search.study import Search, Study
from pipeline.training.loop import train

CPU = torch.device("cpu")


def space(trial: Any) -> None:
    trial.suggest_float("optimizer.lr", 0.01, 1, log=True)
    trial.suggest_categorical("optimizer.nesterov", [False, True])


def search_of(base: Recipe, space: Any = space) -> Search:
    study = Study(question="?", base=base, space=space, objective="val/f1_macro", trials=8)
    return Search("tiny", study, {}, version=1, trials=8, timeout_s=None)


@pytest.fixture
def search(small_recipe: Recipe) -> Search:
    return search_of(small_recipe)


def test_more_recipes_begin_with_the_same_ones_and_all_with_the_control(search: Search) -> None:
    few, many = draw(search, 3), draw(search, 6)
    assert few == many[:3]
    assert search.recipe(few[0]) == search.base
    assert len({params["optimizer.lr"] for params in many}) == 6
    other = replace(search, settings={"training.seed": 1})
    assert draw(other, 3)[1] != few[1]


def test_a_base_that_does_not_average_averages_over_half_an_epoch(search: Search, digits: TrainingData) -> None:
    plain = replace(search, settings={"training.ema_decay": 0})
    steps = len(digits.train.labels) // 64
    assert 1 / (1 - averaging(plain, digits).base.training.ema_decay) == pytest.approx(steps / 2)
    assert averaging(search, digits).base == search.base


def test_the_averaging_is_not_searched(small_recipe: Recipe, digits: TrainingData) -> None:
    def asks(trial: Any) -> None:
        trial.suggest_float("training.ema_decay", 0, 0.9)

    assert draw(averaging(search_of(small_recipe, asks), digits), 2) == [{}, {}]


def test_curves_are_what_training_reports_and_a_killed_collection_goes_on(
    search: Search, digits: TrainingData, tmp_path: Path
) -> None:
    file, whole = tmp_path / "new" / "curves.csv", tmp_path / "whole.csv"
    epochs: list[tuple[int, int]] = []
    first = next(collect(search, digits, CPU, file, 2, lambda recipe, report: epochs.append((recipe, report.epoch))))
    assert epochs == [(0, 1), (0, 2)]
    history = train(search.base, digits, CPU, score_plain=True).history
    assert first.averaged == [report.metrics["val/f1_macro"] for report in history]
    assert first.plain == [report.metrics["plain/f1_macro"] for report in history]
    text = file.read_text()

    done = list(collect(search, digits, CPU, whole, 2))
    assert [curve.recipe for curve in done] == [0, 1]
    for torn, redone in ((whole.read_text()[: len(text) + 30], [1]), (text[:-3], [0, 1])):
        file.write_text(torn)
        assert [curve.recipe for curve in collect(search, digits, CPU, file, 2)] == redone
        assert file.read_text() == whole.read_text()
    file.write_text(whole.read_text()[:-5])
    next(collect(search, digits, CPU, file, 2))
    assert file.read_text() == whole.read_text()
    assert [*collect(search, digits, CPU, file, 2)] == []

    known = load_curves(file)
    assert [curve.params for curve in known] == draw(search, 2)
    assert [curve.digest for curve in known] == [search.recipe(params).digest() for params in draw(search, 2)]
    assert scores(known, "plain") == pytest.approx(scores(done, "plain"), abs=1e-6)
    assert scores(known, "averaged") == pytest.approx(scores(done, "averaged"), abs=1e-6)
    assert scores(known, "plain").shape == (2, 2)
    assert not (scores(known, "plain") == scores(known, "averaged")).all()


def test_a_diverged_recipe_has_no_score_from_there_on(
    small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    def wild(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 0.1, 99)

    wilder = small_recipe.changed({"optimizer.weight_decay": 9, "training.clip_norm": 0, "training.epochs": 3})
    file = tmp_path / "curves.csv"
    done = list(collect(search_of(wilder, wild), digits, CPU, file, 2))
    assert not math.isnan(done[0].plain[0]) and math.isnan(done[1].plain[-1])
    known = load_curves(file)
    assert [[math.isnan(score) for score in curve.averaged] for curve in known] == [
        [math.isnan(score) for score in curve.plain] for curve in done
    ]


def test_other_recipes_are_refused_and_the_file_is_left_as_it_was(
    search: Search, digits: TrainingData, tmp_path: Path
) -> None:
    file = tmp_path / "curves.csv"
    next(collect(search, digits, CPU, file, 2))
    before = file.read_text()
    for changes in ({"training.batch_size": 32}, {"training.seed": 1}, {"data.train_fraction": 0.5}):
        with pytest.raises(UserError, match="its recipe 0 is another than this command's"):
            next(collect(search_of(search.base.changed(changes)), digits, CPU, file, 2))
    assert file.read_text() == before


def test_a_searched_length_is_refused(small_recipe: Recipe, digits: TrainingData, tmp_path: Path) -> None:
    def lengths(trial: Any) -> None:
        trial.suggest_int("training.epochs", 1, 3)

    with pytest.raises(UserError, match="curves need one length: --epochs N"):
        next(collect(search_of(small_recipe, lengths), digits, CPU, tmp_path / "curves.csv", 2))
    same = replace(search_of(small_recipe, lengths), settings={"training.epochs": 2})
    assert next(collect(same, digits, CPU, tmp_path / "curves.csv", 2)).recipe == 0


@pytest.mark.parametrize(
    "text",
    ["", "a,b\n1,2\n", "HEAD1,1,0.5,0.5,x,{}\n1,1,0.5,0.5,x,{}\n", "HEAD0,1,a,0.5,x,{}\n", "HEAD0,1\n", "HEAD", "\0"],
)
def test_what_is_no_table_of_curves_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "curves.csv"
    file.write_text(text.replace("HEAD", "recipe,epoch,score_plain,score_averaged,digest,params\n"))
    with pytest.raises(DataError, match=r"curves\.csv: "):
        load_curves(file)
