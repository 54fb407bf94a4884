"""The command `history`."""

from pathlib import Path

import pytest
from conftest import Trained, run_forked

from cli.helpers import assert_refused
from pipeline.registry.ledger import TEST_EVALUATION, Ledger


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["history"], ["no promotions yet in mlruns; `python -m pipeline promote NAME` evaluates"]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)


def test_a_name_that_the_ledger_lacks_is_refused_with_those_that_it_has(trained: Trained, tmp_path: Path) -> None:
    trained.copy(home := tmp_path / "mlruns")
    Ledger(home).record(TEST_EVALUATION, "digits", trained.finished, split="0" * 64, details={"source": "digits"})
    for words, name in ((["history"], "image-classifier"), (["history", "--model", "nope"], "nope")):
        refused = run_forked(*words, cwd=tmp_path)
        assert refused.returncode == 2, refused.stdout
        assert f"error: model {name}: the ledger has no such model; it has digits: `python -m pipeline history" in (
            refused.stderr
        )
    shown = run_forked("history", "--model", "digits", cwd=tmp_path)
    assert (
        shown.returncode == 0 and "digits: no champion; models that were evaluated on a test split: 1" in shown.stdout
    )
