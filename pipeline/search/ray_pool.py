"""A study's workers on a Ray cluster: actors that do what processes do on one machine.

Ray places them, reports that they died, and requires a token of every client; retries and the budget are the supervisor's.
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
from pipeline.search.worker import Assignment, Ended, Limits, work
from pipeline.search.worker_pool import Worker
from pipeline.training.placement import Placement

PROBE_S = 25.0  # for a cluster to answer
CAPACITY_S = 5.0  # between two checks of the cluster's nodes
PLACEMENT_S = 15.0  # within which Ray places an actor, where there is capacity
KILL_S = 10.0  # for a killed actor to be gone
INSTALL = ".venv/bin/pip install -e '.[cluster]'"
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: Ray serves this machine only, and its ports open on 127.0.0.1

log = logging.getLogger(__name__)

_ADMITTED, _REFUSED, _NO_ANSWER = 0, 3, 4
# In a process of its own: the way to authenticate is fixed when Ray is imported, and a missing token ends the process.
_PROBE = f"""
import sys, ray
address = sys.argv[1]
try:
    if address.startswith("ray://"):
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated import ray_client_pb2 as messages, ray_client_pb2_grpc
        server = ray_client_pb2_grpc.RayletDriverStub(init_grpc_channel(address[6:]))
        ping = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)
        server.ClusterInfo(ping, timeout=10, metadata=[("client_id", "probe")])
    else:
        from ray._private.services import canonicalize_bootstrap_address
        from ray._raylet import GcsClient
        address = canonicalize_bootstrap_address(None) if address == "auto" else address
        if address is None:
            sys.exit({_NO_ANSWER})
        GcsClient(address=address).internal_kv_get(b"probe", namespace=None, timeout=5)
    print(address)
except Exception as error:
    sys.exit({_REFUSED} if "authenticat" in str(error).lower() else {_NO_ANSWER})
"""


class Actor:
    """One worker, somewhere on the cluster; its methods run in threads, at the same time."""

    def __init__(self) -> None:
        ignore_variables()  # of the shell that started the node
        self._stop = threading.Event()

    def work(self, assignment: bytes) -> Ended:
        """See worker.work."""
        return work(cloudpickle.loads(assignment), self._stop.is_set)

    def stop(self) -> None:
        """Ask it to end at its next step."""
        self._stop.set()

    def placed(self) -> None:
        """Returns as soon as the actor is placed."""


class RayWorker:
    """A worker as an actor; see `worker_pool.Worker`."""

    def __init__(self, assignment: Assignment, resources: Mapping[str, float]):
        import ray

        self.id = assignment.id
        self._ended: Ended | None = None
        # No restarts by Ray: the supervisor knows whether another worker is needed.
        kind: Any = ray.remote(Actor)
        self._actor = actor = kind.options(**resources, max_restarts=0, max_concurrency=3).remote()
        self._placed, self._answer = actor.placed.remote(), actor.work.remote(cloudpickle.dumps(assignment))
        self._created = time.monotonic()

    def is_pending(self) -> bool:
        """Whether the cluster has not placed it within PLACEMENT_S."""
        is_late = time.monotonic() - self._created > PLACEMENT_S
        return is_late and self.ended() is None and not self._is_placed()

    def _is_placed(self) -> bool:
        import ray

        return bool(ray.wait([self._placed], timeout=0)[0])

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
        """See Worker. One that is not placed yet has nothing to end."""
        import ray

        if self._is_placed():
            self._actor.stop.remote()
        else:
            ray.kill(self._actor)

    def kill(self) -> None:
        """See Worker. Its capacity is free then, also where its work had ended."""
        import ray

        was_alive = self.ended() is None
        ray.kill(self._actor)
        if was_alive:
            ray.wait([self._answer], timeout=KILL_S)


def _reason(error: Exception) -> str:
    """One line of what Ray says in many."""
    lines = [line.strip() for line in str(error).splitlines()]
    causes = [line for line in lines[1:] if line and not line.startswith(("class_name", "actor_id", "namespace"))]
    return "its actor died: " + " ".join(causes or lines)[:300]


@dataclass
class RayPool:
    """Workers on the Ray cluster that this process is connected to; see WorkerPool.

    `workers` at most, or as many as the cluster has capacity for, which grows as nodes join.
    """

    name: str  # of the cluster, as it is shown
    device: str  # cpu or cuda, of the workers
    data_dir: Path
    workers: int | None = None
    limits: Limits = field(default_factory=Limits)
    _capacity: int = 0
    _last_check: float = -math.inf
    _actors: list[RayWorker] = field(default_factory=list)
    _reported_pending: int = 0

    def __post_init__(self) -> None:
        gpus = sum(_gpus(node) for node in _nodes())
        # Several on one GPU only where so many workers are asked for.
        self._per_gpu = max(1, math.ceil((self.workers or 1) / gpus)) if gpus else 1

    def capacity(self) -> int:
        """See WorkerPool."""
        if time.monotonic() - self._last_check > CAPACITY_S:
            by_node = [_gpus(node) * self._per_gpu if self.device == "cuda" else _cpus(node) for node in _nodes()]
            self._capacity = sum(by_node) if self.workers is None else min(sum(by_node), self.workers)
            self._last_check = time.monotonic()
            self._report_pending()
        return self._capacity

    def start(self, assignment: Assignment, slot: int) -> Worker:
        """See WorkerPool."""
        if self.device == "cpu":
            return self._add(RayWorker(replace(assignment, placement=Placement("cpu", threads=1)), {"num_cpus": 1}))
        share = math.floor(10_000 / self._per_gpu) / 10_000  # Ray counts in ten-thousandths
        fraction = 1 / self._per_gpu if self._per_gpu > 1 else None
        # Ray shows each actor its own GPU only, as the first one.
        assignment = replace(assignment, placement=Placement("cuda:0", fraction))
        return self._add(RayWorker(assignment, {"num_gpus": share, "num_cpus": 0}))

    def _add(self, actor: RayWorker) -> RayWorker:
        self._actors = [other for other in self._actors if other.ended() is None] + [actor]
        return actor

    def _report_pending(self) -> None:
        pending = sum(actor.is_pending() for actor in self._actors)
        if pending > self._reported_pending:
            log.info("%d of %d workers are pending: the cluster is in use", pending, len(self._actors))
        self._reported_pending = pending


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
    `auto`, `cpu` or `cuda`. UserError, within PROBE_S, where there is no cluster, or it has another token, or requires
    none: whoever reaches such a cluster can run anything on it.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"`--cluster` {address}", "needs Ray", INSTALL)
    joined = _probe(address)
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
            f"`--cluster` {address}",
            f"can't be joined ({first_line(error)})",
            "HOST:PORT is for a machine of the cluster, ray://HOST:10001 for others",
        ) from None
    # Where a node dies, Ray prints 40 lines of its inner state; the supervisor reports what became of the trials.
    ray._private.worker.print_to_stdstream = lambda *arguments, **options: None
    try:
        has_gpu = any(_gpus(node) for node in _nodes())
        kind = ("cuda" if has_gpu else "cpu") if device == "auto" else device
        if kind == "cuda" and not has_gpu:
            rule = f"no node of the cluster {address} has a GPU"
            raise UserError(f"`--device` {device}", rule, "`--device cpu` trains without one")
        yield RayPool(joined or "a Ray that this command started on 127.0.0.1", kind, data_dir, workers, limits)
    finally:
        ray.shutdown()


def _probe(address: str) -> str | None:
    """The address of a cluster that admits us and refuses clients without the token; None where `auto` finds none."""
    has_token = _has_token()
    modes = ["disabled", "token"] if has_token else ["disabled"]
    subject = f"`--cluster` {address}"
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(_start_probe(address, mode)) for mode in modes]
        deadline = time.monotonic() + PROBE_S
        answers = [_answer(probe, deadline) for probe in probes]
    (without_token, _), (with_token, found_address) = answers[0], answers[-1]
    if without_token == _ADMITTED:
        raise UserError(
            subject,
            "requires no token, so anyone who reaches it can run anything on it",
            "start its nodes with RAY_AUTH_MODE=token",
        )
    if (without_token, with_token) == (_REFUSED, _ADMITTED) and has_token:
        return found_address
    if without_token == _REFUSED:
        raise UserError(
            subject,
            "has another token than this machine" if has_token else "requires a token, and there is none here",
            "copy ~/.ray/auth_token from its head, or set RAY_AUTH_TOKEN_PATH to its file",
        )
    if address == "auto" and not os.environ.get("RAY_ADDRESS"):
        return None
    raise UserError(subject, "no answer", "use the address that `ray start --head` printed")


def _start_probe(address: str, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROBE, address],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"RAY_AUTH_MODE": mode},
        start_new_session=True,
    )


def _answer(probe: subprocess.Popen[str], deadline: float) -> tuple[int, str]:
    """How a probe ended, and the cluster's address behind the one that was given."""
    try:
        output, _ = probe.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        probe.kill()
        return _NO_ANSWER, ""
    return probe.returncode, output.strip()


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def _has_token() -> bool:
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or (_token_file().is_file() and _token_file().stat().st_size > 0)


def _make_token() -> None:
    """A token that only its owner can read, unlike those that Ray makes. UserError where it can't be written."""
    if _has_token():
        return
    try:
        _token_file().parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), open(_token_file(), "xb", opener=_private) as file:
            file.write(secrets.token_hex(32).encode())
    except OSError as error:
        rule = f"the token of this command's Ray can't be written ({error.strerror})"
        raise UserError(str(_token_file()), rule, "set RAY_AUTH_TOKEN_PATH to another file") from None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
