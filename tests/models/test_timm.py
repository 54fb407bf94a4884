"""`timm`: names, weights and their faults, and what a network of it says of itself."""

import hashlib
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from pipeline.cli.exit_codes import exit_code
from pipeline.errors import UserError
from pipeline.models import timm
from pipeline.models.build import (
    build_network,
    check_network,
    check_sizes,
    initial_network,
    layer_ids,
    pixel_statistics_of,
    weights_digest,
    weights_origin,
)
from pipeline.recipe import Recipe, parse_recipe
from pipeline.sections.model import Timm

CHOOSE = "choose the backbone that the weights are of (`--set model.backbone=...`)"
LITE0 = Timm(weights="efficientnet-lite0")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may reach for the network."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("reached for the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return build_network(Timm(backbone="resnet18"), 3, 32, seed=0)


def recipe_of(model: Timm) -> Recipe:
    return parse_recipe(
        {"model": model.model_dump(), "optimizer": {"name": "sgd", "lr": 0.1}, "training": {"epochs": 1}}
    )


def problem(model: Timm, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    """What loading a file of these tensors complains of."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "w.safetensors")
    with pytest.raises(UserError) as raised:
        initial_network(
            model.model_copy(update={"weights": Timm(weights=str(tmp_path / "w.safetensors")).weights}), 3, 32, 0
        )
    return raised.value.lines


def test_embedded_weights_know_a_palace_and_a_daisy() -> None:
    """The order of the package's tensors is that of timm's, its head's too, which a training leaves out."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    network = initial_network(LITE0, 1000, 224, seed=0).eval()
    network.load_state_dict(timm._of_package(network), strict=False)
    photos = [pil_to_tensor(Image.fromarray(image)) for image in load_sample_images().images]
    images = torch.stack([center_crop(resize(photo, 224), 224) for photo in photos]) / 255
    with torch.inference_mode():
        assert network((images - 0.5) / 0.5).argmax(1).tolist() == [698, 985]


def test_training_starts_from_the_weights_with_a_new_head() -> None:
    network, other = initial_network(LITE0, 3, 32, seed=0), initial_network(LITE0, 3, 32, seed=1).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in network.state_dict().items())
    plain = build_network(LITE0, 3, 32, seed=0)
    assert not torch.equal(network.conv_stem.weight, plain.conv_stem.weight)
    images = torch.randn(2, 3, 32, 32)
    assert not network.eval()(images).any() and plain.eval()(images).any(), "the head has no opinion yet"
    assert pixel_statistics_of(LITE0) == ((0.5,) * 3, (0.5,) * 3) and pixel_statistics_of(Timm()) is None
    assert "Apache-2.0" in str(weights_origin(recipe_of(LITE0))) and weights_origin(recipe_of(Timm())) is None
    assert str(weights_digest(recipe_of(LITE0))).startswith("57934424") and weights_digest(recipe_of(Timm())) is None


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_file_fills_all_but_the_head(tmp_path: Path, resnet: nn.Module, suffix: str) -> None:
    path = tmp_path / f"own{suffix}"
    save_file(resnet.state_dict(), path) if suffix == ".safetensors" else torch.save(resnet.state_dict(), path)
    model = Timm(backbone="resnet18", weights=str(path))
    network = initial_network(model, 5, 32, seed=1)
    assert torch.equal(network.state_dict()["layer4.1.conv2.weight"], resnet.state_dict()["layer4.1.conv2.weight"])
    assert str(weights_origin(recipe_of(model))).startswith(path.name)
    assert weights_digest(recipe_of(model)) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("backbone", ["fasternet_s", "tiny_vit_21m_224", "rexnet_100", "ghostnet_050"])
def test_fields_at_0_leave_nothing_out_whatever_timm_has_by_default(backbone: str) -> None:
    with torch.device("meta"):
        network = build_network(Timm(backbone=backbone), 3, 224, seed=0)
    rates = [getattr(module, name, 0) for module in network.modules() for name in ("drop_prob", "drop_rate")]
    assert not any(rates + [module.p for module in network.modules() if isinstance(module, nn.Dropout)])


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path, resnet: nn.Module) -> None:
    tensors = dict(resnet.state_dict())
    tensors["layer9.weight"] = tensors.pop("conv1.weight")
    tensors["bn1.bias"] = torch.zeros(2)
    lines = problem(Timm(backbone="resnet18"), tmp_path, tensors)
    assert lines[1:] == [
        "  missing: conv1.weight",
        "  unexpected: layer9.weight",
        "  of another shape: bn1.bias (2,), not (64,)",
    ]


@pytest.mark.parametrize("backbone", ["convnext_atto", "poolformer_s12"])
def test_tensors_of_another_network_are_named_where_timm_cannot_rename_them(
    tmp_path: Path, resnet: nn.Module, backbone: str
) -> None:
    lines = problem(Timm(backbone=backbone), tmp_path, resnet.state_dict())
    assert lines[0].endswith("w.safetensors: does not have the tensors of the network; " + CHOOSE)
    assert lines[2].startswith("  unexpected: bn1.bias, bn1.running_mean")


def test_file_that_changed_or_runs_code_is_refused(tmp_path: Path, resnet: nn.Module) -> None:
    path = tmp_path / "own.pth"
    torch.save({"code": print}, path)
    model = Timm(backbone="resnet18", weights=str(path))
    with pytest.raises(UserError, match="can't be read as weights"):
        initial_network(model, 3, 32, 0)
    torch.save(resnet.state_dict(), path)
    with pytest.raises(UserError, match="is not the file of the recipe"):
        initial_network(model, 3, 32, 0)


def test_download_that_fails_is_one_message_of_missing_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"timm/resnet18.a1_in1k failed.*--set model.weights=FILE") as raised:
        initial_network(Timm(backbone="resnet18", weights="default"), 3, 32, 0)
    assert exit_code(raised.value) == 3 and len(raised.value.lines) == 1


def test_downloaded_weights_are_used_offline_and_have_a_digest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resnet: nn.Module
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--timm--resnet18.a1_in1k"
    snapshot = place / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    other_head = build_network(Timm(backbone="resnet18"), 1000, 32, seed=0).fc.state_dict()
    save_file(resnet.state_dict() | {f"fc.{name}": t for name, t in other_head.items()}, snapshot / "model.safetensors")
    model = Timm(backbone="resnet18", weights="default")
    weight = initial_network(model, 5, 32, seed=1).state_dict()["layer4.1.conv2.weight"]
    assert torch.equal(weight, resnet.state_dict()["layer4.1.conv2.weight"])
    assert weights_digest(recipe_of(model)) == hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (Timm(backbone="resnet19"), "no such network .did you mean resnet18"),
        (Timm(backbone="resnet18.a9"), "no weights of that tag; it has a1_in1k"),
        (Timm(backbone="resnet18", weights="efficientnet-lite0"), "those of tf_efficientnet_lite0"),
        (Timm(backbone="resnet18", drop_path=0.1), None),
        (Timm(backbone="vgg11", drop_path=0.1), "drop_path_rate"),
        (Timm(backbone="halonet26t"), "AssertionError; its own size is .--set data.image_size=256"),
        (Timm(backbone="vit_tiny_patch16_224"), None),
        (Timm(backbone="swin_tiny_patch4_window7_224"), None),
        (LITE0, None),
    ],
    ids=lambda value: getattr(value, "backbone", ""),
)
def test_network_is_checked_before_it_is_built(model: Timm, complaint: str | None) -> None:
    if complaint is None:
        check_network(model, 96)
    else:
        with pytest.raises(UserError, match=complaint):
            check_network(model, 96)


@pytest.mark.parametrize("backbone", ["test_convnext", "levit_128s", "vgg11", "resnet18"])
def test_last_layer_is_the_classifier_alone(backbone: str) -> None:
    """convnext has a norm before it, levit two, vgg layers: all pretrained."""
    network = build_network(Timm(backbone=backbone), 3, 32, seed=0)
    layers = layer_ids(network)
    assert layers.keys() == dict(network.named_parameters()).keys()
    head = max(layers.values())
    assert [name for name, layer in layers.items() if layer == head] == timm.head_names(network)
    assert set(layers.values()) == set(range(head + 1))


def test_images_that_grow_through_a_size_that_it_cannot_take_are_refused() -> None:
    """It adds maps of half the size to others, enlarged; multiples of 32 fit, 128 and 224 among them."""
    check_sizes(Timm(backbone="dla34"), 256, [128, 160, 192, 224])
    with pytest.raises(UserError, match=r"start_size = 128: the network timm, .* 224, takes none of 156 pixels"):
        check_sizes(Timm(backbone="dla34"), 224, [128, 156, 184, 212])
