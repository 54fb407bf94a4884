"""MLflow's scoring server behind access control, and a way for image files; `serve.start` has uvicorn call `app`."""

import os
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from mlflow.pyfunc import PyFuncModel, load_model
from mlflow.pyfunc.scoring_server import init
from pydantic import BaseModel, Field

from pipeline.errors import UserError
from pipeline.evaluation.logits import images_together
from pipeline.registry.serve import decoded, form_of
from pipeline.tracking.access import AccessControl

MAX_IMAGES = 1000  # of one request
_BODY = f'the body: should be {{"images": ["<base64>"]}}, 1 to {MAX_IMAGES:,} image files, with Content-Type: application/json'


class EncodedImages(BaseModel):
    """The body of a request to /images."""

    images: list[str] = Field(min_length=1, max_length=MAX_IMAGES, description="image files in base64")


def app() -> AccessControl:
    """What `mlflow models serve` runs, for the package whose folder the environment names; with /images."""
    model = load_model(os.environ["PIPELINE_MODEL"])
    scoring: FastAPI = init(model)
    _add_images(scoring, model)
    return AccessControl(scoring)


def _add_images(scoring: FastAPI, model: PyFuncModel) -> None:
    form = form_of(model.metadata)

    @scoring.exception_handler(RequestValidationError)
    def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        # FastAPI's own answer repeats what was sent, and fails where that is no text.
        return JSONResponse({"detail": _BODY}, 400)

    @scoring.post("/images")
    def classify(encoded: EncodedImages) -> dict[str, Any]:
        try:
            pixels = decoded(encoded.images, form)
        except UserError as error:
            raise HTTPException(400, error.lines[0]) from None
        size = images_together(form.size)
        parts: list[Any] = [model.predict(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        return {"predictions": {name: np.concatenate([part[name] for part in parts]).tolist() for name in parts[0]}}
