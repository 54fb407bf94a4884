"""MLflow's server behind the door; `ui.start_server` has uvicorn call `app`."""

import os
from pathlib import Path

from pipeline.errors import redact_secrets
from pipeline.tracking.access import Door, keep_inside

_API = ("/ajax-api", "/api")
# The assistant runs programs, the gateway and webhooks call other servers, jobs run what is asked.
_CLOSED = ("mlflow/assistant", "mlflow/gateway", "mlflow/webhooks", "mlflow/jobs", "jobs")


def app() -> Door:
    """What `mlflow server --artifacts-destination` runs, whose app can't be chosen.

    The database's address and the artifacts' folder come by the environment, which others of this machine can't read.
    """
    uri, artifacts = os.environ["MLFLOW_BACKEND_STORE_URI"], Path(os.environ["PIPELINE_ARTIFACTS"])
    os.environ |= {  # read while MLflow is imported
        "_MLFLOW_SERVER_FILE_STORE": uri,
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": artifacts.as_uri(),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_IN_JOB_EXECUTOR": "false",
        "_MLFLOW_SGI_NAME": "uvicorn",
    }
    from mlflow.server.fastapi_app import app as mlflow_app
    from mlflow.server.handlers import initialize_backend_stores

    try:
        initialize_backend_stores(uri)
    except Exception as error:  # a traceback would show the address
        raise SystemExit(f"the database can't be opened: {redact_secrets(str(error))}") from None
    keep_inside(artifacts)
    closed = [f"{api}/{version}/{path}" for api in _API for version in ("2.0", "3.0") for path in _CLOSED]
    return Door(mlflow_app, ("/gateway", *closed))
