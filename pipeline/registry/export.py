"""A classifier as one ONNX file, from pixels to probabilities; checked against torch, and measured.

Input `images`: uint8 (N, S, S, 3), RGB, any N. Output `probabilities`: float32 (N, C), those of the method `plain`.
Normalisation, network, temperature and softmax are inside; class names and what else was fitted are in its metadata.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.augment import normalise
from pipeline.data.datasets import Dataset
from pipeline.data.mapped import MappedImages
from pipeline.data.prepare import TrainingData, prepare
from pipeline.errors import DataError, PromotionRefused
from pipeline.evaluation.logits import images_together
from pipeline.evaluation.scores import score
from pipeline.inference.classifier import Classifier, ModelMetadata
from pipeline.tracking import queries
from pipeline.tracking.run_data import LocatedData, RunData, find_data
from pipeline.tracking.tracker import MlflowTracker

if TYPE_CHECKING:
    import onnxruntime

OPSET = 20
GEOMETRIES = {
    "squash": "the whole image, its aspect not kept",
    "crop": "the largest square in the middle",
    "pad": "the whole image in the middle of a square of its mean colour",
}
TOLERANCE = 1e-4  # in probability
BATCHES = (1, 2, 7, 128, 500)  # that are tried, as far as so many images are predicted together
CHECKED = 2 * max(BATCHES)  # images that are in memory at a time
CALIBRATION_IMAGES = 512
# With Clip and Relu, 8 bits reach over what comes out of them, not over what they cut off.
QUANTISED = ["Conv", "Gemm", "MatMul", "Add", "MaxPool", "Clip", "Relu"]
THREADS = (1, 2)  # that are measured


class _Deployed(nn.Module):
    """uint8 (N, S, S, 3) -> probabilities (N, C)."""

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.network = classifier.network
        self.temperature = classifier.metadata.calibration.temperature
        self.register_buffer("mean", torch.tensor(classifier.metadata.mean))
        self.register_buffer("std", torch.tensor(classifier.metadata.std))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(normalise(images.permute(0, 3, 1, 2), self.mean, self.std))
        return (logits / self.temperature).softmax(1)


def export_onnx(classifier: Classifier, path: Path) -> None:
    """Write the classifier, which is on the CPU, as ONNX. PromotionRefused where the file's probabilities are not torch's."""
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.11's of itself
        program = torch.onnx.export(
            _Deployed(classifier).eval(),
            (torch.zeros(2, classifier.image_size, classifier.image_size, 3, dtype=torch.uint8),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("N", min=1)}},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # where in which file a node comes from
        node.doc_string = ""
    metadata = classifier.metadata
    properties = {
        "classes": json.dumps(metadata.classes),
        "temperature": repr(metadata.calibration.temperature),
        "preprocessing": json.dumps(preprocessing(metadata)),
        "thresholds": json.dumps(metadata.calibration.thresholds),
        "recipe_digest": metadata.recipe_digest,
        "data_digest": metadata.data_digest,
        "split_digest": metadata.split_digest,
        "run_id": metadata.run_id,
    }
    onnx.helper.set_model_props(model, properties)
    onnx.checker.check_model(model)
    onnx.save_model(model, path)
    check(classifier, path, probes(classifier))


def preprocessing(metadata: ModelMetadata) -> dict[str, str | int]:
    """How a file becomes the pixels that the model takes; `data.images.read_image` does it."""
    form = metadata.recipe.data.form
    return {
        "image_size": form.size,
        "geometry": form.geometry,
        "meaning": GEOMETRIES[form.geometry],
        "jpeg": "decoded at the smallest of 1/1, 1/2, 1/4, 1/8 that leaves both sides twice image_size or more, else at 1/1",
        "resampling": "bilinear with antialiasing",
        "orientation": "EXIF's is applied",
        "transparency": "laid over white",
        "depth": "16-bit grey scaled to 8 bits",
        "colour": "RGB; colour profiles are not applied",
        "frames": "the first",
    }


def check(classifier: Classifier, path: Path, images: Tensor | MappedImages) -> float:
    """The largest difference in probability from torch on uint8 images (N, 3, S, S), all in each of `batch_sizes`.

    PromotionRefused, with the number, above TOLERANCE.
    """
    model, sizes = session(path), batch_sizes(classifier.image_size)

    def errors(images: Tensor) -> Iterator[float]:
        expected, pixels = classifier.probabilities(images), as_pixels(images)
        return pool.map(lambda size: float(np.abs(run_session(model, pixels, size) - expected).max()), sizes)

    with ThreadPoolExecutor(min(len(sizes), os.cpu_count() or 1)) as pool:  # onnxruntime computes without the GIL
        worst = float(np.max([error for part in images.split(CHECKED) for error in errors(part)]))
    if not worst <= TOLERANCE:  # NaN too
        rule = f"differs from torch by {worst:.2g} in probability; at most {TOLERANCE:g} is allowed"
        raise PromotionRefused(path.name, rule)
    return worst


def batch_sizes(image_size: int) -> list[int]:
    """How many images of S x S pixels are given to a model at once, to see that their number changes nothing."""
    return sorted({min(size, images_together(image_size)) for size in BATCHES})


def difference_line(worst: float, images: str, image_size: int) -> str:
    """The result of `check` on images of S x S pixels, for a person."""
    *smaller, largest = batch_sizes(image_size)
    sizes = f"{', '.join(map(str, smaller))} and {largest}"
    return (
        f"the ONNX model and torch in float32 differ by {worst:.1g} in probability at most (allowed: {TOLERANCE:g}) on "
        f"{images}, in batches of {sizes}"
    )


def find_data_of(
    metadata: ModelMetadata, tracker: MlflowTracker | None, data_dir: Path, dataset: str | None, download: bool
) -> LocatedData:
    """The data set that a model was trained on, wherever it lies now; see `run_data.find_data`."""
    subject = f"the model of run {metadata.run_id}" if metadata.run_id else "the model"
    places = queries.data_places(tracker, metadata.run_id) if tracker and metadata.run_id else []
    home = tracker.home if tracker else None
    seen = RunData(subject, metadata.recipe.data, metadata.data_digest, places, home)
    return find_data(seen, data_dir, dataset, download)


def split_as_then(metadata: ModelMetadata, images: Dataset) -> TrainingData:
    """A model's data set, split as when it was trained, on the CPU; DataError where that can't be done any more."""
    data = prepare(images, metadata.recipe.data, torch.device("cpu"))
    if data.split_digest != metadata.split_digest:
        raise DataError(str(data.source), "is split into other parts than when the model was trained, by other code")
    return data


def as_pixels(images: Tensor) -> np.ndarray:
    """(N, 3, S, S) as the ONNX model takes it, (N, S, S, 3)."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def calibration_pixels(data: TrainingData) -> np.ndarray:
    """At most CALIBRATION_IMAGES of the training images, (N, S, S, 3)."""
    return as_pixels(data.sample(CALIBRATION_IMAGES))


def probes(classifier: Classifier, count: int = 130) -> Tensor:
    """uint8 images (N, 3, S, S) for a check without a data set: fine and coarse noise, black, white."""
    size, generator = classifier.image_size, torch.Generator().manual_seed(0)
    fine = torch.randint(0, 256, (count // 2, 3, size, size), generator=generator, dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (classifier.metadata.mean, classifier.metadata.std))
    coarse = torch.randn(count - len(fine) - 2, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") * std * 1.5 + mean
    flat = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, size, size)
    return torch.cat([fine, (smooth.clamp(0, 1) * 255).to(torch.uint8), flat])


def session(path: Path, threads: int = 1) -> "onnxruntime.InferenceSession":
    """A model ready to run on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_session(
    session: "onnxruntime.InferenceSession", images: np.ndarray, batch_size: int | None = None
) -> np.ndarray:
    """uint8 (N, S, S, 3) -> float32 (N, C); `batch_size` defaults to `images_together`."""
    batches = _batches(images, batch_size or images_together(images.shape[1]))
    return np.concatenate([session.run(None, {"images": batch})[0] for batch in batches])


def predict(session: "onnxruntime.InferenceSession", images: Tensor | MappedImages) -> np.ndarray:
    """uint8 (N, 3, S, S), in memory or in a file -> float32 (N, C)."""
    parts = images.split(8 * images_together(images.shape[-1]))
    return np.concatenate([run_session(session, as_pixels(part)) for part in parts])


def quantise(path: Path, output: Path, images: np.ndarray) -> None:
    """Write a model with 8-bit layers; their ranges are measured on training images (N, S, S, 3).

    Static quantisation (Jacob et al. 2018, arXiv 1712.05877) by onnxruntime: weights by channel, activations by tensor,
    in QDQ form. What is before and after the network, as softmax, stays in float32.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(_batches(images, min(64, images_together(images.shape[1]))))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({"images": batch} for batch in self.batches), None)

    with tempfile.TemporaryDirectory() as folder:
        prepared, quantised = Path(folder) / "prepared.onnx", Path(folder) / "quantised.onnx"
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantised,
            Images(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTISED,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        shutil.copyfile(quantised, output)


@dataclass(frozen=True)
class Benchmark:
    """One ONNX file on a labelled split, in [0, 1], and what it costs; by the number of threads."""

    accuracy: float
    f1_macro: float
    bytes: int
    latency_ms: dict[int, float]
    images_per_second: dict[int, float]


def benchmark(path: Path, images: Tensor | MappedImages, labels: np.ndarray) -> Benchmark:
    """On uint8 images (N, 3, S, S) and their labels (N,)."""
    scores, size = score(predict(session(path), images), labels), images.shape[-1]
    return Benchmark(
        scores.accuracy,
        scores.f1_macro,
        path.stat().st_size,
        {threads: latency_ms(path, size, threads) for threads in THREADS},
        {threads: images_per_second(path, size, threads) for threads in THREADS},
    )


def latency_ms(path: Path, image_size: int, threads: int = 1, repeats: int = 50) -> float:
    """Median milliseconds of one image, after five that warm up."""
    return 1000 * _seconds(path, np.zeros((1, image_size, image_size, 3), np.uint8), threads, repeats)


def latencies_ms(models: Sequence[tuple[Path, int]]) -> list[float]:
    """Milliseconds of one image of S x S pixels on one thread, of each (path, S): the least of three medians, in turn."""
    rounds = [[latency_ms(path, image_size) for path, image_size in models] for _ in range(3)]
    return [min(times) for times in zip(*rounds, strict=True)]


def images_per_second(path: Path, image_size: int, threads: int) -> float:
    """By the median of several batches."""
    images = np.zeros((64, image_size, image_size, 3), np.uint8)
    return len(images) / _seconds(path, images, threads, repeats=10)


def _seconds(path: Path, images: np.ndarray, threads: int, repeats: int) -> float:
    model, times = session(path, threads), []
    for _ in range(repeats + 5):
        start = time.perf_counter()
        model.run(None, {"images": images})
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:])


def _batches(images: np.ndarray, size: int) -> Iterable[np.ndarray]:
    return (images[start : start + size] for start in range(0, len(images), size))
