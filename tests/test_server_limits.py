import http.client
import socket

import httpx2
import openai
import pytest

from glm5_jax.server.limits import Limits
from tests.serving import ENDLESS, NAME, assert_refused, post, serve, until, write_model

COMPLETION = {"model": NAME, "prompt": "a", "max_tokens": 4, "seed": 3}
LIMITS = Limits(body_bytes=100_000)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(directory):
    with serve(directory, limits=LIMITS) as served:
        yield served


@pytest.mark.parametrize("size", [LIMITS.body_bytes + 1, 50 * LIMITS.body_bytes])
def test_a_large_body_is_not_read_to_its_end(served, size):
    def endless():
        for _ in range(size // 1000 + 1):
            yield b" " * 1000

    for content in (b" " * size, endless()):
        assert_refused(post(served, "completions", content=content), 413, "100000 bytes")


def test_a_body_that_is_declared_too_large_is_not_waited_for(served):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: 99999999999\r\n\r\n"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "é"}])
def test_a_key_is_asked_for(directory, header):
    headers = {name: value.encode() for name, value in header.items()}
    with serve(directory, key="secret") as served:
        for path in ("models", f"models/{NAME}"):
            response = httpx2.get(f"{served.url}/v1/{path}", headers=headers)
            assert_refused(response, 401, "API key", "invalid_api_key")
        for path in ("completions", "chat/completions"):
            response = post(served, path, content=b"{", headers=headers)
            assert_refused(response, 401, "API key", "invalid_api_key")
        for path in ("", "health", "metrics"):
            assert httpx2.get(f"{served.url}/{path}").status_code == 200
        with served.client(api_key="secret") as client:
            assert client.models.list().data[0].id == NAME
            assert client.completions.create(**COMPLETION).choices[0].text


def test_other_names_than_its_own_are_refused_where_asked_for(directory):
    with serve(directory, hosts=frozenset({"localhost", "::1"})) as served:
        port = served.url.rpartition(":")[2]
        for host, status in (
            (f"localhost:{port}", 200),
            ("LOCALHOST", 200),
            (f"[::1]:{port}", 200),
            ("evil.example", 403),
            (f"localhost.evil.example:{port}", 403),
            ("", 403),
        ):
            response = httpx2.get(f"{served.url}/health", headers={"Host": host})
            assert response.status_code == status, host


def test_a_full_queue_is_told_and_room_comes_back(directory):
    with serve(directory, slots=1, limits=Limits(queue=1)) as served, served.client() as client:
        options = {"model": NAME, "prompt": "a", "stream": True, **ENDLESS}
        streams = [client.completions.create(**options)]
        next(iter(streams[0]))
        streams.append(client.completions.create(**options))
        until(lambda: served.metric("glm5_waiting") == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**COMPLETION)
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        with pytest.raises(openai.BadRequestError, match="3 continuations"):
            client.completions.create(**COMPLETION, n=3)
        for stream in streams:
            stream.close()
        until(lambda: served.metric("glm5_running") == served.metric("glm5_waiting") == 0)
        assert client.completions.create(**COMPLETION, n=2).usage.completion_tokens == 8


def test_what_is_no_http_is_survived(served):
    host, _, port = served.url.removeprefix("http://").partition(":")
    for data in (b"\x16\x03\x01\x00\xff" * 20, b"GET /" + b"a" * 200_000, b"\r\n\r\n"):
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.connect()
        connection.sock.sendall(data)
        connection.close()


def test_a_client_that_goes_away_while_it_asks_is_no_defect(served, capfd):
    host, _, port = served.url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"{")
    connection.close()
    gone = 'glm5_http_requests_total{route="/v1/completions",status="499"}'
    until(lambda: gone in httpx2.get(f"{served.url}/metrics").text)
    assert "Traceback" not in capfd.readouterr().err
