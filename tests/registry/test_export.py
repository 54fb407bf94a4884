"""An exported model gives torch's probabilities, for every network and every number of images."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import Trained
from PIL import Image, ImageOps
from torch import nn

from pipeline.data.datasets import Split, load
from pipeline.data.images import resized
from pipeline.data.prepare import TrainingData, prepare
from pipeline.errors import PromotionRefused
from pipeline.evaluation.calibration import Calibration
from pipeline.inference.classifier import Classifier, ModelMetadata
from pipeline.inference.methods import METHODS, MethodScores
from pipeline.inference.predictions import predict_files
from pipeline.models.build import build_network
from pipeline.recipe import Recipe
from pipeline.registry import export
from pipeline.registry.test_split import open_test_split
from pipeline.sections.data import Data, Form
from pipeline.sections.model import Attention, Baseline, Cct, Efficient, Expert, Fast, Improved, Model, Plain, Timm
from pipeline.tracking.models import find_model

CPU = torch.device("cpu")
SMALL = [
    Attention(widths=(4, 8), blocks_per_stage=1, reduction=2),
    Baseline(widths=(4, 8), hidden=8),
    Attention(widths=(4, 8), blocks_per_stage=1, attention="eca"),
    Cct(heads=2, head_width=4),
    Efficient(widths=(8, 8, 8), separable_blocks=1),
    Expert(widths=(8, 12), branches=2, reduction=2),
    Fast(widths=(4, 6), depth=3),
    Improved(widths=(4, 8), hidden=8),
    Plain(widths=(4, 8)),
    Timm(backbone="test_efficientnet"),
]


def classifier(model: Model, size: int = 11, classes: int = 3) -> Classifier:
    """Random, but as after a training: statistics of batch norm that are not those of a new one, sure of its classes."""
    network = build_network(model, classes, size, seed=1)
    draw = torch.Generator().manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = torch.randn(layer.num_features, generator=draw) * 0.3
            layer.running_var = torch.rand(layer.num_features, generator=draw) + 0.5
    base = {
        "optimizer": {"name": "sgd", "lr": 0.1},
        "training": {"epochs": 1, "precision": "bf16"},
    }  # for which `predict` needs float32
    whole = Recipe.model_validate({**base, "data": {"image_size": size}, "model": model.model_dump()})
    f1 = (0.5,) * classes
    worth = MethodScores(
        n=1, accuracy=0.5, f1_macro=0.5, ece=0.1, loss=1, f1=f1, gained=0, lost=0, p=1, f1_macro_error=0
    )
    metadata = ModelMetadata(
        recipe=whole,
        recipe_digest=whole.digest(),
        data_digest="d",
        split_digest="s",
        classes=tuple(f"class {i}" for i in range(classes)),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
        run_id="r",
        calibration=Calibration(temperature=1.0, thresholds=(1.0,) * classes),
        measured=dict.fromkeys(METHODS, worth),
    )
    made = Classifier(network.to(memory_format=torch.channels_last).eval(), metadata, CPU)
    sharpness = float(np.log(made.probabilities(export.probes(made))).std())
    return dataclasses.replace(
        made,
        metadata=metadata.model_copy(update={"calibration": Calibration(sharpness / 2, tuple(range(1, classes + 1)))}),
    )


def noise(count: int, size: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("model", SMALL, ids=lambda model: model.network)
def test_every_network_gives_torch_probabilities(model: Model, tmp_path: Path) -> None:
    size = 32 if model.network == "timm" else 11
    torchs, path = classifier(model, size), tmp_path / "model.onnx"
    export.export_onnx(torchs, path)
    session = export.session(path)
    for count in (1, 2, 7, 128, 131):
        images = noise(count, size, seed=count)
        [got] = session.run(None, {"images": export.as_pixels(images)})
        assert got.dtype == np.float32 and got.shape == (count, 3)
        np.testing.assert_allclose(got, torchs.probabilities(images), atol=export.TOLERANCE)
    assert got.std() > 0.05, "equal because nothing differs"


def as_said(path: Path, said: dict[str, str | int]) -> np.ndarray:
    """An image as another team would read it, who have nothing but the words in the file's metadata."""
    size, image = int(said["image_size"]), Image.open(path)
    if image.format == "JPEG":  # "the smallest of 1/1, 1/2, 1/4, 1/8 that leaves both sides twice image_size or more"
        scale = max([scale for scale in (2, 4, 8) if min(image.size) // scale >= 2 * size], default=1)
        image.draft("RGB", (image.width // scale, image.height // scale))
    image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":
        image = Image.fromarray(np.rint(np.asarray(image) / 65535 * 255).astype(np.uint8))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    geometry, side = said["geometry"], min(image.size)
    if geometry in ("crop", "random_resized_crop"):  # "center crop of the short side"
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if geometry != "pad":
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    shape = [max(1, round(length * size / max(image.size))) for length in image.size]
    image = image.resize((shape[0], shape[1]), Image.Resampling.BILINEAR)
    mean = np.rint(np.asarray(image).reshape(-1, 3).mean(axis=0)).astype(int)
    square = Image.new("RGB", (size, size), tuple(mean))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(square).transpose(2, 0, 1)


def photos(folder: Path) -> dict[str, Image.Image]:
    """Files of all kinds below train/ and test/ of a data set, each class in its own folder, and what they show."""
    draw = np.random.RandomState(0)
    rgb = draw.randint(0, 256, (37, 64, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    images: dict[str, tuple[Image.Image, dict]] = {
        "turned.jpg": (Image.fromarray(rgb), {"exif": turned}),
        "large.jpg": (Image.fromarray(draw.randint(0, 256, (301, 203, 3), dtype=np.uint8)), {}),
        "grey.png": (Image.fromarray(rgb[..., 0]), {}),
        "deep.png": (Image.fromarray(draw.randint(0, 2**16, (29, 17)).astype(np.uint16)), {}),
        "clear.png": (Image.fromarray(draw.randint(0, 256, (9, 50, 4), dtype=np.uint8)), {}),
        "strip.webp": (Image.fromarray(rgb[:, :3]), {"lossless": True}),
    }
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (folder / place).mkdir(parents=True)
        for name, (image, options) in images.items():
            image.save(folder / place / name, **options)
    return {name: image for name, (image, _) in images.items()}


@pytest.mark.parametrize("geometry", ["squash", "crop", "pad", "random_resized_crop"])
def test_a_file_gives_the_same_probabilities_everywhere(
    geometry: str, right: tuple[Classifier, Path], tmp_path: Path
) -> None:
    """As training evaluates it, as the test split, as `predict` and a server's client read it; torch and ONNX."""
    torchs, path = right
    files = {"data.dataset": str(tmp_path), "data.duplicates": "keep"}  # the same files train and test here
    changed = torchs.metadata.recipe.changed({"data.geometry": geometry, **files})
    torchs = dataclasses.replace(torchs, metadata=torchs.metadata.model_copy(update={"recipe": changed}))
    names = sorted(photos(tmp_path))
    paths = [tmp_path / "train" / "a" / name for name in names]
    evaluated = load(changed.data, tmp_path).train.images[: len(names)]
    tested = open_test_split(changed.data, changed.data.form, tmp_path, ["a", "b"]).images[: len(names)]
    said = export.preprocessing(torchs.metadata)
    sent = torch.stack([torch.from_numpy(as_said(file, said).copy()) for file in paths])
    predicted = predict_files(torchs, paths, "plain").probabilities
    session = export.session(path)
    assert len(np.unique(predicted.round(5), axis=0)) == len(names), "equal because nothing differs"
    for images in (evaluated, tested, sent):
        np.testing.assert_allclose(export.run_session(session, export.as_pixels(images)), predicted, atol=1e-4)


def test_calibration_and_digests_are_in_the_onnx_metadata(right: tuple[Classifier, Path]) -> None:
    torchs, path = right
    session = export.session(path)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["class 0", "class 1", "class 2"]
    assert float(metadata["temperature"]) == torchs.metadata.calibration.temperature
    preprocessing = json.loads(metadata["preprocessing"])
    assert preprocessing["geometry"] == "squash" and preprocessing["jpeg"].startswith("decoded at the smallest of ")
    assert json.loads(metadata["thresholds"]) == [1.0, 2.0, 3.0]
    digests = {name: metadata[name] for name in ("recipe_digest", "data_digest", "split_digest", "run_id")}
    assert digests == {name: getattr(torchs.metadata, name) for name in digests}
    assert str(Path(__file__).parents[2]) not in path.read_bytes().decode(errors="replace"), "no paths of this machine"


def test_wrong_export_is_refused_with_the_difference(right: tuple[Classifier, Path]) -> None:
    torchs, path = right
    metadata = torchs.metadata.model_copy(update={"mean": (0.4, 0.5, 0.603)})
    with pytest.raises(
        PromotionRefused, match=r"model.onnx: differs from torch by 0\.0\d+ in probability; at most 0.0001"
    ):
        export.check(dataclasses.replace(torchs, metadata=metadata), path, noise(10, 11))
    assert export.check(torchs, path, noise(10, 11)) < export.TOLERANCE


def test_sizes_of_batches_are_those_that_fit_in_memory() -> None:
    assert export.batch_sizes(64) == list(export.BATCHES) and export.batch_sizes(224) == [1, 2, 7, 40]
    assert export.difference_line(0, "them", 224).endswith("on them, in batches of 1, 2, 7 and 40")


@pytest.mark.parametrize("size", export.BATCHES)
def test_one_wrong_image_in_one_batch_size_is_refused(
    size: int, right: tuple[Classifier, Path], tmp_path: Path
) -> None:
    torchs, path = right
    images = noise(500, 11) // 2
    images[380] += 128  # in a full batch of each size
    assert export.check(torchs, path, images) < export.TOLERANCE
    onnx.save(wrong_in(size, path), tmp_path / "wrong.onnx")
    with pytest.raises(PromotionRefused, match=r"wrong.onnx: differs from torch by 0\.01 in probability"):
        export.check(torchs, tmp_path / "wrong.onnx", images)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Path]:
    """A classifier and its export."""
    torchs, path = classifier(SMALL[1]), tmp_path_factory.mktemp("right") / "model.onnx"
    export.export_onnx(torchs, path)
    return torchs, path


def wrong_in(size: int, path: Path) -> onnx.ModelProto:
    """A model that adds 0.01 where a batch has so many images and one of them is bright."""
    node, model = onnx.helper.make_node, onnx.load(path)
    for producer in model.graph.node:
        producer.output[:] = ["right" if name == "probabilities" else name for name in producer.output]
    constants = {"size": np.array([size]), "bright": np.float32(200), "error": np.float32(0.01)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    model.graph.node.extend(
        [
            node("Shape", ["images"], ["count"], end=1),
            node("Equal", ["count", "size"], ["so_many"]),
            node("Cast", ["images"], ["pixels"], to=onnx.TensorProto.FLOAT),
            node("ReduceMax", ["pixels"], ["brightest"], keepdims=0),
            node("Greater", ["brightest", "bright"], ["is_bright"]),
            node("And", ["so_many", "is_bright"], ["both"]),
            node("Cast", ["both"], ["factor"], to=onnx.TensorProto.FLOAT),
            node("Mul", ["factor", "error"], ["added"]),
            node("Add", ["right", "added"], ["probabilities"]),
        ]
    )
    return model


def test_network_that_gives_nan_is_refused(tmp_path: Path) -> None:
    torchs = classifier(SMALL[1])
    with torch.no_grad():
        next(torchs.network.parameters()).fill_(float("nan"))
    with pytest.raises(PromotionRefused, match="differs from torch by nan"):
        export.export_onnx(torchs, tmp_path / "model.onnx")


def test_validation_split_of_a_trained_model(trained: Trained, packed: object, digits: TrainingData) -> None:
    with find_model(trained.home, None, trained.finished) as model:
        torchs = Classifier.load(model.folder, CPU)
    assert export.check(torchs, packed.folder / "model.onnx", digits.validation.images) <= export.TOLERANCE  # type: ignore[attr-defined]


def test_validation_split_of_cifar10(cifar10_dir: Path, tmp_path: Path) -> None:
    torchs, path = classifier(Plain(widths=(8, 16)), size=32, classes=10), tmp_path / "model.onnx"
    data = prepare(load(Data(dataset="cifar10", image_size=32), cifar10_dir), torchs.metadata.recipe.data, CPU)
    export.export_onnx(torchs, path)
    assert export.check(torchs, path, data.validation.images) <= export.TOLERANCE


def test_calibration_takes_images_as_the_model_does(digits: TrainingData) -> None:
    held = Split(resized(digits.train.images, Form(13)), digits.train.labels)  # for random crops
    seen = export.calibration_pixels(dataclasses.replace(digits, train=held))
    assert seen.shape == (-(-len(held.labels) // 3), *digits.validation.images.shape[2:], 3), "every third image"


def test_8_bit_model_is_smaller_and_close(tmp_path: Path) -> None:
    torchs, path = classifier(Plain(widths=(32, 64))), tmp_path / "model.onnx"
    export.export_onnx(torchs, path)
    images = noise(200, 11)
    pixels = export.as_pixels(images)
    expected = export.run_session(export.session(path), pixels)
    error = {}
    for name, seen in {"like": export.as_pixels(noise(64, 11, seed=9)), "black": np.zeros_like(pixels[:64])}.items():
        export.quantise(path, tmp_path / f"{name}.onnx", seen)
        error[name] = np.abs(export.run_session(export.session(tmp_path / f"{name}.onnx"), pixels) - expected).mean()
    assert 0 < error["like"] < 0.02
    assert error["black"] > 3 * error["like"]
    labels = expected.argmax(1)
    original, small = (export.benchmark(tmp_path / name, images, labels) for name in ("model.onnx", "like.onnx"))
    assert original.accuracy == 1.0 > small.accuracy > 0.9
    assert small.bytes < 0.5 * original.bytes
    relus = [sum(n.op_type == "Relu" for n in onnx.load(tmp_path / f"{m}.onnx").graph.node) for m in ("model", "like")]
    assert relus == [2, 0], "8 bits from 0 on do what a ReLU does"
    assert set(small.latency_ms) == set(small.images_per_second) == {1, 2}
