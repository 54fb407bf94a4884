"""What is kept at a study is read back as it was written."""

import optuna

from pipeline.search.study_attributes import Choice, StudyAttributes


def test_attributes_are_read_back_as_they_were_written() -> None:
    study = optuna.create_study()
    assert StudyAttributes.of(study) == StudyAttributes()
    choice = Choice("graphed", 2, 0.5, "measured")
    StudyAttributes.update(study, fingerprint={"data": "d"}, places=["/a"], choice=choice, forecast={"trials": 2})
    expected = StudyAttributes(fingerprint={"data": "d"}, places=["/a"], choice=choice, forecast={"trials": 2})
    assert StudyAttributes.of(study) == expected
    StudyAttributes.update(study, forecast=None)
    assert StudyAttributes.of(study).forecast is None


def test_equal_values_are_not_written_again() -> None:
    study = optuna.create_study()
    StudyAttributes.update(study, dataset="digits")
    study.set_user_attr = None  # type: ignore[assignment]
    StudyAttributes.update(study, dataset="digits")
