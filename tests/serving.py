"""A tiny model with a tokenizer of bytes, and servers of it at real sockets."""

import contextlib
import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import openai
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Trained

from glm5_jax.inference.engine import Engine
from glm5_jax.inference.generation_config import usual_sampling
from glm5_jax.inference.reply import TAGS
from glm5_jax.inference.request import Request, Sampling
from glm5_jax.inference.tokenizer import Tokenizer
from glm5_jax.server.limits import Limits
from glm5_jax.server.metrics import Metrics
from glm5_jax.server.run import Server, listening_socket
from glm5_jax.server.service import Service
from glm5_jax.server.worker import Worker
from tests.tiny import TINY, random_model, random_weights, write_published

CONTEXT = 32768  # long enough that no answer ends by itself while a test looks at it
RAW = TINY | {
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "indexer_types": ["full", "full"],
    "mlp_layer_types": ["dense", "sparse"],
    "max_position_embeddings": CONTEXT,
    "eos_token_id": [256],
}
NAME = "tiny/glm"
USUAL = Limits()
STOP = frozenset(RAW["eos_token_id"])
ENDLESS = {"logit_bias": {str(token): -100 for token in STOP}, "max_tokens": 30000}
TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message.role }}: {{ message.content }}"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "<|assistant|>{% if enable_thinking %}<think>{% endif %}{{ reasoning_effort }}"
)


def write_model(directory: Path) -> Path:
    """A published directory with all that a server needs."""
    write_published(directory, RAW, random_weights(RAW))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Trained(models.BPE({character: n for n, character in enumerate(alphabet)}, []))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.decoder = decoders.ByteLevel()
    trained.add_special_tokens(["<|endoftext|>", "<|user|>", "<|assistant|>"])
    trained.add_tokens([AddedToken(tag, special=False) for tag in sorted(TAGS)])
    trained.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def direct(tokenizer):
    """What the engine gives for a request that it is asked directly."""
    engine = Engine(random_model(RAW), num_tokens=tokenizer.num_tokens)

    def generate(prompt, max_tokens=12, *, number=0, alternatives=None, **sampling):
        prompt = tokenizer.encode(prompt, special=False) if isinstance(prompt, str) else prompt
        engine.submit(
            Request(
                prompt=tuple(prompt),
                max_new_tokens=max_tokens,
                sampling=Sampling(**({"temperature": 1.0} | sampling)),
                number=number,
                stop=STOP,
                alternatives=alternatives,
            )
        )
        events = []
        while not engine.is_idle:
            events += engine.step()
        return events

    return generate


def text_of(events, tokenizer):
    return tokenizer.decode([event.token for event in events if event.token not in STOP])


@dataclasses.dataclass
class Served:
    """A server that runs in a thread."""

    url: str
    server: Server
    service: Service
    engine: Engine
    thread: threading.Thread
    errors: list[BaseException]

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **({"api_key": "none", "max_retries": 0} | options)
        )

    def metric(self, name: str) -> float:
        """A number that `/metrics` shows."""
        lines = httpx2.get(f"{self.url}/metrics").text.splitlines()
        [value] = [line.split()[-1] for line in lines if line.split()[0] == name]
        return float(value)


@contextlib.contextmanager
def serve(directory: Path, *, slots=8, draft_tokens=0, context=CONTEXT, limits=USUAL, **options):
    """Serves the model of `write_model`, with fields of `Service`."""
    tokenizer = Tokenizer(directory)
    engine = Engine(
        random_model(RAW),
        slots=slots,
        context=context,
        num_tokens=tokenizer.num_tokens,
        draft_tokens=draft_tokens,
    )
    metrics = Metrics(engine.statistics())
    fields = {
        "worker": Worker(engine, limits.queue, metrics),
        "metrics": metrics,
        "tokenizer": tokenizer,
        "name": NAME,
        "stop": STOP,
        "defaults": usual_sampling(directory),
        "limits": limits,
    }
    service = Service(**(fields | options))
    ready, errors = threading.Event(), []
    server = Server(service, ready.set)
    bound = listening_socket("127.0.0.1", 0)

    def run() -> None:
        try:
            server.run([bound])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    thread.start()
    try:
        assert ready.wait(60)
        yield Served(url, server, service, engine, thread, errors)
    finally:
        server.should_exit = True
        thread.join()


def until(condition, seconds=30.0):
    """Waits for something that happens soon."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def events_of(text: str) -> list[Any]:
    """What the server-sent events of a stream carry, up to its end."""
    *events, last, rest = text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def post(served, path, **content):
    return httpx2.post(f"{served.url}/v1/{path}", timeout=60, **content)


def assert_refused(response, status, named, code=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    kind = {429: "rate_limit_error"}.get(status, "invalid_request_error")
    assert error["type"] == (kind if status < 500 else "server_error")
    assert named in error["message"] and "\n" not in error["message"]
    assert code is None or error["code"] == code
