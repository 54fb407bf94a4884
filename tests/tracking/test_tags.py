"""The tags of a run, as values and as MLflow's texts."""

import pytest

from pipeline.tracking.tags import RunTags, State


def test_tags_survive_the_way_through_mlflow() -> None:
    tags = RunTags(
        run_key="ab" * 16,
        role="final",
        study="attention-v1-digits",
        parent_run="cd" * 16,
        state=State.PRUNED,
        trial=0,
        control=True,
        worker={"host": "here", "pid": 1, "started": 2.5},
        git_dirty=False,
        objective="val/balanced_accuracy",
        planned_trials=24,
        data_places=("/data/pets", "/old/pets"),
        replaces=("ef" * 16,),
    )
    texts = tags.to_mlflow()
    assert (texts["mlflow.parentRunId"], texts["trial"], texts["git_dirty"]) == ("cd" * 16, "0", "false")
    assert RunTags.parse(texts | {"mlflow.user": "ann"}) == tags


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        *[
            ("role", "boss"),
            ("state", "asleep"),
            ("trial", "first"),
            ("trial", ""),
            ("planned_trials", "many"),
            ("study", ""),
            ("run_key", "x" * 32),
        ],
        *[
            ("worker", "{"),
            ("worker", "[]"),
            ("worker", '{"host": "here"}'),
            ("data_places", "{"),
            ("data_places", '"/data"'),
            ("objective", "loss"),
        ],
    ],
)
def test_tag_that_was_changed_by_hand_counts_as_missing(tag: str, text: str) -> None:
    assert RunTags.parse({tag: text}) == RunTags()
