"""Checkpoints that a server of files has."""

import functools
import http.server
import re
import socket
import threading

import pytest

from convert.__main__ import main
from glm5_jax import remote
from tests.resuming.runs import params


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and parts of its files if it is to."""

    parts = True
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None or not self.parts:
            return super().do_GET()
        with open(self.translate_path(self.path), "rb") as file:
            file.seek(int(match[1]))
            data = file.read(int(match[2]) + 1 - int(match[1]))
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def served(source, monkeypatch):
    monkeypatch.setattr(remote, "_PAUSES", (0, 0))
    handler = functools.partial(Handler, directory=source)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.handle_error = lambda *_: None  # of clients that go before they have heard it all
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_checkpoint_is_read_over_http(served, native, tmp_path, capsys):
    url = f"http://somebody:secret@{served}"
    assert main(["from-hf", url, str(tmp_path / "x")]) == 0
    assert params(tmp_path / "x") == params(native)
    said = (tmp_path / "x" / "conversion.json").read_text() + "".join(capsys.readouterr())
    assert f'"http://{served}"' in said and "secret" not in said
    assert main(["check", f"http://{served}/nowhere"]) == 2
    expected = f"http://{served}/nowhere/config.json: no such file or directory\n"
    assert capsys.readouterr().err.endswith(expected)


def test_a_server_that_sends_no_parts_is_named(served, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Handler, "parts", False)
    assert main(["from-hf", f"http://{served}", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "doesn't appear to support range requests" in error


def test_a_server_that_cannot_be_reached_is_named(monkeypatch, capsys):
    monkeypatch.setattr(remote, "_PAUSES", (0, 0))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert main(["check", f"http://127.0.0.1:{port}/x"]) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 and f"http://127.0.0.1:{port}/x/params: Connect call failed" in error
    )
