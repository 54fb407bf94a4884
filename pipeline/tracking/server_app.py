"""MLflow's server with access control; `server.start_server` has uvicorn call `app`."""

import os
from pathlib import Path

from pipeline.errors import redact_secrets
from pipeline.tracking.access import AccessControl, restrict_artifacts

_API = ("/ajax-api", "/api")
# The assistant and jobs run programs, the gateway and webhooks call other servers.
_CLOSED = ("mlflow/assistant", "mlflow/gateway", "mlflow/webhooks", "mlflow/jobs", "jobs")


def app() -> AccessControl:
    """The app that `mlflow server --artifacts-destination` runs, with access control, which that command can't add.

    The database's address and the artifacts' folder come from the environment, which other users of this machine can't read.
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
    restrict_artifacts(artifacts)
    closed = [f"{api}/{version}/{path}" for api in _API for version in ("2.0", "3.0") for path in _CLOSED]
    return AccessControl(mlflow_app, ("/gateway", *closed))
