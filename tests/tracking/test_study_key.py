import pytest

from pipeline.tracking.study_key import StudyKey


@pytest.mark.parametrize("text", ["attention-v1-digits", "at-te_n-v12-pets-v2-3fa9c1", "a-v1-v1"])
def test_key_is_parsed_and_formatted_again(text: str) -> None:
    key = StudyKey.parse(text)
    assert key and str(key) == text and "-v" not in key.study


@pytest.mark.parametrize("text", ["attention", "attention-v1", "attention-v01-digits", "-v1-digits", "attention-v1-"])
def test_other_names_are_no_keys(text: str) -> None:
    assert StudyKey.parse(text) is None


def test_folder_may_be_named_without_its_digits() -> None:
    key = StudyKey("attention", 1, "pets-3fa9c1")
    assert str(key.bare) == "attention-v1-pets"
    assert [key.is_meant_by(name) for name in ("attention", "attention-v1-pets", "attention-v1", "atten")] == [
        *(True, True, False, False),
    ]
