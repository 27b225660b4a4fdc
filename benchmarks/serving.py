"""A server under load: throughput and latency by concurrency, then a long mixed soak.

`python -m benchmarks.serving --results benchmarks/results`.
"""

import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np
import openai

from benchmarks import arguments
from benchmarks.commands import add_model, prepare_for
from benchmarks.output import own_command, write_results
from train.data import Data

_CONCURRENCIES = (1, 2, 4, 8, 16, 32)
_SLOTS = 32
_SOAK, _CANCELLED, _MALFORMED = 500, 0.10, 0.05
_KINDS = 20  # of requests in the soak: each is known to have one answer
_MALFORMATIONS: tuple[dict[str, Any], ...] = (
    {"prompt": "x", "max_tokens": -1},
    {"prompt": "x", "colour": "blue"},
    {"prompt": []},
    {"prompt": [10**9]},
    {"prompt": "x", "temperature": "hot"},
    {"prompt": "word " * 5000, "max_tokens": 4000},
)


class Timed(NamedTuple):
    """One streamed answer."""

    first: float  # seconds until its first text
    gaps: list[float]  # seconds between pieces of text
    tokens: int
    text: str


@contextmanager
def serving(model: Path, *options: str) -> Iterator[tuple[str, int]]:
    """A `glm5 serve` process: its address and process id."""
    command = [sys.executable, "-m", "glm5_jax", "serve", "--model", str(model), "--port", "0"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at " not in line:
            raise SystemExit("the server did not start")
        yield line.split(" at ")[1].strip(), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise SystemExit(f"the server ended with status {process.returncode}")


def pick_prompts(folder: Path, count: int) -> list[list[int]]:
    """Pieces of the text that the model was not trained on, of 16 to 256 tokens."""
    tokens, draw = Data(folder).tokens("held_out"), random.Random(0)
    prompts = []
    for _ in range(count):
        length = draw.randint(16, 256)
        start = draw.randrange(len(tokens) - length)
        prompts.append(tokens.read(start, start + length).tolist())
    return prompts


def ask(
    client: openai.OpenAI, prompt: list[int], seed: int, until: int | None = None
) -> Timed | None:
    """Streams a completion; goes away after so many pieces, if told to."""
    begun = last = time.perf_counter()
    first, gaps, text, tokens = 0.0, [], "", 0
    stream = client.completions.create(
        model="bench",
        prompt=prompt,
        max_tokens=48,
        temperature=0.8,
        seed=seed,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        if not chunk.choices or not chunk.choices[0].text:
            continue
        now = time.perf_counter()
        if text:
            gaps.append(now - last)
        else:
            first = now - begun
        last, text = now, text + chunk.choices[0].text
        if until is not None and len(gaps) >= until:
            stream.close()
            return None
    return Timed(first, gaps, tokens, text)


def connect(url: str) -> openai.OpenAI:
    """A client that does not ask twice."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def measure(url: str, prompts: list[list[int]], concurrency: int) -> dict[str, Any]:
    """So many clients at a time, each with one request after the other."""
    begun = time.perf_counter()
    with connect(url) as client, ThreadPoolExecutor(concurrency) as threads:
        answers = threads.map(ask, [client] * len(prompts), prompts, range(len(prompts)))
        found = [timed for timed in answers if timed is not None]
    seconds = time.perf_counter() - begun
    tokens = sum(timed.tokens for timed in found)
    firsts = [timed.first for timed in found]
    per_token = [sum(timed.gaps) / max(1, timed.tokens - 1) for timed in found]
    row = {
        "concurrency": concurrency,
        "requests": len(found),
        "tokens_per_second": round(tokens / seconds, 1),
    }
    for name, values in (("first_token_ms", firsts), ("per_token_ms", per_token)):
        for percent in (50, 95, 99):
            row[f"{name}_p{percent}"] = round(1e3 * float(np.percentile(values, percent)), 1)
    return row


def soak(url: str, pid: int, prompts: list[list[int]]) -> dict[str, Any]:
    """Mixed requests, eight at a time; raises `SystemExit` if an answer is lost or mixed up."""
    draw, memory = random.Random(1), []
    plans = [(draw.randrange(_KINDS), draw.random(), draw.randrange(8)) for _ in range(_SOAK)]
    with connect(url) as client, ThreadPoolExecutor(8) as threads:
        expected = [ask(client, prompt, n) for n, prompt in enumerate(prompts[:_KINDS])]

        def do(number: int) -> str:
            kind, chance, until = plans[number]
            if number % 50 == 49:
                memory.append(_resident_mib(pid))
            if chance < _MALFORMED:
                return _refused(client, _MALFORMATIONS[until % len(_MALFORMATIONS)])
            leaves = chance < _MALFORMED + _CANCELLED
            answer = ask(client, prompts[kind], kind, until if leaves else None)
            if answer is None and leaves:
                return "cancelled"
            known = expected[kind]
            if answer is None or known is None or answer.text != known.text:
                raise SystemExit(f"request {number} was answered otherwise than alone")
            return "answered"

        counts = Counter(threads.map(do, range(_SOAK)))
    time.sleep(1)
    gauges = _gauges(url)
    if gauges["glm5_running"] or gauges["glm5_waiting"] or gauges["glm5_pages_held"]:
        raise SystemExit(f"slots or pages were not given back: {gauges}")
    return {"requests": _SOAK, **counts, "resident_mib": memory}


def _refused(client: openai.OpenAI, malformed: dict[str, Any]) -> str:
    body: Any = {"model": "bench", **malformed}
    try:
        client.post("/completions", body=body, cast_to=object)
    except openai.APIStatusError as error:
        if 400 <= error.status_code < 500:
            return "refused"
        raise SystemExit(f"{str(body)[:200]} ended in {error.status_code}") from None
    raise SystemExit(f"{str(body)[:200]} was not refused")


def _gauges(url: str) -> dict[str, float]:
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    pairs = [line.split() for line in lines if not line.startswith("#") and "{" not in line]
    return {name: float(value) for name, value in pairs}


def _resident_mib(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def draw_plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Throughput, and time to the first token and per token, by concurrency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    clients = [row["concurrency"] for row in rows]
    panels[0].plot(clients, [row["tokens_per_second"] for row in rows], "o-")
    panels[0].set_title("tokens per second, all clients")
    for panel, name, title in (
        (panels[1], "first_token_ms", "time to first token, ms"),
        (panels[2], "per_token_ms", "time per token, ms"),
    ):
        for percent in (50, 95, 99):
            panel.plot(
                clients, [row[f"{name}_p{percent}"] for row in rows], "o-", label=f"p{percent}"
            )
        panel.set_title(title)
        panel.legend()
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_xticks(clients, [str(each) for each in clients])
        panel.set_xlabel("clients at a time")
        panel.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)


def _num_asked(concurrency: int) -> int:
    return 4 * concurrency + 8


def run(model: Path, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Both parts, against one server."""
    fresh = iter(pick_prompts(folder, 128 + sum(map(_num_asked, _CONCURRENCIES))))
    prompts = list(itertools.islice(fresh, 128))
    with serving(model, "--slots", str(_SLOTS), "--served-model-name", "bench") as (url, pid):
        for concurrency in (_CONCURRENCIES[-1], 1):  # compiles what is needed
            measure(url, prompts[:32], concurrency)
        rows = []
        for concurrency in _CONCURRENCIES:
            # Others than before, lest their pages be found.
            asked = list(itertools.islice(fresh, _num_asked(concurrency)))
            rows.append(measure(url, asked, concurrency))
            print(json.dumps(rows[-1]), flush=True)
        found = soak(url, pid, prompts)
        print(json.dumps(found), flush=True)
    return rows, found


def main() -> int:
    """Measures, checks, prints and writes."""
    command_line = arguments.parser(__doc__)
    add_model(command_line)
    args = command_line.parse_args()
    prepare_for(args.model, args.data)
    rows, soaked = run(args.model, args.data)
    names = [name for name in rows[0] if name not in ("concurrency", "requests")]
    lines = [
        "| clients | " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|---|" + "---|" * len(names),
        *(
            f"| {row['concurrency']} | " + " | ".join(str(row[name]) for name in names) + " |"
            for row in rows
        ),
    ]
    memory = soaked["resident_mib"]
    growth = statistics.mean(memory[-3:]) / statistics.mean(memory[2:5]) - 1
    summary = (
        f"Soak: {soaked['requests']} requests, 8 at a time: {soaked['answered']} answered as "
        "alone, "
        f"{soaked['cancelled']} left by their clients, {soaked['refused']} malformed and refused. "
        f"No slot or page was lost. Memory of the server: {memory[2]} MiB after 150 requests, "
        f"{memory[-1]} MiB at the end ({growth:+.1%})."
    )
    print("\n".join([*lines, "", summary]))
    if args.results is not None:
        command = own_command("serving")
        write_results(args.results, "serving", command, [*rows, soaked], [*lines, "", summary])
        draw_plot(rows, args.results / "serving.png")
    return 1 if growth > 0.05 else 0


if __name__ == "__main__":
    arguments.run(main)
