"""A study's workers on a Ray cluster: actors that do what processes do on one machine.

Ray places them, says that they died, and asks everybody for a token; retries and the budget stay the supervisor's.
"""

import contextlib
import importlib.util
import logging
import math
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cloudpickle

from pipeline.errors import UserError, first_line
from pipeline.runtime import ignore_variables
from pipeline.search.supervisor import Worker
from pipeline.search.worker import Assignment, Ended, Limits, work

KNOCK_S = 25.0  # for a cluster to answer
LOOK_S = 5.0  # between two looks at the cluster's nodes
PLACED_S = 15.0  # within which an actor has a place, where there is one
KILL_S = 10.0  # for a killed actor to be gone
INSTALL = ".venv/bin/pip install -e '.[cluster]'"
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: Ray is for this machine only, and its ports open on 127.0.0.1

log = logging.getLogger(__name__)

_IN, _KEPT_OUT, _NOBODY = 0, 3, 4
# In a process of its own: how to authenticate is fixed when Ray is imported, and a token that is missing ends the process.
_KNOCK = f"""
import sys, ray
address = sys.argv[1]
try:
    if address.startswith("ray://"):
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated import ray_client_pb2 as words, ray_client_pb2_grpc
        server = ray_client_pb2_grpc.RayletDriverStub(init_grpc_channel(address[6:]))
        ping = words.ClusterInfoRequest(type=words.ClusterInfoType.PING)
        server.ClusterInfo(ping, timeout=10, metadata=[("client_id", "knock")])
    else:
        from ray._private.services import canonicalize_bootstrap_address
        from ray._raylet import GcsClient
        address = canonicalize_bootstrap_address(None) if address == "auto" else address
        if address is None:
            sys.exit({_NOBODY})
        GcsClient(address=address).internal_kv_get(b"knock", namespace=None, timeout=5)
    print(address)
except Exception as error:
    sys.exit({_KEPT_OUT} if "authenticat" in str(error).lower() else {_NOBODY})
"""


class Actor:
    """One worker, somewhere on the cluster; its methods run in threads beside each other."""

    def __init__(self) -> None:
        ignore_variables()  # those of the shell that started the node
        self._stop = threading.Event()

    def work(self, assignment: bytes) -> Ended:
        """See worker.work."""
        return work(cloudpickle.loads(assignment), self._stop.is_set)

    def stop(self) -> None:
        """Ask it to end at its next step."""
        self._stop.set()

    def begun(self) -> None:
        """Answers as soon as the actor has a place."""


class RayWorker:
    """A worker as an actor; see `supervisor.Worker`."""

    def __init__(self, assignment: Assignment, resources: Mapping[str, float]):
        import ray

        self.id = assignment.id
        self._ended: Ended | None = None
        # No restarts by Ray: the supervisor knows whether another is wanted.
        kind: Any = ray.remote(Actor)
        self._actor = actor = kind.options(**resources, max_restarts=0, max_concurrency=3).remote()
        self._begun, self._answer = actor.begun.remote(), actor.work.remote(cloudpickle.dumps(assignment))
        self._asked = time.monotonic()

    def waits(self) -> bool:
        """Whether the cluster has had no place for it for PLACED_S."""
        late = time.monotonic() - self._asked > PLACED_S
        return late and self.ended() is None and not self._has_place()

    def _has_place(self) -> bool:
        import ray

        return bool(ray.wait([self._begun], timeout=0)[0])

    def ended(self) -> Ended | None:
        """See Worker."""
        import ray

        if self._ended is None and ray.wait([self._answer], timeout=0)[0]:
            try:
                self._ended = ray.get(self._answer)
            except ray.exceptions.RayError as error:
                self._ended = Ended(died=_reason(error))
        return self._ended

    def stop(self) -> None:
        """See Worker. One that has no place yet has nothing to end."""
        import ray

        if self._has_place():
            self._actor.stop.remote()
        else:
            ray.kill(self._actor)

    def kill(self) -> None:
        """See Worker. Its place is free then, also where its work had ended."""
        import ray

        ended = self.ended()
        ray.kill(self._actor)
        if ended is None:
            ray.wait([self._answer], timeout=KILL_S)


def _reason(error: Exception) -> str:
    """One line of what Ray says in many."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines[1:] if line and not line.startswith(("class_name", "actor_id", "namespace"))]
    return "its actor died: " + " ".join(told or lines)[:300]


@dataclass
class RayPool:
    """The crew of a Ray cluster that this process is connected to; see `supervisor.Crew`.

    `workers` at most, or as many as there is room for, which grows as nodes join.
    """

    where: str
    device: str  # cpu or cuda, of the workers
    data_dir: Path
    workers: int | None = None
    limits: Limits = field(default_factory=Limits)
    _room: int = 0
    _looked: float = -math.inf
    _actors: list[RayWorker] = field(default_factory=list)
    _told: int = 0  # actors that wait

    def __post_init__(self) -> None:
        gpus = sum(_gpus(node) for node in _nodes())
        # Several on one GPU only where that many workers are wanted.
        self._per_gpu = max(1, math.ceil((self.workers or 1) / gpus)) if gpus else 1

    def room(self) -> int:
        """See Crew."""
        if time.monotonic() - self._looked > LOOK_S:
            on = [_gpus(node) * self._per_gpu if self.device == "cuda" else _cpus(node) for node in _nodes()]
            self._room = sum(on) if self.workers is None else min(sum(on), self.workers)
            self._looked = time.monotonic()
            self._tell_who_waits()
        return self._room

    def start(self, assignment: Assignment, place: int) -> Worker:
        """See Crew."""
        if self.device == "cpu":
            return self._add(RayWorker(replace(assignment, device="cpu", threads=1), {"num_cpus": 1}))
        share = math.floor(10_000 / self._per_gpu) / 10_000  # Ray counts in ten-thousandths
        fraction = 1 / self._per_gpu if self._per_gpu > 1 else None
        # Ray shows each actor its own GPU only, as the first.
        on_gpu = replace(assignment, device="cuda:0", memory_fraction=fraction, threads=None)
        return self._add(RayWorker(on_gpu, {"num_gpus": share, "num_cpus": 0}))

    def _add(self, actor: RayWorker) -> RayWorker:
        self._actors = [other for other in self._actors if other.ended() is None] + [actor]
        return actor

    def _tell_who_waits(self) -> None:
        waiting = sum(actor.waits() for actor in self._actors)
        if waiting > self._told:
            log.info("%d of %d workers wait for a place: others are at work on the cluster", waiting, len(self._actors))
        self._told = waiting


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _gpus(node: Mapping[str, Any]) -> int:
    return int(node["Resources"].get("GPU", 0))


def _cpus(node: Mapping[str, Any]) -> int:
    return int(node["Resources"].get("CPU", 0))


@contextlib.contextmanager
def connect(address: str, device: str, data_dir: Path, workers: int | None, limits: Limits) -> Iterator[RayPool]:
    """The cluster at `auto`, `HOST:PORT` (from one of its nodes) or `ray://HOST:PORT` (from outside), while the block runs.

    `auto` is the Ray that runs on this machine, else one that is started on 127.0.0.1 for this command. `device` is
    `auto`, `cpu` or `cuda`. UserError, within KNOCK_S, where there is none, or it has another token, or asks for none:
    whoever reaches such a cluster can run anything on it.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"CLUSTER {address}: needs Ray; {INSTALL}")
    joined = _joined(address)
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if joined is None:
        _make_token()
        os.environ[_LOOPBACK] = "0"
    import ray

    try:
        if joined is None:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address=joined, log_to_driver=False, logging_level=logging.ERROR)
    except (SystemExit, Exception) as error:  # Ray ends so where its ports are closed, or this machine is no node of it
        raise UserError(
            f"CLUSTER {address}: can't be joined ({first_line(error)}); HOST:PORT is for a machine of the cluster, "
            "ray://HOST:10001 for others"
        ) from None
    # Where a node dies Ray prints 40 lines of its inner state; what became of the trials the supervisor says.
    ray._private.worker.print_to_stdstream = lambda *arguments, **named: None
    try:
        on = device if device != "auto" else "cuda" if any(_gpus(node) for node in _nodes()) else "cpu"
        if on == "cuda" and not any(_gpus(node) for node in _nodes()):
            raise UserError(f"DEVICE {device}: no node of CLUSTER {address} has a GPU; DEVICE=cpu trains without")
        yield RayPool(joined or "a Ray of this command's, on 127.0.0.1", on, data_dir, workers, limits)
    finally:
        ray.shutdown()


def _joined(address: str) -> str | None:
    """The address of a cluster that lets us in and no stranger; None where `auto` finds none."""
    ours = _token_is_there()
    ways = ["disabled", "token"] if ours else ["disabled"]
    with contextlib.ExitStack() as stack:
        knocks = [stack.enter_context(_knock(address, way)) for way in ways]
        deadline = time.monotonic() + KNOCK_S
        answers = [_answer(knock, deadline) for knock in knocks]
    (stranger, _), (we, found) = answers[0], answers[-1]
    if stranger == _IN:
        raise UserError(
            f"CLUSTER {address}: asks for no token, so whoever reaches it can run anything on it; "
            "start its nodes with RAY_AUTH_MODE=token"
        )
    if (stranger, we) == (_KEPT_OUT, _IN) and ours:
        return found
    if stranger == _KEPT_OUT:
        fault = "has another token than this one" if ours else "asks for a token, and there is none here"
        raise UserError(
            f"CLUSTER {address}: {fault}; copy ~/.ray/auth_token from its head, or name its file in RAY_AUTH_TOKEN_PATH"
        )
    if address == "auto" and not os.environ.get("RAY_ADDRESS"):
        return None
    raise UserError(f"CLUSTER {address}: no answer; is it the address that `ray start --head` printed?")


def _knock(address: str, way: str) -> subprocess.Popen[str]:
    environment = os.environ | {"RAY_AUTH_MODE": way}
    command = [sys.executable, "-c", _KNOCK, address]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
    )


def _answer(knock: subprocess.Popen[str], deadline: float) -> tuple[int, str]:
    """How a knock ended, and the address behind the one that was given."""
    try:
        said, _ = knock.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        knock.kill()
        return _NOBODY, ""
    return knock.returncode, said.strip()


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def _token_is_there() -> bool:
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or (_token_file().is_file() and _token_file().stat().st_size > 0)


def _make_token() -> None:
    """Ray would make one itself, which everybody on this machine can read. UserError where it can't be written."""
    if _token_is_there():
        return
    try:
        _token_file().parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), open(_token_file(), "xb", opener=_private) as file:
            file.write(secrets.token_hex(32).encode())
    except OSError as error:
        raise UserError(
            f"{_token_file()}: the token of a Ray of this command's can't be written ({error.strerror}); "
            "RAY_AUTH_TOKEN_PATH names another place"
        ) from None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
