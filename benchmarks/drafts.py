"""What drafting with the MTP layer gains: tokens per step of the model, and time.

`python -m benchmarks.drafts --results benchmarks/results`.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import arguments
from benchmarks.commands import add_model, prepare_for
from benchmarks.output import own_command, write_results
from glm5_jax.inference.engine import Engine
from glm5_jax.inference.request import Request, Sampling
from glm5_jax.inference.tokenizer import Tokenizer
from glm5_jax.load import load_model
from train.data import Data

_DRAFTS = (0, 1, 2, 3, 4)
_NEW_TOKENS, _PROMPTS, _ROUNDS = 96, 8, 3
_WAYS = {"greedy": Sampling(), "temperature 0.7": Sampling(temperature=0.7, top_p=0.95)}


def make_engines(directory: Path, counts: Sequence[int]) -> dict[int, Engine]:
    """Engines of a model, by the number of drafts."""
    num_tokens = Tokenizer(directory).num_tokens
    # In bfloat16 rounding would decide between tokens, and texts differ that are to be the same.
    model = load_model(directory, "float32")
    return {
        drafts: Engine(model, slots=1, context=1024, num_tokens=num_tokens, draft_tokens=drafts)
        for drafts in counts
    }


def code_prompts(data: Path, count: int = _PROMPTS) -> list[list[int]]:
    """Pieces of code that the model was not trained on."""
    tokens = Data(data).tokens("held_out")
    starts = np.linspace(0, len(tokens) - 200, count).astype(int)
    return [tokens.read(start, start + 128).tolist() for start in starts]


def json_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """The beginnings of lists of records."""
    prompts = []
    for number in range(_PROMPTS):
        records = [
            {"id": 100 * number + place, "name": f"item_{place}", "size": 3 * place, "valid": True}
            for place in range(5)
        ]
        text = json.dumps(records, indent=2)
        prompts.append(tokenizer.encode(text[:-3] + ",\n  {"))
    return prompts


def finish(
    engine: Engine, prompts: list[list[int]], way: Sampling
) -> tuple[list[list[int]], float]:
    """The texts, continued one after the other, and the seconds that took."""
    texts, begun = [], time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.submit(
            Request(prompt=tuple(prompt), max_new_tokens=_NEW_TOKENS, sampling=way, number=number)
        )
        events = []
        while not engine.is_idle:
            events += engine.step()
        texts.append([event.token for event in events])
    return texts, time.perf_counter() - begun


def tokens_per_step(
    engines: dict[int, Engine], prompts: list[list[int]], way: Sampling
) -> dict[int, float]:
    """By the number of drafts, how many tokens a step of the main model brings.

    Raises:
      SystemExit: the texts are not the same as without drafts.
    """
    plain = finish(engines[0], prompts, way)[0]
    gained = {}
    for drafts, engine in engines.items():
        before = engine.statistics()
        texts, _ = finish(engine, prompts, way)
        if texts != plain:
            raise SystemExit(f"the texts with {drafts} drafts are others than without")
        after = engine.statistics()
        steps = after.work.main_steps - before.work.main_steps
        gained[drafts] = (after.generated_tokens - before.generated_tokens) / steps
    return gained


def measure(
    engines: dict[int, Engine], prompts: list[list[int]], way: Sampling
) -> list[dict[str, Any]]:
    """Every number of drafts in turn, several times; the texts must be the same."""
    seconds: dict[int, list[float]] = {drafts: [] for drafts in engines}
    rows, gained = [], tokens_per_step(engines, prompts, way)
    for _ in range(_ROUNDS):
        for drafts, engine in engines.items():
            seconds[drafts].append(finish(engine, prompts, way)[1])
    base = statistics.median(seconds[0])
    for drafts in engines:
        median = statistics.median(seconds[drafts])
        rows.append(
            {
                "drafts": drafts,
                "tokens_per_step": round(gained[drafts], 2),
                "tokens_per_second": round(len(prompts) * _NEW_TOKENS / median, 1),
                "speedup": round(base / median, 2),
            }
        )
    return rows


def main() -> int:
    """Measures, prints and writes."""
    command_line = arguments.parser(__doc__)
    add_model(command_line)
    args = command_line.parse_args()
    prepare_for(args.model, args.data)
    tokenizer, engines = Tokenizer(args.model), make_engines(args.model, _DRAFTS)
    rows = []
    lines = [
        "| text | drawn | " + " | ".join(f"{drafts} drafts" for drafts in _DRAFTS) + " |",
        "|---|---|" + "---|" * len(_DRAFTS),
    ]
    for kind, prompts in (("code", code_prompts(args.data)), ("JSON", json_prompts(tokenizer))):
        for name, way in _WAYS.items():
            found = measure(engines, prompts, way)
            rows += [{"text": kind, "drawn": name, **row} for row in found]
            cells = [f"{row['tokens_per_step']:.2f} ({row['speedup']:.2f}x)" for row in found]
            lines.append(f"| {kind} | {name} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    title = (
        "Tokens per step of the main model, and speed against no drafts; the texts are the same."
    )
    print("\n".join([title, "", *lines]))
    if args.results is not None:
        command = own_command("drafts")
        write_results(args.results, "drafts", command, rows, [title, "", *lines])
    return 0


if __name__ == "__main__":
    arguments.run(main)
