"""Every recipe of the benchmark is a study's, with the benchmark's changes as far as it has such fields."""

from pipeline.benchmarks.gpu_settings import GpuBenchmark


def test_recipes_take_the_changes_that_they_have_fields_for(tiny: GpuBenchmark) -> None:
    attention, fast = (tiny.recipe(name, {"training.batch_size": 32}) for name in ("attention", "fast"))
    assert attention.data.dataset == fast.data.dataset == "digits" and attention.data.image_size == 8
    assert attention.flat()["model.widths"] == (4, 8) and "model.hidden" not in attention.flat()
    assert attention.training.batch_size == 64, "the benchmark's own changes win"
    assert tiny.data(attention) is tiny.data(attention), "read once for all rows"
