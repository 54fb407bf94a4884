"""The fork server outlives those who ask it, as tests kill them at any moment."""

import json
import os
import socket

import pytest
from fork_server import ForkServer


@pytest.mark.parametrize("sent", [b"", b'{"role": '], ids=["nothing sent", "half sent"])
def test_whoever_is_killed_before_its_request_is_sent_stops_nothing(sent: bytes, fork_server: ForkServer) -> None:
    with socket.socket(socket.AF_UNIX) as killed, open(os.devnull) as file:
        killed.connect(fork_server.address)
        if sent:
            socket.send_fds(killed, [sent], [file.fileno()])
    with fork_server.ask({"role": "list"}) as talk, talk.makefile() as heard:
        assert isinstance(json.loads(heard.readline()), dict)
    assert fork_server.script("import sys; sys.exit(int(sys.argv[1]))", "7").wait() == 7
