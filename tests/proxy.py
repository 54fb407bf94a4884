"""A server that fails as networks do."""

import contextlib
import socket
import threading
import time

HOST = "127.0.0.1"


class Proxy:
    """TCP between a client and the server; `behave` says what happens to a connection's request.

    `pass`, `down` (refused at once), `cut` (the answer ends in its middle), `lose` (the request arrives, its answer
    doesn't), `late` (the request arrives after the client has given up), `slow` (the answer takes a second). Where `only` is
    set, requests without these bytes pass.
    """

    def __init__(self, port: int):
        self.upstream, self.behave, self.only, self.times = port, "pass", b"", 10**9
        self.requests: list[bytes] = []
        self._socket = socket.create_server((HOST, 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def set(self, behave: str, only: bytes = b"", times: int = 10**9) -> None:
        self.behave, self.only, self.times = behave, only, times

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.behave == "down" and not self.only:
                client.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
                )  # a reset, as a dead server's
                return
            while request := _message(client):
                self.requests.append(request)
                behaviour = self.behave if self.only in request and self.times > 0 else "pass"
                if behaviour != "pass":
                    self.times -= 1
                if behaviour == "down":
                    return
                if behaviour == "late":
                    time.sleep(2.5)
                with socket.create_connection((HOST, self.upstream)) as server:
                    server.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                    answer = b"".join(iter(lambda: server.recv(65536), b""))
                if behaviour == "lose":
                    return
                if behaviour == "slow":
                    time.sleep(1)
                client.sendall(answer[: len(answer) // 2] if behaviour == "cut" else answer)
                return  # one request a connection


def _message(client: socket.socket) -> bytes:
    """A whole HTTP request."""
    text = b""
    while b"\r\n\r\n" not in text:
        if not (part := client.recv(65536)):
            return b""
        text += part
    head, _, body = text.partition(b"\r\n\r\n")
    length = next((int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length:")), 0)
    while len(body) < length:
        body += client.recv(65536)
    return head + b"\r\n\r\n" + body
