"""How far this implementation is from transformers 5.23, on small models with random weights.

Every indexer selects 8 of 24 tokens, or its faults would not show. It has 32 heads: with fewer, the
scores of several tokens may all be zero, and among equal scores torch selects whichever it likes.
Needs the extra `parity`.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.arguments import parser
from benchmarks.arguments import run as run_main
from benchmarks.output import own_command, write_results
from glm5_jax.commands.arguments import integer
from glm5_jax.load import load_model
from glm5_jax.model import Glm5, forward, logits, predict_ahead
from glm5_jax.places import Places
from tests.reference import hf
from tests.tiny import (
    GROUPED,
    SHARED,
    TINY,
    WIDE,
    float8_weights,
    random_weights,
    write_published,
)

BATCH, LENGTH, DEPTH = 4, 24, 3
CASES = {
    "all layers with indexers": TINY,
    "shared indexers, as in GLM-5.2": SHARED,
    "mixed layers, router groups": GROUPED,
    "float8 weights": WIDE,
}


@jax.jit
def run(model: Glm5, tokens_BT: jax.Array) -> list[jax.Array]:
    """Logits of the next token and of every depth further ahead."""
    places = Places.unpadded(*tokens_BT.shape)
    hidden_BTD = forward(model, tokens_BT, places).hidden_BTD
    ahead = predict_ahead(model, hidden_BTD, tokens_BT, places, DEPTH)
    return [logits(model, hidden) for hidden in (hidden_BTD, *(hidden for hidden, _ in ahead))]


def measure(raw: dict[str, Any], seed: int) -> dict[str, float]:
    """The largest differences between logits of both implementations."""
    raw = raw | hf.HF_LATENT_EPS | {"index_n_heads": 32}
    weights = random_weights(raw, seed)
    published = weights
    if raw["hidden_size"] == WIDE["hidden_size"]:
        published, weights = float8_weights(weights)
    reference, mtp = hf.hf_model(raw, weights), hf.MtpLayer(raw)
    mtp.load(raw, weights)
    tokens = np.random.default_rng(seed).integers(2, raw["vocab_size"], (BATCH, LENGTH))
    with torch.no_grad():
        hiddens = hf.mtp_hiddens(reference, mtp.eval(), torch.as_tensor(tokens), DEPTH)
        expected = [reference.lm_head(hidden).numpy() for hidden in hiddens]
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(write_published(Path(folder), raw, published))
    actual = [np.asarray(x) for x in run(model, jnp.asarray(tokens))]
    gaps = [
        float(np.abs(ours[:, : theirs.shape[1]] - theirs).max())
        for ours, theirs in zip(actual, expected, strict=True)
    ]
    return {
        "logits": gaps[0],
        "mtp_logits": float(np.max(gaps[1:])),
        "size": float(np.abs(expected[0]).mean()),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes."""
    command_line = parser(__doc__)
    command_line.add_argument("--seeds", type=integer(1), default=5, help="how many models of each")
    args = command_line.parse_args(arguments)
    rows = []
    for name, raw in CASES.items():
        measured = [measure(raw, seed) for seed in range(args.seeds)]
        # numpy's, which tells of a NaN.
        row = {key: float(np.max([one[key] for one in measured])) for key in measured[0]}
        rows.append({"case": name, **row})
        print(f"{name}: {row}", flush=True)
    if args.results:
        command = own_command("parity", arguments)
        write_results(args.results, "parity", command, rows, _table(rows), "torch", "transformers")
    return 0


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = [
        "| model | logits, largest difference | MTP logits, depths 1 to 3 | mean size of a logit |",
        "|---|---|---|---|",
    ]
    return head + [
        f"| {row['case']} | {row['logits']:.1e} | {row['mtp_logits']:.1e} | {row['size']:.2f} |"
        for row in rows
    ]


if __name__ == "__main__":
    run_main(main)
