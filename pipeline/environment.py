"""What libraries read while they are imported; to be imported before them."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# A read is given up after 13 s where the server refuses, after 2 minutes where it is silent; MLflow's own patience is 4.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("PGCONNECT_TIMEOUT", "10")  # seconds; PostgreSQL's own is 2 minutes
# torch's threads wait for each other by spinning, for ever as it seems once another program wants the cores too: beside
# two busy processes, two threads trained at under 32 images/s, and at 340 with this (one run; studies/README.md).
# GNU's OpenMP reads it.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")
