from pathlib import Path

import pytest
from study_harness import StudyHarness

from pipeline.data.prepare import TrainingData
from pipeline.recipe import Recipe


@pytest.fixture
def harness(tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> StudyHarness:
    return StudyHarness(tmp_path / "mlruns", small_recipe, digits)
