import asyncio
import concurrent.futures
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading

import httpx2
import openai
import pytest

from glm5_jax.__main__ import main
from glm5_jax.inference.engine import Engine
from glm5_jax.server.limits import Limits
from tests.flags import xla_flags
from tests.serving import ENDLESS, NAME, events_of, serve, until, write_model

ENDLESS_TEXT = {"model": NAME, "prompt": "a", **ENDLESS}

ONE_DEVICE = {"XLA_FLAGS": xla_flags(1)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def is_free(served):
    return served.metric("glm5_running") == served.metric("glm5_waiting") == 0


def test_answers_are_the_same_alone_and_together(directory):
    def ask(number):
        options = {"model": NAME, "seed": number, "max_tokens": 10 + 10 * number}
        prompt = "a" * (1 + 20 * number)
        if number % 2:
            return client.completions.create(prompt=prompt, **options).choices[0].text
        messages = [{"role": "user", "content": prompt}]
        chunks = client.chat.completions.create(messages=messages, stream=True, **options)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with serve(directory, slots=4) as served, served.client() as client:
        alone = [ask(number) for number in range(8)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(8))) == alone
        assert len(set(alone)) == 8


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slots(directory, stream, path):
    body = {"model": NAME, "stream": stream, "n": 2, **ENDLESS}
    prompt = (
        {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "a"}
    )
    with serve(directory, slots=2) as served:
        with served.client() as client:  # once it is compiled, what is asked runs at once
            client.completions.create(**ENDLESS_TEXT | {"max_tokens": 4}, n=2)
        threading.Thread(target=leave, args=(f"{served.url}/v1/{path}", body | prompt)).start()
        until(lambda: served.metric("glm5_finished_total") == 4)
        assert is_free(served)
        assert 8 < served.metric("glm5_generated_tokens_total") < ENDLESS["max_tokens"]


def leave(url, body):
    """Asks, and goes away after a while."""
    with (
        contextlib.suppress(httpx2.ReadTimeout),
        httpx2.Client(timeout=3.0) as client,
        client.stream("POST", url, json=body) as response,
    ):
        for number, _ in enumerate(response.iter_lines()):
            if number == 20:
                return


def test_a_slot_is_free_once_a_stop_string_comes(directory):
    with serve(directory, slots=2) as served, served.client() as client:
        stop = ["a", "e", "1", " "]
        answer = client.completions.create(**ENDLESS_TEXT, stop=stop, n=2, seed=1)
        assert all(choice.finish_reason == "stop" for choice in answer.choices)
        assert not any(text in choice.text for choice in answer.choices for text in stop)
        until(lambda: is_free(served))


def test_an_answer_that_takes_too_long_is_an_error(directory):
    with serve(directory, limits=Limits(seconds=0.5)) as served:
        with served.client(max_retries=2) as client:
            with pytest.raises(openai.APIStatusError, match=r"not complete after 0\.5 s") as caught:
                client.completions.create(**ENDLESS_TEXT)
            assert (caught.value.status_code, caught.value.code) == (504, "timeout")
            with pytest.raises(openai.APIError, match=r"not complete after 0\.5 s"):
                for _ in client.completions.create(**ENDLESS_TEXT, stream=True):
                    pass
        # It was not asked for again.
        route = 'glm5_http_requests_total{route="/v1/completions",status="504"}'
        assert served.metric(route) == 1
        until(lambda: is_free(served))


def test_a_failure_of_the_engine_ends_the_server(directory, monkeypatch):
    def fail(engine):
        raise RuntimeError("out of memory")

    with serve(directory, slots=2) as served, served.client(max_retries=0) as client:
        stream = client.completions.create(**ENDLESS_TEXT, stream=True)
        next(iter(stream))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            whole = pool.submit(client.completions.create, **ENDLESS_TEXT)
            until(lambda: served.metric("glm5_running") == 2)
            monkeypatch.setattr(Engine, "step", fail)
            with pytest.raises(openai.APIError, match="the engine failed"):
                for _ in stream:
                    pass
            with pytest.raises(openai.InternalServerError, match="the engine failed"):
                whole.result(timeout=60)
        served.thread.join(60)
        [error] = served.errors
        assert "the engine failed" in str(error) and "out of memory" in str(error.__cause__)
        # Until the process is gone it says so, and takes nothing.
        assert asyncio.run(statuses(served.server.config.app)) == [503, 500]


async def statuses(app):
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        health = await client.get("/health")
        completion = await client.post("/v1/completions", json=ENDLESS_TEXT)
        return [health.status_code, completion.status_code]


@contextlib.contextmanager
def command(directory, *options, **environment):
    """A process of `glm5 serve`, and where it serves."""
    with subprocess.Popen(
        [sys.executable, "-m", "glm5_jax", "serve", "--model", str(directory)]
        + ["--port", "0", "--served-model-name", NAME, "--draft-tokens", "0", "--warm-up", "64"]
        + [*options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ONE_DEVICE | environment,
    ) as process:
        try:
            words = process.stdout.readline().split()
            assert words[:3] == ["serving", NAME, "at"]
            yield process, words[3]
        finally:
            process.kill()


def stream(url):
    body = ENDLESS_TEXT | {"stream": True}
    return httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end_and_takes_no_others(directory, number):
    with command(directory, "--drain-timeout", "120", GLM5_API_KEY="secret") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        wanted = ENDLESS_TEXT | {"max_tokens": 400}
        with client, client.completions.create(**wanted, stream=True) as stream:
            finish = [next(iter(stream)).choices[0].finish_reason]
            process.send_signal(number)
            until(lambda: httpx2.get(f"{url}/health").status_code == 503)
            with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
                client.completions.create(model=NAME, prompt="a")
            assert caught.value.status_code == 503
            finish += [chunk.choices[0].finish_reason for chunk in stream]
        assert finish[-1] == "length"
        output, error = process.communicate(timeout=60)
    assert (process.returncode, output, error) == (0, "", "")


@pytest.mark.slow
def test_answers_that_take_too_long_to_end_are_errors(directory):
    with command(directory, "--drain-timeout", "0.5") as (process, url):
        with stream(url) as r:
            lines = r.iter_text()
            text = next(lines)
            process.send_signal(signal.SIGTERM)
            text += "".join(lines)
        assert events_of(text)[-1]["error"]["code"] == "shutting_down"
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.slow
def test_a_second_signal_ends_at_once(directory):
    with command(directory) as (process, url), stream(url) as r:
        lines = r.iter_text()  # which would close the stream if it were not kept
        next(lines)
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx2.get(f"{url}/health").status_code == 503)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "65536"],
        ["--port", "-1"],
        ["--slots", "0"],
        ["--context", "0"],
        ["--draft-tokens", "-1"],
        ["--max-queue", "-1"],
        ["--max-body-bytes", "0"],
        ["--max-prompt-tokens", "0"],
        ["--max-messages", "0"],
        ["--max-choices", "0"],
        ["--request-timeout", "-1"],
        ["--drain-timeout", "-1"],
        ["--drain-timeout", "nan"],
        ["--colour", "red"],
    ],
)
def test_senseless_options_are_one_line(directory, capsys, options):
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--model", str(directory), *options])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--host", "nowhere.invalid"], "--host 'nowhere.invalid'"),
        (["--host", "192.0.2.1"], "--host '192.0.2.1'"),
        (["--api-key", ""], "--api-key is ''"),
        (["--api-key", "caf\xe9"], "--api-key is"),
        (["--context", "40000"], "--context is 40000, expected at most the model's 32768"),
        (["--mesh", "model=3"], "model=3"),
    ],
)
def test_what_cannot_be_served_is_one_line(directory, capsys, options, named):
    assert main(["serve", "--model", str(directory), "--port", "0", *options]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and named in output.err


def test_a_model_that_cannot_converse_is_served_with_a_notice(directory, capsys, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "model")
    (copy / "chat_template.jinja").unlink()
    assert main(["serve", "--model", str(copy), "--port", "0", "--mesh", "model=3"]) == 2
    said = "completions do not: the model has no chat_template.jinja"
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(directory, capsys):
    with serve(directory) as served:
        port = served.url.rpartition(":")[2]
        assert main(["serve", "--model", str(directory), "--port", port]) == 2
        assert f"--port {port}: " in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_named(directory, capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    for name in [name for name in sys.modules if name.startswith("glm5_jax.server.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["serve", "--model", str(directory)]) == 2
    assert f"glm5 serve needs {missing}: pip install" in capsys.readouterr().err
