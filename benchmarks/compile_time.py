"""Time to trace and compile a model of 78 layers against one of 8, at tiny width.

Layers of one segment are a scan, whose body is compiled once however often it runs; so both should
take about the same. Not quite in the pattern of GLM-5.2: 78 layers repeat a group of four of which
8 layers have only two, so that 6 bodies stand against 4.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.arguments import MISSED, parser, run
from benchmarks.output import own_command, write_results
from glm5_jax.cache import KVCache
from glm5_jax.config import Config
from glm5_jax.config_json import parse_config
from glm5_jax.model import Glm5, forward, logits
from glm5_jax.params import abstract
from glm5_jax.places import Places
from glm5_jax.presets import load_preset

BATCH, LENGTH, CONTEXT = 2, 256, 1024
LAYERS = (8, 78)
_LARGEST_RATIO = 1.2
PATTERNS = {
    "glm-5": {"first_k_dense_replace": 3},
    "glm-5.2": {
        "first_k_dense_replace": 3,
        "index_topk_freq": 4,
        "index_skip_topk_offset": 3,
    },
}


def tiny(pattern: str, num_layers: int) -> Config:
    """The demo's sizes with another number of layers, in the pattern of a published model."""
    raw = {
        key: value
        for key, value in load_preset("demo").raw.items()
        if key not in ("indexer_types", "mlp_layer_types")
    }
    return parse_config(raw | {"num_hidden_layers": num_layers, **PATTERNS[pattern]}).config


def programs(config: Config) -> dict[str, Any]:
    """Each program with the shapes of its arguments."""
    model = abstract(Glm5(config))
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    token = jax.ShapeDtypeStruct((BATCH, 1), jnp.int32)
    cache = jax.eval_shape(lambda: KVCache.create(config, BATCH, CONTEXT, jnp.float32))

    def predict(model: Glm5, tokens: jax.Array) -> jax.Array:
        return logits(model, forward(model, tokens, Places.unpadded(BATCH, LENGTH)).hidden_BTD)

    def loss(model: Glm5, tokens: jax.Array) -> jax.Array:
        return jnp.mean(predict(model, tokens))

    def decode(model: Glm5, cache: KVCache, token: jax.Array) -> Any:
        places = cache.next_places(jnp.ones(BATCH, jnp.int32), 1)
        output = forward(model, token, places, cache)
        return logits(model, output.hidden_BTD), output.cache

    return {
        "forward": (jax.jit(predict), (model, tokens)),
        "gradient": (jax.jit(jax.grad(loss)), (model, tokens)),
        "decode": (jax.jit(decode, donate_argnums=1), (model, cache, token)),
    }


def measure(pattern: str, num_layers: int, name: str) -> float:
    """Seconds to trace, lower and compile one program, from nothing."""
    jax.clear_caches()
    function, arguments = programs(tiny(pattern, num_layers))[name]
    began = time.perf_counter()
    function.lower(*arguments).compile()
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; MISSED if more layers take much longer."""
    args = parser(__doc__, default_repeats=3).parse_args(arguments)
    jax.config.update("jax_enable_compilation_cache", False)  # a user may have one on disk
    rows: list[dict[str, Any]] = []
    for pattern in PATTERNS:
        for name in ("forward", "gradient", "decode"):
            seconds: dict[int, list[float]] = {count: [] for count in LAYERS}
            for _ in range(args.repeats):  # A B A B
                for count in LAYERS:
                    seconds[count].append(measure(pattern, count, name))
            few, many = (statistics.median(seconds[count]) for count in LAYERS)
            rows.append(
                {"pattern": pattern, "program": name, "seconds": seconds, "ratio": many / few}
            )
            print(
                f"{pattern} {name}: {few:.1f} s, {many:.1f} s, ratio {many / few:.2f}", flush=True
            )
    if args.results:
        command = own_command("compile_time", arguments)
        write_results(args.results, "compile_time", command, rows, _table(rows))
    return MISSED if any(row["ratio"] > _LARGEST_RATIO for row in rows) else 0


def _table(rows: list[dict[str, Any]]) -> list[str]:
    median = statistics.median
    head = [
        "| layers like | program | 8 layers, s | 78 layers, s | ratio | at most |",
        "|---|---|---|---|---|---|",
    ]
    return head + [
        f"| {row['pattern']} | {row['program']} | {median(row['seconds'][8]):.1f} | "
        f"{median(row['seconds'][78]):.1f} | {row['ratio']:.2f} | {_LARGEST_RATIO} |"
        for row in rows
    ]


if __name__ == "__main__":
    run(main)
