"""A run's id, told from other words."""

import uuid

import pytest

from pipeline.tracking.run_id import is_run_id, not_a_run


@pytest.mark.parametrize(
    "text", ["", "attention", "0" * 31, "0" * 33, "G" * 32, uuid.UUID(int=0xABC).hex.upper(), "0" * 32 + "\n"]
)
def test_other_words_are_no_run(text: str) -> None:
    assert not is_run_id(text)


def test_an_id_is_one() -> None:
    assert is_run_id(uuid.UUID(int=0xABC).hex)
    assert not_a_run("`--run x`").lines == ["`--run x`: not a run's id (32 of 0-9a-f); `ui` shows them"]
