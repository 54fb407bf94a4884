"""Fixtures of the tests of commands."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@pytest.fixture
def fading_server() -> Iterator[str]:
    """The address of an MLflow server that answers once, that it has no experiments, and then with half an answer."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_first = not requests
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "2" if is_first else "100")
            self.end_headers()
            self.wfile.write(b"{}")
            self.close_connection = True

        do_POST = do_GET

        def log_message(self, *words: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
