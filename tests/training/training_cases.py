"""Shared by the tests of training."""

from dataclasses import replace

from pipeline.data.datasets import Split
from pipeline.data.images import resized
from pipeline.data.prepare import TrainingData
from pipeline.sections.data import Form


def at_size(data: TrainingData, size: int) -> TrainingData:
    """The same images at another size, for networks that take no small ones."""
    train, validation = (Split(resized(s.images, Form(size)), s.labels) for s in (data.train, data.validation))
    return replace(data, train=train, validation=validation)
