"""Which runs are read, and how what people changed in MLflow's UI is reported."""

import pytest
from mlflow.entities import Run as StoredRun
from mlflow.entities import RunData, RunInfo, RunTag

from pipeline.tracking.intact import control_runs, describe_omitted, intact, missing_tags, run_label
from pipeline.tracking.tags import RunTags, State

TRIAL = RunTags(
    role="trial",
    study="a-v1-digits",
    trial=1,
    state=State.FINISHED,
    recipe_digest="r1",
    data_digest="d",
    split_digest="s",
)


def make_run(tags: dict[str, str], name: str = "trial 1", status: str = "FINISHED") -> StoredRun:
    info = RunInfo("ab" * 16, "1", "ann", status, 1, 2, "active", run_name=name)
    return StoredRun(info, RunData(tags=[RunTag(key, text) for key, text in tags.items()]))


@pytest.mark.parametrize("tag", ["study", "trial", "state", "recipe_digest", "data_digest", "split_digest"])
def test_trial_without_a_required_tag_is_not_read(tag: str) -> None:
    run = make_run({key: text for key, text in TRIAL.to_mlflow().items() if key != tag})
    assert missing_tags(run) == [tag] and not list(intact([run]))


def test_what_a_run_needs_depends_on_role_and_status() -> None:
    tags = TRIAL.to_mlflow()
    assert missing_tags(make_run(tags)) == []
    assert missing_tags(make_run(tags), with_key=True) == ["run_key"]
    assert missing_tags(make_run(tags | {"role": "final"})) == []
    assert missing_tags(make_run({"role": "reproduction"})) == ["recipe_digest", "data_digest", "split_digest", "state"]
    assert missing_tags(make_run({"role": "study", "objective": "loss"})) == ["study", "objective"]
    assert missing_tags(make_run(tags | {"role": "boss"})) == ["role"]
    del tags["state"]
    assert missing_tags(make_run(tags, status="RUNNING")) == []


def test_control_is_marked_or_trial_0() -> None:
    other, first = make_run(TRIAL.to_mlflow()), make_run(TRIAL.to_mlflow() | {"trial": "0"})
    marked, named = make_run(TRIAL.to_mlflow() | {"control": "true"}), make_run(TRIAL.to_mlflow(), "trial 4 (control)")
    assert control_runs([other, first]) == [first]
    assert control_runs([other, first, marked, named]) == [marked, named]


def test_omitted_runs_are_one_line_for_each_cause() -> None:
    tags = TRIAL.to_mlflow()
    broken = make_run(tags | {"trial": "x"}, "trial 2")
    final = make_run(tags | {"role": "final", "trial_run": "cd" * 16}, "final of trial 1")
    assert describe_omitted([make_run(tags)], [make_run(tags)], "restore it") == [], "it was trained again"
    deleted, changed = describe_omitted([broken], [make_run(tags), final], "restore it in MLflow")
    assert deleted == (
        "omitted, deleted in MLflow: final of trial 1, trial 1; restore them in MLflow, or `finals` trains a final again"
    )
    assert f"trial 2 of a-v1-digits, run {'ab' * 16}: trial; `audit --fix`" in changed
    assert run_label(make_run(tags)) == f"trial 1 of a-v1-digits, run {'ab' * 16}"
