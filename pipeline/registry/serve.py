"""MLflow's own scoring server for a packed model, on this machine only."""

import base64
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.images import BadImage, read_image
from pipeline.errors import DataError, UserError
from pipeline.registry.export import GEOMETRIES, session
from pipeline.registry.package import MODEL
from pipeline.sections.data import Form
from pipeline.tracking.server import HOST, launch

if TYPE_CHECKING:
    from mlflow.models import Model

MLMODEL = "MLmodel"
_FLAVORS: Mapping[str, Mapping[str, Any]] = {  # as export writes them, but for the versions
    "onnx": {"code": None, "data": MODEL, "onnx_session_options": None, "providers": ["CPUExecutionProvider"]},
    "python_function": {"data": MODEL, "loader_module": "mlflow.onnx"},
}
_DATA_URL = re.compile(r"^data:image/[\w.+-]+;base64,")
_VERSIONS = ("onnx_version", "python_version", "env")  # `env` is not made: the server runs in this environment


@dataclass(frozen=True)
class ServedModel:
    """What a client needs to know: the classes in the order of their probabilities, and the form of images."""

    classes: tuple[str, ...]
    form: Form


def check(folder: Path) -> ServedModel:
    """What the package takes and gives; UserError where the folder is none.

    DataError where MLflow would run code from it or read other files, or the model is not what the package says: only
    onnxruntime may read it, and only model.onnx.
    """
    from mlflow.models import Model

    try:
        model = Model.load(str(folder))
        flavors: dict[str, dict[str, Any]] = {name: dict(settings) for name, settings in model.flavors.items()}
        served = ServedModel(tuple((model.metadata or {})["classes"]), form_of(model))
    except Exception:  # whatever MLflow raises on a file that isn't there, or is no MLmodel
        raise UserError(str(folder), f"no packed model ({MLMODEL})", "`export` makes one") from None
    if other := _unexpected_setting(flavors):
        rule = f"{other}, which export never writes: it might run code; it is not served"
        raise DataError(str(folder / MLMODEL), rule)
    _check_onnx(folder / MODEL, served)
    return served


def form_of(model: "Model") -> Form:
    """In which form a package takes images; KeyError for a geometry that there is not."""
    geometry = (model.metadata or {}).get("geometry", "squash")  # older packages name none, and were squashed
    GEOMETRIES[geometry]
    return Form(model.get_input_schema().inputs[0].shape[1], geometry)


def _unexpected_setting(flavors: Mapping[str, Mapping[str, Any]]) -> str:
    """The first setting that is not one of a package, or nothing."""
    if set(flavors) != set(_FLAVORS):
        return f"flavors {', '.join(flavors)}"
    for flavor, ours in _FLAVORS.items():
        settings = {name: value for name, value in flavors[flavor].items() if name not in _VERSIONS}
        for name in sorted({*settings, *ours}):
            if name not in settings or name not in ours or settings[name] != ours[name]:
                return f"{flavor}: {name} {settings.get(name)}"
    return ""


def _check_onnx(path: Path, served: ServedModel) -> None:
    """DataError unless onnxruntime takes the file, and images in and probabilities out are as the package says."""
    if path.is_symlink():
        raise DataError(str(path), "a link to a file elsewhere; it is not served")
    try:
        model = session(path)
    except Exception as error:  # onnxruntime has no common class
        reason = str(error).splitlines()[0][:200]
        raise DataError(str(path), f"onnxruntime can't use it, so it is not served ({reason})") from None
    size = served.form.size
    tensors = [(tensor.name, tensor.type, tensor.shape[1:]) for tensor in (*model.get_inputs(), *model.get_outputs())]
    images, probabilities = ("images", "tensor(uint8)", [size, size, 3]), ("probabilities", "tensor(float)")
    if tensors != [images, (*probabilities, [len(served.classes)])]:
        shapes = f"{size} x {size} pixels, {len(served.classes)} classes"
        raise DataError(str(path), f"takes or gives other than {MLMODEL} says ({shapes}); it is not served")


def start(folder: Path, port: int, log_file: Path) -> subprocess.Popen[bytes]:
    """The server of a package that was checked, ready for POST /invocations; `tracking.server.stop_server` ends it.

    UserError where it doesn't get ready.
    """
    settings = {"PIPELINE_MODEL": str(folder.resolve())}
    return launch("the scoring server", "pipeline.registry.serve_app", settings, port, log_file)


def decoded(images: Sequence[str], form: Form) -> np.ndarray:
    """Image files in base64 -> uint8 (N, S, S, 3), read as `predict` reads a file; UserError names what is none.

    Base64 may have line breaks, and begin as a data URL does.
    """
    pixels = []
    for number, text in enumerate(images):
        text = _DATA_URL.sub("", "".join(text.split()))
        with tempfile.NamedTemporaryFile() as file:
            try:
                file.write(base64.b64decode(text, validate=True))
                file.flush()
                pixels.append(read_image(Path(file.name), form).transpose(1, 2, 0))
            except ValueError:  # of base64, or of letters that aren't ASCII
                raise UserError(f"images.{number}", "is not base64") from None
            except BadImage as error:
                raise UserError(f"images.{number}", error.reason) from None
    return np.stack(pixels)


def curl_line(port: int) -> str:
    """What sends cat.jpg to the server, for a shell."""
    return (
        """(printf '{"images": ["'; base64 < cat.jpg | tr -d '\\n'; printf '"]}') | """
        f"curl -s http://{HOST}:{port}/images -H 'Content-Type: application/json' -d @-"
    )
