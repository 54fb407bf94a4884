"""The command `fields`."""

from pathlib import Path

import pytest

from cli.helpers import assert_refused
from pipeline.cli import fields as command
from pipeline.recipe import Recipe


def test_every_field_of_every_kind_is_listed_with_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    command.fields()
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0] for line in lines if not line.startswith(" ")}
    kinds = [model for model in Recipe.model_json_schema()["$defs"].values() if "properties" in model]
    assert {name.partition(".")[2] for name in listed if "." in name} == {
        f for kind in kinds for f in kind["properties"]
    }
    assert "optimizer.name                adam, adamw, muon, sgd" in lines
    assert "training.execution            eager, compiled, graphed, compiled_graphed; default eager" in lines


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "optimizer.momentum",
            [
                "optimizer.momentum            >= 0, < 1; default 0.6 (muon)",
                "    of the filters",
                "optimizer.momentum            >= 0, < 1; default 0.9 (sgd)",
            ],
        ),
        (
            "schedule.final_fraction",
            ["schedule.final_fraction       >= 0, <= 1; default 0 (cosine, linear, one_cycle)"],
        ),
        ("curriculum.start_size", ["curriculum.start_size         integer >= 0, <= 512; default 0"]),
    ],
)
def test_one_field_is_listed_with_its_kinds(name: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command.fields(name)
    assert capsys.readouterr().out.splitlines()[: len(expected)] == expected


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("lr", "(did you mean optimizer.lr?)"),
        ("schedul", "(did you mean schedule?)"),
        ("colour", "; sections: data, model"),
    ],
)
def test_unknown_field_is_refused(word: str, hint: str, tmp_path: Path) -> None:
    assert_refused(["fields", word], [f"{word}: no such section or field{' ' * (hint[0] == '(')}{hint}"], tmp_path)
