"""The weights that a run starts from, where they are a file of this project's own: kept by digest, and with the run."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from torch import nn

from pipeline.disk import replacing, sha256_of
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.sections.weights import with_digest
from pipeline.tracking import queries
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.checkpoints import save_weights

FOLDER = "weights"  # in the folder `mlruns`
ARTIFACT = "initial/weights.safetensors"  # of the run; not beside its checkpoint, whose record names every file there


def keep(network: nn.Module, home: Path) -> str:
    """Write the network's weights into `home`, once; the value of `transfer.weights` for a recipe that starts from them."""
    folder = home / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".weights.{os.getpid()}.new"
    save_weights(new, network, {})
    sha256 = sha256_of(new)
    path = folder / _file_name(sha256)
    os.replace(new, path)
    return with_digest(str(path), sha256)


def attach(tracker: MlflowTracker, run_id: str, recipe: Recipe) -> None:
    """Make the file that a run started from an artifact of it, so that the run can be reproduced where the file isn't."""
    if file := recipe.transfer.weights_file:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / ARTIFACT
            copy.parent.mkdir()
            shutil.copyfile(file[0], copy)
            tracker.client.log_artifacts(run_id, folder)


def restore(tracker: MlflowTracker, run_id: str, recipe: Recipe) -> None:
    """Write the file that a run started from where its recipe has it, if it is gone and the run holds it.

    No other file: the recipe may be a stranger's. UserError where it can't be written there.
    """
    if not (file := recipe.transfer.weights_file) or (path := Path(file[0])).exists():
        return
    is_ours = path.parts[-2:] == (FOLDER, _file_name(file[1]))
    content = queries.read_file(tracker, run_id, ARTIFACT) if is_ours else None
    if not content or hashlib.sha256(content).hexdigest() != file[1]:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            new.write_bytes(content)
    except OSError as error:
        rule = f"the weights that the run starts from can't be put there: {error.strerror}"
        raise UserError(str(path), rule, f"they are {ARTIFACT} of run {run_id}") from None


def _file_name(sha256: str) -> str:
    return f"{sha256}.safetensors"
