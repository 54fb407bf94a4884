"""MLflow's scoring server behind access control; `serve.start` has uvicorn call `app`."""

import os

from mlflow.pyfunc import load_model
from mlflow.pyfunc.scoring_server import init

from pipeline.tracking.access import AccessControl


def app() -> AccessControl:
    """What `mlflow models serve` runs, for the package whose folder the environment names."""
    return AccessControl(init(load_model(os.environ["PIPELINE_MODEL"])))
