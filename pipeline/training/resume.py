"""A training's state on disk, from which another process goes on to the same weights: on a CPU, bit for bit.

A state is a folder `epoch-<n>` of `checkpoints.save_folder`'s with one safetensors file: the network, its average and the
optimizer, in their own types. What follows from seed, epoch and step is not kept: data order, augmentation, dropout, rates,
which parameters are frozen.
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

CHECKPOINTS = "checkpoints"  # the folder of all states, in the home folder: one for each run key
TENSORS = "state.safetensors"
EVERY_S = 30.0


@dataclass(frozen=True)
class Parts:
    """What training changes."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None

    def parameters(self) -> list[Tensor]:
        """Those of the optimizer, in its order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def tensors(self) -> dict[str, Tensor]:
        """All of them, the live ones, by name: `network.*`, `average.*`, `optimizer.<parameter's number>.*`."""
        networks = {"network": self.network} | ({"average": self.average.network} if self.average else {})
        return {f"{of}.{name}": t for of, network in networks.items() for name, t in network.state_dict().items()} | {
            f"optimizer.{number}.{name}": value
            for number, parameter in enumerate(self.parameters())
            for name, value in self.optimizer.state.get(parameter, {}).items()
        }


class _Facts(BaseModel):
    """What stands beside the tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    recipe: str  # digests
    data: str
    split: str
    history: list[dict[str, float]]  # an epoch's metrics
    seconds: float
    updates: int  # of the average
    torch: str
    threads: int

    @property
    def epoch(self) -> int:
        return len(self.history)


class Resume:
    """Where a training keeps its state, at most every `every_s` seconds; of what is found there the training goes on.

    Two states are kept, so that there is another one should the newer be damaged.
    """

    def __init__(self, folder: Path, every_s: float = EVERY_S):
        self.folder, self.every_s = folder, every_s
        self.history: list[dict[str, float]] = []  # metrics of the epochs that were done, from the first
        self.seconds = 0.0  # that they took
        self.notes: list[str] = []  # for the user, a line each: from where it goes on, what was damaged or not saved
        self._identity: dict[str, str] = {}
        self._last = 0.0
        self._failed = False

    def restore(self, recipe: Recipe, data: TrainingData, parts: Parts) -> None:
        """Bring `parts`, newly built, to the newest state that is whole; without one they stay as they are.

        UserError where it is the state of another recipe, data set or split. Damaged states are noted and removed.
        """
        self._identity = {"recipe": recipe.digest(), "data": data.digest, "split": data.split_digest}
        self._last = time.monotonic()
        damaged = False
        for state in self._states():
            try:
                facts, tensors = _read(state)
                self._refuse_another(state, facts)
                _check(tensors, parts)
            except _Unusable as fault:
                damaged = True
                self.notes.append(f"the state of {state.name} is not used: {fault}")
                discard_folder(state)
                continue
            _fill(parts, tensors, facts)
            self.history, self.seconds = facts.history, facts.seconds
            self.notes.append(f"goes on after epoch {facts.epoch} of {recipe.training.epochs}{_otherwise(facts)}")
            return
        if damaged:
            self.notes.append("no state is left to go on from: from epoch 1 again")

    def save_if_due(self, parts: Parts, history: list[dict[str, float]], seconds: float) -> None:
        """Save the state after the last epoch of `history`, `seconds` into the training, if it is time.

        A disk that refuses is noted once; the training goes on, and the states before stay.
        """
        if time.monotonic() - self._last < self.every_s:
            return
        facts = _Facts(
            **self._identity,
            history=history,
            seconds=seconds,
            updates=parts.average.state_dict()["updates"] if parts.average else 0,
            torch=torch.__version__,
            threads=torch.get_num_threads(),
        )
        new = self.folder / f"epoch-{facts.epoch:06}"
        try:
            save_folder(new, {TENSORS: save(_on_host(parts.tensors()))}, facts.model_dump())
            keep = self._states()[:2]
            for other in self.folder.iterdir():  # killed writers' leftovers too
                if other not in keep:
                    discard_folder(other)
        except OSError as error:
            if not self._failed:
                self.notes.append(f"the state after epoch {facts.epoch} could not be saved: {error}")
            self._failed = True
        self._last = time.monotonic()

    def _states(self) -> list[Path]:
        """The newest first; no leftovers."""
        return sorted((record.parent for record in self.folder.glob(f"epoch-*/{RECORD}")), reverse=True)

    def _refuse_another(self, state: Path, facts: _Facts) -> None:
        others = [
            f"{name} {getattr(facts, name)[:16]} there, {digest[:16]} here"
            for name, digest in self._identity.items()
            if getattr(facts, name) != digest
        ]
        if others:
            way_out = "move the folder away to start from epoch 1"
            raise UserError(f"{state}: the state of another training ({', '.join(others)}); {way_out}")


class _Unusable(Exception):
    pass


def _read(state: Path) -> tuple[_Facts, dict[str, Tensor]]:
    """What `save_if_due` wrote."""
    try:
        return _Facts.model_validate(read_checkpoint(state)), load_file(state / TENSORS)
    except ValidationError:
        raise _Unusable("written by another version of the pipeline") from None
    except (UserError, OSError, SafetensorError) as error:
        raise _Unusable(str(error).partition("\n")[0]) from None


def _check(tensors: dict[str, Tensor], parts: Parts) -> None:
    """Before anything is changed: does all of it fit?"""
    expected = parts.tensors()
    parameters = {f"optimizer.{number}": parameter for number, parameter in enumerate(parts.parameters())}
    for name in [*expected, *tensors]:
        there, here = ((t[name].dtype, t[name].shape) if name in t else None for t in (tensors, expected))
        parameter = parameters.get(name.rpartition(".")[0])  # an optimizer has its state from the first step on
        if there and parameter is not None and there[1] in (parameter.shape, ()):
            continue
        if there != here:
            raise _Unusable(f"its {name} does not fit the network of this code")


def _fill(parts: Parts, tensors: dict[str, Tensor], facts: _Facts) -> None:
    def of(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    parts.network.load_state_dict(of("network."))
    if parts.average:
        parts.average.load_state_dict({"updates": facts.updates, "network": of("average.")})
    for number, parameter in enumerate(parts.parameters()):
        for name, value in of(f"optimizer.{number}.").items():
            # In the parameter's memory format: fused optimizers walk through both side by side.
            place = torch.empty_like(parameter if value.ndim else value, dtype=value.dtype, device=parameter.device)
            parts.optimizer.state[parameter][name] = place.copy_(value)


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, by one transfer from the device."""
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # so that each slice is aligned
    flat = torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in ordered.values()]).cpu()
    slices = flat.split([tensor.nbytes for tensor in ordered.values()])
    return {
        name: part.view(tensor.dtype).view(tensor.shape)
        for (name, tensor), part in zip(ordered.items(), slices, strict=True)
    }


def _otherwise(facts: _Facts) -> str:
    """What may change the last bits, where it differs from then."""
    now = (torch.__version__, torch.get_num_threads())
    if (facts.torch, facts.threads) == now:
        return ""
    then, here = (
        f"torch {version} with threads = {threads}" for version, threads in ((facts.torch, facts.threads), now)
    )
    return f"; it was saved by {then}, and this is {here}: the last bits may differ"
