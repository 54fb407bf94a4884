"""Access control of the servers that are started here: which requests reach MLflow's own apps, and which files they may touch.

MLflow's own check of the Host header accepts names as `10.evil.example`, and lets pages of other local servers write; its
scoring server checks nothing (both in 3.17.2).
"""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.ASCII)


class AccessControl:
    """An ASGI app that no page of another site reaches through a browser on this machine.

    Host must name this machine (else DNS rebinding works), with any port, as an SSH tunnel may have another one. Origin,
    where there is one, must name the same server. Paths that begin with one of `closed` are refused. A refusal is HTTP 403
    with a line of text.
    """

    def __init__(self, app: App, closed: tuple[str, ...] = ()):
        self._app, self._closed = app, closed

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """See ASGI 3."""
        if scope["type"] == "lifespan" or not (reason := self._refusal(scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        else:
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": reason.encode()})

    def _refusal(self, scope: Message) -> str:
        hosts, origins = (
            [value.decode("latin1") for key, value in scope["headers"] if key == name] for name in (b"host", b"origin")
        )
        if len(hosts) != 1 or not _OWN_HOST.fullmatch(hosts[0]):
            return "Host: must name this machine, as 127.0.0.1:PORT or localhost:PORT\n"
        if any(origin != f"http://{hosts[0]}" for origin in origins):
            return "Origin: pages of other servers are refused\n"
        if re.sub("/+", "/", scope["path"]).startswith(self._closed):
            return "closed: this server shows runs; it neither runs programs nor calls other servers\n"
        return ""


def restrict_artifacts(folder: Path) -> None:
    """Restrict MLflow, in this process, to artifacts below `folder`, whatever location a run or a model names.

    MLflow accepts any location for a new experiment, and would read, list, write and delete there.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact import artifact_repository_registry as registry
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    root = folder.resolve()

    class Inside(LocalArtifactRepository):
        def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None):
            super().__init__(artifact_uri, tracking_uri, registry_uri)
            if not Path(self.artifact_dir).resolve().is_relative_to(root):
                raise MlflowException.invalid_parameter_value("artifacts: not below this server's own folder")

    known: dict[str, Any] = registry.get_registered_artifact_repositories()
    for scheme in set(known) - {"runs", "models"}:  # those two resolve to one of the others
        del known[scheme]
    known |= {"": Inside, "file": Inside}
    create = SqlAlchemyStore.create_experiment

    def create_inside(self: SqlAlchemyStore, name: str, artifact_location: str | None = None, tags: Any = None) -> str:
        if artifact_location:  # a study of the experiment's name would write there
            registry.get_artifact_repository(artifact_location)
        return str(create(self, name, artifact_location, tags))

    store: Any = SqlAlchemyStore
    store.create_experiment = create_inside
