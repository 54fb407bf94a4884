"""A registered model's name, versions and aliases; that they agree with the ledger is in test_promote.py."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from registry.helpers import Store


@pytest.mark.parametrize("name", ["", "a/b", "a'b", "-x", "a:b", "x" * 101])
def test_model_name_is_a_plain_word(name: str, store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^`--model` "):
        store.registry(tmp_path, name)


def test_alias_is_set_moved_and_removed(store: Store, tmp_path: Path) -> None:
    registry = store.registry(tmp_path, "aliased")
    client = registry.tracker.client
    client.create_registered_model("aliased")
    for token in ("a", "b"):
        client.create_model_version("aliased", "runs:/x", store.best, {"promotion": token})
    client.create_model_version("aliased", "runs:/x", store.best)  # by a person
    assert registry.version_of(store.best) == "2" and registry.alias("champion") is None
    for version in ("1", "2", None, None):
        registry.set_alias("champion", version)
        assert registry.alias("champion") == version
