"""Starts the pipeline's processes in a moment each, so that many can be killed: everything is imported once, then forked.

A program, run by `ForkServer`. A request on its socket is a line of JSON with the files for stdin, stdout and
stderr; the answers are the new process's id, and later its exit code. The supervisor's workers are started here too, in
place of subprocess.Popen. The processes run the real `main` functions, with real pipes, signals, files and databases.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import random
import selectors
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import worker_process

PRELOADED = (
    *("torch", "mlflow", "optuna", "sklearn.datasets", "pandas", "matplotlib.pyplot", "pyarrow.parquet", "psycopg"),
    # What a training, an export and a page import when they begin.
    *("torch._dynamo", "onnxscript", "onnx.reference", "onnxruntime", "networkx", "pipeline.report.comparison_page"),
    *(
        "pipeline.cli.main",
        "pipeline.audit",
        "pipeline.cli.views_study",
        "pipeline.search.run_study",
    ),
)


ANSWER_S = 60.0  # that a server of many tests may take to fork a process
NEW_STORE = "new_store.db"
# As it is before a test changes it: the server may be started inside one.
INHERITED = dict(os.environ)


class Forked:
    """What the supervisor sees of a worker that the fork server forked; the part of subprocess.Popen that it uses."""

    def __init__(self, command: list[str], **options: Any):
        module = command[2].split()[-4]
        assert command[1:] == ["-c", worker_process.program(module)], command
        stdin, mine = os.pipe()
        yours, stdout = os.pipe()
        request = {"role": "worker", "module": module, "env": dict(options["env"]), "cwd": os.getcwd()}
        message = json.dumps(request).encode() + b"\n"
        self._talk = socket.socket(socket.AF_UNIX)
        self._talk.connect(os.environ["FORK_SERVER"])
        socket.send_fds(self._talk, [message], [stdin, stdout, 2])
        os.close(stdin)
        os.close(stdout)
        self.stdin, self.stdout = os.fdopen(mine, "wb"), os.fdopen(yours, "rb")
        self._heard = self._talk.makefile("rb")
        self.pid = int(self._heard.readline())
        self._talk.setblocking(False)
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None and (line := self._heard.readline()):
            self._code = int(line)
        return self._code

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code


class Spawning:
    """In the place of the module subprocess."""

    Popen, PIPE = Forked, subprocess.PIPE


def arm(hook: dict[str, Any]) -> None:
    """Have the `at`-th call of a function kill its process: `before`, `after` or while it is `inside`; or have it `hang`."""
    module, _, path = hook["function"].partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls, lock = getattr(owner, name), [0], threading.Lock()

    def die() -> None:
        with open(hook["note"], "a") as file:
            file.write(json.dumps(hook) + "\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def armed(*arguments: Any, **named: Any) -> Any:
        with lock:
            calls[0] += 1
            now = calls[0] == hook["at"]
        if now and hook["when"] == "before":
            die()
        if now and hook["when"] == "hang":
            time.sleep(3600)
        if now and hook["when"] == "inside":
            threading.Timer(random.Random(hook["seed"]).uniform(0, 0.02), die).start()
        answer = original(*arguments, **named)
        if now and hook["when"] == "after":
            die()
        return answer

    setattr(owner, name, armed)


def copy_new_stores(made: Path) -> None:
    """A new MLflow store of this process is a copy of the one in this file, made with the first: migrations take a second.

    Scripts and processes of their own make theirs themselves, as users' do.
    """
    from pipeline.tracking import store

    make_tables: Any = store._make_tables

    def copy(uri: str) -> None:
        if not made.exists():
            make_tables(f"sqlite:///{made}")
        new = shutil.copy(made, uri.removeprefix("sqlite:///"))
        with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous=OFF")
            # The one experiment of a new store lies in the folder of the process that makes it.
            connection.execute("UPDATE experiments SET artifact_location = ?", [str(Path("mlruns/0").resolve())])

    store._make_tables = copy


def copy_drawings(folder: Path) -> None:
    """Each of a run's figures is drawn once, kept in this folder by its name and then copied: five take half a second."""
    from pipeline.disk import replacing
    from pipeline.evaluation import figures

    save: Any = figures.save

    def copy(figure: Any, path: Path) -> None:
        kept = folder / path.name
        if not kept.exists():
            drawn = kept.with_name(f".{os.getpid()}.{path.name}")
            save(figure, drawn)
            drawn.replace(kept)
        with replacing(path) as new:
            shutil.copy(kept, new)

    figures.save = copy


def tune(limits: dict[str, float]) -> None:
    """The same as ever, in less time: a beat, a state at each epoch's end, MLflow asked sooner."""
    from pipeline.search import worker
    from pipeline.tracking import uploader
    from pipeline.training.resume import Resume

    initial: Any = worker.Limits.__init__
    initial.__defaults__ = tuple(
        limits[name] for name in ("heartbeat_s", "heartbeat_timeout_s", "stall_timeout_s", "term_s")
    )
    saving: Any = Resume.__init__
    saving.__defaults__ = (limits["every_s"],)
    uploader._INTERVAL_S, uploader._MAX_PAUSE_S = 0.5, 1.0


def jump(draw: random.Random) -> None:
    """Let this process's clock jump by hours, forward and back, every second or so; not the monotonic one.

    The kernel's idea of when it started, by which psutil tells when a process did, jumps with it.
    """
    import psutil._pslinux as system

    clock, nanoseconds, started = time.time, time.time_ns, system.boot_time
    jumps = [draw.choice([-1, 1]) * draw.uniform(0, 86_400) for _ in range(1000)]

    def offset() -> float:
        return jumps[int(time.monotonic()) % len(jumps)]

    time.time = lambda: clock() + offset()
    time.time_ns = lambda: nanoseconds() + int(offset() * 1e9)
    system.boot_time = lambda: started() + offset()


LIMITS = {"heartbeat_s": 0.3, "heartbeat_timeout_s": 30.0, "stall_timeout_s": 900.0, "term_s": 7.0, "every_s": 0.0}


def begin(request: dict[str, Any], files: list[int], hook: dict[str, Any] | None) -> None:
    """The life of a forked process, which does not return."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 1024)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, open(number, "r" if not number else "w", closefd=False))  # noqa: SIM115
    if request["role"] != "script":
        copy_new_stores(Path(os.environ["FORK_SERVER"]).with_name(NEW_STORE))
        copy_drawings(Path(os.environ["FORK_SERVER"]).parent)
        tune(LIMITS | json.loads(os.environ.get("CHAOS_LIMITS", "{}")))
    if seed := os.environ.get("CHAOS_CLOCK"):
        jump(random.Random(int(seed)))
    if hook:
        arm(hook)
    ended_with = 1
    try:
        if request["role"] == "worker":
            main = functools.partial(importlib.import_module(request["module"]).main, worker_process.Channel())
        elif request["role"] == "script":
            code, *sys.argv[1:] = request["words"]
            main = functools.partial(exec, code, {"__name__": "__main__"})
        else:
            from pipeline.cli.main import main

            module: Any = worker_process
            module.subprocess = Spawning
            sys.argv = ["pipeline", *request["words"]]
        main()
        ended_with = 0
    except SystemExit as ended:
        ended_with = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(ended_with)


def warm_up(new_store: Path) -> None:
    """What the processes to come would each do again."""
    from pipeline.tracking import lineage, store

    if not new_store.exists():
        store._create(new_store)
    lineage._packages()


def serve(path: str) -> None:
    """Until the one who started this closes our stdin."""
    for name in PRELOADED:
        importlib.import_module(name)
    warm_up(Path(path).with_name(NEW_STORE))
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken)
    children: dict[int, tuple[str, socket.socket]] = {}
    hooks: dict[str, list[dict[str, Any]]] = {"worker": [], "command": [], "script": []}
    watch = selectors.DefaultSelector()
    for source in (listening, wake, 0):
        watch.register(source, selectors.EVENT_READ)
    os.write(1, b"ready\n")
    while True:
        for key, _ in watch.select():
            if key.fileobj == 0:
                return
            if key.fileobj == wake:
                os.read(wake, 4096)
                reap(children)
                continue
            talk, _ = listening.accept()
            text, files = receive(talk)
            if not text:
                talk.close()
                continue
            request = json.loads(text)
            if request["role"] == "hook":
                hooks[request["for"]].append(request["hook"])
                talk.close()
                continue
            if request["role"] == "disarm":
                for queue in hooks.values():
                    queue.clear()
                talk.close()
                continue
            if request["role"] == "list":
                with contextlib.suppress(OSError):
                    talk.sendall(json.dumps({pid: role for pid, (role, _) in children.items()}).encode() + b"\n")
                talk.close()
                continue
            queue = hooks[request["role"]]
            hook = queue.pop(0) if queue else None
            if not (pid := os.fork()):
                begin(request, files, hook)
            for file in files:
                os.close(file)
            with contextlib.suppress(OSError):  # who asked was killed meanwhile
                talk.sendall(f"{pid}\n".encode())
            children[pid] = (request["role"], talk)


def receive(talk: socket.socket) -> tuple[bytes, list[int]]:
    """A request and its files; nothing where who asked was killed before all of it was sent."""
    text, files, _, _ = socket.recv_fds(talk, 1 << 20, 3)
    while not text.endswith(b"\n"):
        more = talk.recv(1 << 20)
        if not more:
            for file in files:
                os.close(file)
            return b"", []
        text += more
    return text, files


def reap(children: dict[int, tuple[str, socket.socket]]) -> None:
    """Tell whoever asked for a process how it ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _, talk = children.pop(pid)
        with contextlib.suppress(OSError):
            talk.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        talk.close()


class ForkServer:
    """Starts this file as a program, and sends it requests; see above."""

    def __init__(self, folder: Path):
        self.address = str(folder / "fork_server")
        environment = INHERITED | {
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
            "FORK_SERVER": self.address,
        }
        program = Path(__file__)
        self._process = subprocess.Popen(
            [sys.executable, str(program), self.address], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout and self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        """End it."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def ask(self, request: dict[str, Any], files: list[int] | None = None) -> socket.socket:
        """A request; where its answers come, TimeoutError where they don't."""
        message = json.dumps(request).encode() + b"\n"
        talk = socket.socket(socket.AF_UNIX)
        talk.settimeout(ANSWER_S)
        talk.connect(self.address)
        socket.send_fds(talk, [message], files) if files else talk.sendall(message)
        return talk

    def workers(self) -> list[int]:
        """The ids of the worker processes that live."""
        with self.ask({"role": "list"}) as talk, talk.makefile() as heard:
            return [int(pid) for pid, role in json.loads(heard.readline()).items() if role == "worker"]

    def arm(self, which: str, function: str, at: int, when: str, note: Path) -> None:
        """The next `worker` or `command` kills itself at the `at`-th call of a function; see fork_server.arm."""
        hook = {"function": function, "at": at, "when": when, "note": str(note), "seed": at}
        self.ask({"role": "hook", "for": which, "hook": hook}).close()

    def disarm(self) -> None:
        """Whoever is started from now on lives."""
        self.ask({"role": "disarm"}).close()

    def run(self, words: Sequence[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """`python -m pipeline WORDS` in a folder, to its end."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            command = Process(self, words, folder, (out.fileno(), err.fileno()), {"COLUMNS": "120", **environment})
            code = command.wait()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(list(words), code, out.read(), err.read())

    def start(self, words: Sequence[str], folder: Path, log: Path, **environment: str) -> "Process":
        """`python -m pipeline WORDS` in a folder; what it says is added to a log."""
        with log.open("ab") as out:
            return Process(self, words, folder, (out.fileno(), out.fileno()), {"COLUMNS": "200", **environment})

    def script(self, code: str, *words: str) -> "Process":
        """`python -c CODE WORDS` in the current folder."""
        return Process(self, [code, *words], Path.cwd(), (1, 2), dict(os.environ), role="script")


class Process:
    """A process of the fork server's: a command's words, or a script's code and words."""

    def __init__(
        self,
        server: ForkServer,
        words: Sequence[str],
        folder: Path,
        output: tuple[int, int],
        environment: dict[str, str],
        role: str = "command",
    ):
        request = {"role": role, "words": list(words), "cwd": str(folder), "env": environment}
        with open(os.devnull) as nothing:
            self._talk = server.ask(request, [nothing.fileno(), *output])
        with self._talk.makefile("rb", buffering=0) as heard:  # reads no byte too many
            self.pid = int(heard.readline())
        self._code: int | None = None

    def code(self, timeout_s: float = 0.001) -> int | None:
        """How it ended; None where it has not by then."""
        if self._code is None:
            self._talk.settimeout(timeout_s)
            with contextlib.suppress(TimeoutError):
                self._code = int(self._talk.recv(64) or b"-9")
                self._talk.close()
        return self._code

    def wait(self, timeout_s: float = 300) -> int:
        """How it ended."""
        code = self.code(timeout_s)
        assert code is not None, "it still runs"
        return code

    def signal(self, number: int) -> None:
        """Send it a signal, if it lives."""
        if self.code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


@functools.cache
def shared_folder() -> Path:
    """Of all tests of this process, and of its fork server."""
    folder = Path(tempfile.mkdtemp(prefix="fork-server-"))
    atexit.register(shutil.rmtree, folder)
    return folder


@functools.cache
def shared_fork_server() -> ForkServer:
    """One for all tests of this process."""
    server = ForkServer(shared_folder())
    atexit.register(server.close)
    return server


if __name__ == "__main__":
    serve(sys.argv[1])
