"""A training's state on disk, from which another process resumes to the same weights: on a CPU, bit for bit.

A state is a folder `epoch-<n>` written by `checkpoints.save_folder`, with one safetensors file: the tensors of the network,
its average and the optimizer, in their own types. What follows from seed, epoch and step is not saved: data order,
augmentation, dropout, learning rates, and which parameters are frozen.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.training.averaging import WeightAverage
from pipeline.training.checkpoints import RECORD, discard_folder, read_checkpoint, save_folder

CHECKPOINTS = "checkpoints"  # in the folder `mlruns`: the folder of all states, one for each run key
TENSORS = "state.safetensors"
EVERY_S = 30.0


@dataclass(frozen=True)
class Parts:
    """What training changes, and so what a state holds."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None

    def parameters(self) -> list[Tensor]:
        """The optimizer's parameters, in its order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by name: `network.*`, `average.*`, `optimizer.<parameter's number>.*`."""
        networks = {"network": self.network} | ({"average": self.average.network} if self.average else {})
        return {
            f"{part}.{name}": t for part, network in networks.items() for name, t in network.state_dict().items()
        } | {
            f"optimizer.{number}.{name}": value
            for number, parameter in enumerate(self.parameters())
            for name, value in self.optimizer.state.get(parameter, {}).items()
        }


class _TrainingRecord(BaseModel):
    """What a state says of its training, next to the tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    recipe: str  # these three are digests
    data: str
    split: str
    history: list[dict[str, float]]  # the metrics of each epoch, from the first
    seconds: float  # that the epochs took
    updates: int  # of the average
    torch: str
    threads: int

    @property
    def epoch(self) -> int:
        return len(self.history)


class Resume:
    """Saves a training's state in `folder`, at most every `every_s` seconds, and restores the newest undamaged one.

    The last two states are kept, so that there is another one if the newest is damaged.
    """

    def __init__(self, folder: Path, every_s: float = EVERY_S):
        self.folder, self.every_s = folder, every_s
        self.history: list[dict[str, float]] = []  # metrics of the epochs that were done, from the first
        self.seconds = 0.0  # that they took
        self.notes: list[str] = []  # for the user, a line each: where it resumes, what was damaged or not saved
        self._identity: dict[str, str] = {}
        self._former_digest = ""  # of the recipe with its execution, as states from before have it
        self._last_save = 0.0
        self._failed = False

    def restore(self, recipe: Recipe, data: TrainingData, parts: Parts) -> None:
        """Bring `parts`, newly built, to the newest undamaged state; without one they stay as they are.

        UserError where it is the state of another recipe, data set or split. Damaged states are noted and removed.
        """
        # A state is read, compared and checked against the network in full before any of `parts` changes. So a state
        # that can't be used leaves them as built, and the one before it can still be tried.
        # However the steps are executed: a training may go on on another device.
        digest = recipe.changed({"training.execution": "eager"}).digest()
        self._identity = {"recipe": digest, "data": data.digest, "split": data.split_digest}
        self._former_digest = recipe.digest()
        self._last_save = time.monotonic()
        states = self._states()
        for state in states:
            try:
                record, tensors = _read(state)
                self._check_identity(state, record)
                _check_tensors(tensors, parts)
            except _UnusableState as reason:
                self.notes.append(f"the state of {state.name} is not used: {reason}")
                discard_folder(state)
                continue
            _fill(parts, tensors, record)
            self.history, self.seconds = record.history, record.seconds
            self.notes.append(
                f"resumes after epoch {record.epoch} of {recipe.training.epochs}{_difference_of_machine(record)}"
            )
            return
        if states:
            self.notes.append("no usable state remains: starts from epoch 1 again")

    def save_if_due(self, parts: Parts, history: list[dict[str, float]], seconds: float) -> None:
        """Save the state after the last epoch of `history`, `seconds` into the training, if it is time.

        Where the disk refuses, that is noted once, the training continues and the earlier states stay.
        """
        if time.monotonic() - self._last_save < self.every_s:
            return
        record = _TrainingRecord(
            **self._identity,
            history=history,
            seconds=seconds,
            updates=parts.average.state_dict()["updates"] if parts.average else 0,
            torch=torch.__version__,
            threads=torch.get_num_threads(),
        )
        new = self.folder / f"epoch-{record.epoch:06}"
        try:
            if not (new / RECORD).exists():  # whose removal was killed halfway: this training ended, and is repeated
                discard_folder(new)
            save_folder(new, {TENSORS: save(_on_host(parts.tensors()))}, record.model_dump())
            newest = self._states()[:2]
            for other in self.folder.iterdir():  # also what killed writers left
                if other not in newest:
                    discard_folder(other)
        except OSError as error:
            if not self._failed:
                self.notes.append(f"the state after epoch {record.epoch} could not be saved: {error}")
            self._failed = True
        self._last_save = time.monotonic()

    def _states(self) -> list[Path]:
        """The folders of complete states, the newest first."""
        return sorted((record.parent for record in self.folder.glob(f"epoch-*/{RECORD}")), reverse=True)

    def _check_identity(self, state: Path, record: _TrainingRecord) -> None:
        differences = [
            f"{name} {getattr(record, name)[:16]} there, {digest[:16]} here"
            for name, digest in self._identity.items()
            if getattr(record, name) not in (digest, self._former_digest)
        ]
        if differences:
            raise UserError(
                str(state),
                f"the state of another training ({', '.join(differences)})",
                "move the folder away to start from epoch 1",
            )


class _UnusableState(Exception):
    """Why a state can't be used."""


def _read(state: Path) -> tuple[_TrainingRecord, dict[str, Tensor]]:
    """What `save_if_due` wrote."""
    try:
        return _TrainingRecord.model_validate(read_checkpoint(state)), load_file(state / TENSORS)
    except ValidationError:
        raise _UnusableState("written by another version of the pipeline") from None
    except (UserError, OSError, SafetensorError) as error:
        raise _UnusableState(str(error).partition("\n")[0]) from None


def _check_tensors(tensors: dict[str, Tensor], parts: Parts) -> None:
    """Raise _UnusableState unless the saved `tensors` have the names, types and shapes of those of `parts`."""
    # A new optimizer has no state tensors before its first step, while the saved one has some of each parameter. Those
    # can't be compared by name: each must have its parameter's shape, or be a number, as a count of steps is.
    expected = parts.tensors()
    parameters = {f"optimizer.{number}": parameter for number, parameter in enumerate(parts.parameters())}
    for name in [*expected, *tensors]:
        saved, built = ((t[name].dtype, t[name].shape) if name in t else None for t in (tensors, expected))
        parameter = parameters.get(name.rpartition(".")[0])
        if saved and parameter is not None and saved[1] in (parameter.shape, ()):
            continue
        if saved != built:
            raise _UnusableState(f"its {name} does not fit the network of this code")


def _fill(parts: Parts, tensors: dict[str, Tensor], record: _TrainingRecord) -> None:
    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    parts.network.load_state_dict(under("network."))
    if parts.average:
        parts.average.load_state_dict({"updates": record.updates, "network": under("average.")})
    # torch's Optimizer.load_state_dict would keep the memory format of the file, which is contiguous. Fused optimizers
    # step through a parameter and its state in memory order, so each state tensor gets the parameter's format.
    for number, parameter in enumerate(parts.parameters()):
        for name, value in under(f"optimizer.{number}.").items():
            target = torch.empty_like(parameter if value.ndim else value, dtype=value.dtype, device=parameter.device)
            parts.optimizer.state[parameter][name] = target.copy_(value)


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, by one transfer from the device."""
    # All tensors become one of bytes, which is copied at once and cut up again. Those with the largest elements come
    # first, so that every slice begins at a multiple of its element size, as `view` needs.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    flat = torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in ordered.values()]).cpu()
    slices = flat.split([tensor.nbytes for tensor in ordered.values()])
    return {
        name: part.view(tensor.dtype).view(tensor.shape)
        for (name, tensor), part in zip(ordered.items(), slices, strict=True)
    }


def _difference_of_machine(record: _TrainingRecord) -> str:
    """What may change the last bits, where it is not as it was when the state was saved; else nothing."""
    if (record.torch, record.threads) == (torch.__version__, torch.get_num_threads()):
        return ""
    saved_by = f"torch {record.torch} with threads = {record.threads}"
    this = f"torch {torch.__version__} with threads = {torch.get_num_threads()}"
    return f"; it was saved by {saved_by}, and this is {this}: the last bits may differ"
