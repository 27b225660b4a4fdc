"""Time per token as the context grows: one step of the engine, its cache filled at random."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.arguments import MISSED, parser, run
from benchmarks.output import write_results
from glm5_jax.config import Config
from glm5_jax.inference.sampling import Choices
from glm5_jax.inference.steps import (
    Build,
    State,
    Turn,
    compiled_steps,
    empty_state,
    page_size_for,
    table_width,
)
from glm5_jax.model import Glm5, for_decoding
from glm5_jax.params import initialize
from glm5_jax.presets import load_preset
from glm5_jax.sharding import on_one_device

_PRESETS = {"bench": "every layer has an indexer", "bench-shared": "one layer in four has one"}
_CONTEXTS = (1024, 4096, 16384, 65536)
_ROUNDS, _STEPS = 7, 8
# Largest ratio of the time at 64k to that at 4k.
_GOALS = {"bench": 2.5, "bench-shared": 1.5}


def prepare(config: Config, dtype: Any, batch: int, context: int) -> Callable[[], None]:
    """One step after so many tokens, compiled; it waits for the new tokens as the engine does."""
    build = Build(config, on_one_device(), jnp.dtype(dtype), config.vocab_size, num_drafts=0)
    page_size = page_size_for(build.partition)
    pages = -(-(context + 1) // page_size)
    model = _model(config, jnp.dtype(dtype))
    state = _filled(empty_state(build, batch, batch * pages, page_size))
    table = np.full((batch, table_width(pages)), batch * pages, np.int32)
    table[:, :pages] = np.random.default_rng(0).permutation(batch * pages).reshape(batch, pages)
    ones = np.ones(batch, np.int32)
    turn = Turn(
        token_BT=np.arange(batch, dtype=np.int32)[:, None],
        num_fresh_B=ones,
        length_B=ones * context,
        page_BW=table,
        active_B=ones > 0,
        count_B=ones,
        choices=Choices.of([None] * batch),
        wants_likelihood_B=ones < 1,
    )
    states = [state]

    def step() -> None:
        state, outcome = compiled_steps(build).advance(model, states.pop(), turn)
        np.asarray(outcome.token_BT)
        states.append(state)

    step()
    return step


@functools.cache
def _model(config: Config, dtype: Any) -> Glm5:
    blueprint = Glm5(config)
    draw = functools.partial(initialize, blueprint, dtype=dtype, std=config.init_std)
    weights = jax.jit(draw)(jax.random.key(0))
    return for_decoding(on_one_device().place(weights, blueprint))


def _filled(state: State) -> State:
    """With something in every slot; what it is does not change what a step costs."""

    def fill(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.uint16:
            bits = jax.random.normal(jax.random.key(1), leaf.shape, jnp.bfloat16)
            return jax.lax.bitcast_convert_type(bits, jnp.uint16)
        return jax.random.normal(jax.random.key(1), leaf.shape, leaf.dtype)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.pools)
    draw = jax.jit(lambda pools: jax.tree.map(fill, pools), out_shardings=shardings)
    return state._replace(pools=draw(state.pools))


def measure(preset: str, dtype: str, batch: int) -> list[dict[str, Any]]:
    """Milliseconds per step at every context: medians of rounds that take turns."""
    config = load_preset(preset).config
    steps = {context: prepare(config, dtype, batch, context) for context in _CONTEXTS}
    wall: dict[int, list[float]] = {context: [] for context in _CONTEXTS}
    processor: dict[int, list[float]] = {context: [] for context in _CONTEXTS}
    for _ in range(_ROUNDS):
        for context, step in steps.items():
            begun, used = time.perf_counter(), time.process_time()
            for _ in range(_STEPS):
                step()
            wall[context].append((time.perf_counter() - begun) / _STEPS)
            processor[context].append((time.process_time() - used) / _STEPS)
    return [
        {
            "preset": preset,
            "dtype": dtype,
            "batch": batch,
            "context": context,
            "milliseconds": round(1e3 * statistics.median(wall[context]), 2),
            "cpu_milliseconds": round(1e3 * statistics.median(processor[context]), 2),
            "tokens_per_second": round(batch / statistics.median(wall[context]), 1),
        }
        for context in _CONTEXTS
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; MISSED if time grows faster with the context than it should."""
    args = parser(__doc__).parse_args(arguments)
    rows, missed = [], False
    lines = [
        "| | dtype | rows | " + " | ".join(f"{c // 1024}k" for c in _CONTEXTS) + " | 64k / 4k |",
        "|---|---|---|" + "---|" * (len(_CONTEXTS) + 1),
    ]
    for preset, meaning in _PRESETS.items():
        for dtype, batch in (("float32", 1), ("float32", 8), ("bfloat16", 1)):
            found = measure(preset, dtype, batch)
            rows += found
            times = [row["milliseconds"] for row in found]
            ratio = times[-1] / times[1]
            missed |= batch == 1 and dtype == "float32" and ratio > _GOALS[preset]
            cells = " | ".join(f"{each:.1f}" for each in times)
            lines.append(f"| {meaning} | {dtype} | {batch} | {cells} | {ratio:.2f} |")
            print(lines[-1], flush=True)
    title = "Milliseconds per step of the engine by context, medians; every row gets a token."
    print("\n".join(lines))
    if args.results is not None:
        command = "python -m benchmarks.decode --results benchmarks/results"
        write_results(args.results, "decode", command, rows, [title, "", *lines])
    return MISSED if missed else 0


if __name__ == "__main__":
    run(main)
