"""MLflow's own scoring server for a packed model, on this machine only."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError, UserError
from pipeline.tracking.ui import HOST, launch

MLMODEL = "MLmodel"
LOADER = "mlflow.onnx"
PYTHON = ".venv/bin/python"


@dataclass(frozen=True)
class Served:
    """What a client has to know: the classes in the order of their probabilities, and the images' height and width."""

    classes: tuple[str, ...]
    image_size: int


def check(folder: Path) -> Served:
    """What the package takes and gives; UserError where the folder is none.

    DataError where MLflow would run code from it: only onnxruntime may read the model.
    """
    from mlflow.models import Model

    try:
        model = Model.load(str(folder))
        loader = model.flavors["python_function"]["loader_module"]
        served = Served(tuple((model.metadata or {})["classes"]), model.get_input_schema().inputs[0].shape[1])
    except Exception:  # whatever MLflow raises on a file that isn't there, or is no MLmodel
        raise UserError(f"{folder}: no packed model ({MLMODEL}); make export RUN=... OUTPUT=... makes one") from None
    if loader != LOADER or any(flavor.get("code") for flavor in model.flavors.values()):
        raise DataError(f"{folder / MLMODEL}: would run code of its own, loader {loader}; it is not served")
    return served


def start(folder: Path, port: int, log_file: Path) -> subprocess.Popen[bytes]:
    """The server of a package that was checked, ready for POST /invocations; `tracking.ui.stop_server` ends it.

    UserError where it doesn't get ready.
    """
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(folder), "--env-manager", "local"]
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),  # has uvicorn
    }
    return launch("the scoring server", [*command, "--host", HOST, "--port", str(port)], settings, port, log_file)


def curl_line(port: int, image_size: int) -> str:
    """What sends cat.jpg to the server, for a shell; the pixels are those that `predict` sees."""
    return (
        f"{PYTHON} -c \"import json, numpy, PIL.Image as I; print(json.dumps({{'inputs': [numpy.asarray("
        f"I.open('cat.jpg').convert('RGB').resize(({image_size}, {image_size}), I.BILINEAR)).tolist()]}}))\" | "
        f"curl -s http://{HOST}:{port}/invocations -H 'Content-Type: application/json' -d @-"
    )
