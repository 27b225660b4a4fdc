"""Bugs that other implementations of GLM-5 have had, put into this one: every one must fail a test.

Run by hand, `make mutants`; each mutant lives in a copy of the project.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("glm5_jax", "train", "convert", "tests", "benchmarks", "pyproject.toml")


class Mutant(NamedTuple):
    """One bug: a text of a file, what it becomes, and the tests that should notice."""

    name: str
    file: str
    text: str
    becomes: str
    tests: str


MUTANTS = [
    Mutant(
        "indexer rotates halves instead of pairs",
        "glm5_jax/indexer.py",
        "interleaved=self.config.rope_interleave",
        "interleaved=not self.config.rope_interleave",
        "tests/test_model.py tests/test_indexer.py",
    ),
    Mutant(
        "indexer rotates its last dimensions",
        "glm5_jax/indexer.py",
        "rope, rest = jnp.split(x, [self.rope_dim], axis=-1)",
        "rest, rope = jnp.split(x, [x.shape[-1] - self.rope_dim], axis=-1)",
        "tests/test_model.py tests/test_indexer.py",
    ),
    Mutant(
        "gradient of experts without that of the layers after",
        "glm5_jax/experts.py",
        "so_far = jax.tree.map(lambda d: d.astype(jnp.float32), d_taught)",
        "so_far = jax.tree.map(lambda d: jnp.zeros_like(d, jnp.float32), d_taught)",
        "tests/test_experts.py",
    ),
    Mutant(
        "RoPE's frequencies rounded otherwise",
        "glm5_jax/rope.py",
        "return np.float32(1) / power_P.astype(np.float32)",
        "return (1 / power_P).astype(np.float32)",
        "tests/test_rope.py",
    ),
    Mutant(
        "indexer without ReLU, few queries",
        "glm5_jax/indexer.py",
        "head_BSM = jax.nn.relu(_exact_dot(keys_BSJ, query_BMJ))",
        "head_BSM = _exact_dot(keys_BSJ, query_BMJ)",
        "tests/test_indexer.py",
    ),
    Mutant(
        "indexer without ReLU, many queries",
        "glm5_jax/indexer.py",
        "jax.nn.relu(_exact_dot(query_BTJ, keys_BSJ))",
        "_exact_dot(query_BTJ, keys_BSJ)",
        "tests/test_model.py tests/test_indexer.py",
    ),
    Mutant(
        "of equal scores the last are chosen, many queries",
        "glm5_jax/topk.py",
        "jnp.arange(num_columns - 1, -1, -1, dtype=jnp.int32)",
        "jnp.arange(num_columns, dtype=jnp.int32)",
        "tests/test_topk.py tests/test_indexer.py",
    ),
    Mutant(
        "query latent not normalised for the indexer",
        "glm5_jax/block.py",
        "normed_BTD, latent_BTQ, index_keys, turn, queries_at, keys_at",
        "normed_BTD, latent_BTQ / self.attention.q_norm, index_keys, turn, queries_at, keys_at",
        "tests/test_model.py",
    ),
    Mutant(
        "latent norms with another epsilon",
        "glm5_jax/attention.py",
        "rms_norm(latent_BTQ, self.q_norm, self.config.norm_eps)",
        "rms_norm(latent_BTQ, self.q_norm, 10 * self.config.norm_eps)",
        "tests/test_model.py",
    ),
    Mutant(
        "index keys with RMS norm",
        "glm5_jax/norm.py",
        "centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)",
        "centered = x32",
        "tests/test_model.py tests/test_norm.py",
    ),
    Mutant(
        "mask after top-k",
        "glm5_jax/indexer.py",
        "highest(masked_BTS, most)",
        "highest(scores_BTS, most)",
        "tests/test_model.py tests/test_indexer.py",
    ),
    Mutant(
        "invalid picks attended to",
        "glm5_jax/indexer.py",
        "return Selection(found.index_BTK, found.score_BTK > -jnp.inf)",
        "return Selection(found.index_BTK, jnp.ones_like(found.index_BTK, bool))",
        "tests/test_model.py tests/test_indexer.py",
    ),
    Mutant(
        "one token too few selected",
        "glm5_jax/indexer.py",
        "most = min(self.config.topk, slots.held)",
        "most = min(self.config.topk, slots.held) - 1",
        "tests/test_model.py",
    ),
    Mutant(
        "shared layers attend to everything",
        "glm5_jax/block.py",
        "            keys_at,\n            selection,\n        )\n        out_BTD",
        "            keys_at,\n            selection if self.indexer else Selection(),\n        )\n"
        "        out_BTD",
        "tests/test_model.py",
    ),
    Mutant(
        "offset of the sharing pattern counted from one",
        "glm5_jax/config_json.py",
        "max(i - offset + 1, 0) % period",
        "max(i - offset, 0) % period",
        "tests/test_config.py",
    ),
    Mutant(
        "gates take the bias in",
        "glm5_jax/moe.py",
        "gate_BTK = jnp.take_along_axis(scores_BTE, expert_BTK, axis=-1)",
        "gate_BTK = jnp.take_along_axis(ranked_BTE, expert_BTK, axis=-1)",
        "tests/test_moe.py tests/test_model.py",
    ),
    Mutant(
        "groups ruled out by zero",
        "glm5_jax/moe.py",
        "grouped_BTGE, -jnp.inf)",
        "grouped_BTGE, 0.0)",
        "tests/test_moe.py",
    ),
    Mutant(
        "shared expert scaled with the others",
        "glm5_jax/moe.py",
        "return routed_BTD + self.shared(x_BTD), experts",
        "return routed_BTD + 2.5 * self.shared(x_BTD), experts",
        "tests/test_model.py",
    ),
    Mutant(
        "MTP joins the hidden state first",
        "glm5_jax/mtp.py",
        "jnp.concatenate(parts, axis=-1)",
        "jnp.concatenate(parts[::-1], axis=-1)",
        "tests/test_mtp.py",
    ),
    Mutant(
        "MTP hands on hidden states before its norm",
        "glm5_jax/mtp.py",
        "return rms_norm(out_BTD, self.norm, self.norm_eps), memory, report",
        "return out_BTD, memory, report",
        "tests/test_mtp.py",
    ),
    Mutant(
        "MTP fed before the final norm",
        "glm5_jax/model.py",
        "hidden_BTD = rms_norm(x_BTD, model.norm, config.norm_eps)",
        "hidden_BTD = x_BTD",
        "tests/test_model.py tests/test_mtp.py",
    ),
    Mutant(
        "router bias rounded to bfloat16",
        "glm5_jax/moe.py",
        'pinned_dtype="float32"',
        "pinned_dtype=None",
        "tests/test_source.py tests/test_checkpoint.py",
    ),
    Mutant(
        "float8 divided by its scales",
        "glm5_jax/published/fp8.py",
        "astype(np.float32) * scale",
        "astype(np.float32) / scale",
        "tests/test_fp8.py",
    ),
    Mutant(
        "blocks of few bits that lie across each other's scales",
        "glm5_jax/quantized.py",
        "for size in (count, 1)]",
        "for size in (1, count)]",
        "tests/test_quantized.py",
    ),
    Mutant(
        "four bits without a sign",
        "glm5_jax/quantized.py",
        "return (values ^ 8) - 8",
        "return values",
        "tests/test_quantized.py",
    ),
    Mutant(
        "float8 heads that take the scale of the block before",
        "glm5_jax/quantization.py",
        "first = np.arange(count) * (shape[axis] // count)",
        "first = np.maximum(np.arange(count) * (shape[axis] // count) - 1, 0)",
        "tests/test_quantized.py",
    ),
    Mutant(
        "partial float8 blocks left out",
        "glm5_jax/published/fp8.py",
        "tuple(-(-size // BLOCK) for size in shape)",
        "tuple(size // BLOCK for size in shape)",
        "tests/test_fp8.py",
    ),
    Mutant(
        "packed documents see each other",
        "glm5_jax/places.py",
        "return same_BTS & past_BTS & queries.real_BT[:, :, None]",
        "return past_BTS & queries.real_BT[:, :, None]",
        "tests/test_places.py tests/test_model.py",
    ),
    Mutant(
        "decoding writes one slot too far",
        "glm5_jax/cache.py",
        "self.slots.slot(places.position_BT)",
        "self.slots.slot(places.position_BT + 1)",
        "tests/test_cache.py tests/test_model.py",
    ),
    Mutant(
        "router bias moved by the wrong sign",
        "train/optimizer.py",
        "params[path] + rate * jnp.sign(missing)",
        "params[path] - rate * jnp.sign(missing)",
        "tests/test_train.py",
    ),
    Mutant(
        "MTP losses shifted by one token too few",
        "train/loss.py",
        "            distance,\n            z_weight=",
        "            max(1, distance - 1),\n            z_weight=",
        "tests/test_stages_parity.py",
    ),
    Mutant(
        "microbatches that are means of their own tokens",
        "train/step.py",
        "                followed_D,\n",
        "                followed_D / microbatches,\n",
        "tests/test_accumulation.py",
    ),
    Mutant(
        "Muon that takes keys and values of a head for one matrix",
        "train/optimizer.py",
        "sizes=(config.mla.nope_dim, config.mla.value_dim)",
        "sizes=()",
        "tests/test_optimizer.py",
    ),
    Mutant(
        "attention of shards merged without regard to what each holds",
        "glm5_jax/attention.py",
        "part_BTN = jnp.exp(log_total_BTN - largest(log_total_BTN, axes))",
        "part_BTN = jnp.ones_like(log_total_BTN)",
        "tests/test_sharded.py -k text",
    ),
    Mutant(
        "slots of a shard counted from its own first",
        "glm5_jax/indexer.py",
        "found._replace(index_BTK=slots.position(found.index_BTK))",
        "found._replace(index_BTK=found.index_BTK)",
        "tests/test_sharded.py -k text",
    ),
    Mutant(
        "rows written by shards that do not hold their slot",
        "glm5_jax/slots.py",
        "is_here = (shard == shard_index(self.axes)) & (page >= 0) & (page < self.num_pages)",
        "is_here = (page >= 0) & (page < self.num_pages)",
        "tests/test_sharded.py -k text",
    ),
    Mutant(
        "experts of other devices taken for one's own",
        "glm5_jax/exchange.py",
        "jnp.where(kept_TK < 0, kept, kept_TK)",
        "jnp.abs(kept_TK)",
        "tests/test_exchange.py",
    ),
    Mutant(
        "every draft accepted",
        "glm5_jax/inference/steps.py",
        "is_alive_B & (token_B == expected_B)",
        "is_alive_B",
        "tests/test_engine.py -k distribution",
    ),
    Mutant(
        "drafts drawn from the model's noise for another token",
        "glm5_jax/inference/steps.py",
        "turn.count_B + ahead",
        "turn.count_B",
        "tests/test_engine.py -k fast",
    ),
    Mutant(
        "the MTP layer sees a row of the first token",
        "glm5_jax/model.py",
        "(keys_at.position_BT > 0).astype(jnp.int32)",
        "(keys_at.position_BT >= 0).astype(jnp.int32)",
        "tests/test_mtp.py",
    ),
    Mutant(
        "tokens written to pages that others see",
        "glm5_jax/cache.py",
        "is_new_BT &= places.position_BT >= self.writable_B[:, None]",
        "is_new_BT &= places.position_BT >= 0",
        "tests/test_cache.py",
    ),
    Mutant(
        "top-p keeps one token too many",
        "glm5_jax/inference/sampling.py",
        "reached_B >= target_B",
        "reached_B > target_B",
        "tests/test_sampling.py",
    ),
    Mutant(
        "pages found by what they hold and not by what came before",
        "glm5_jax/inference/pages.py",
        "hashlib.blake2b(before + filled, digest_size=16)",
        "hashlib.blake2b(filled, digest_size=16)",
        "tests/test_pages.py",
    ),
    Mutant(
        "a harmful step moves the weights",
        "train/step.py",
        "lambda after, before: jnp.where(is_taken, after, before),",
        "lambda after, before: after,",
        "tests/test_watch.py",
    ),
    Mutant(
        "a run that goes on reads its first rows again",
        "train/loop.py",
        "part.pipeline.read(stage.first_row(first))",
        "part.pipeline.read(stage.first_row(stage.first))",
        "tests/test_interruptions.py",
    ),
]


_CRASHES = ("AttributeError", "NameError", "SyntaxError", "TypeError")


def is_noticed(mutant: Mutant) -> bool:
    """Whether a test fails in a copy of the project that has the bug."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for part in COPIED:
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, copy / part)
        file = copy / mutant.file
        before = file.read_text()
        if before.count(mutant.text) != 1:
            raise SystemExit(f"{mutant.name}: its text is not once in {mutant.file}")
        file.write_text(before.replace(mutant.text, mutant.becomes))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", *mutant.tests.split()],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        print(f"{mutant.name}: {' '.join(failed) or 'not noticed'}"[:180], flush=True)
        if any(error in line for error in _CRASHES for line in failed):
            raise SystemExit(f"{mutant.name}: is no program that runs, let alone a bug")
        return done.returncode == 1


def main() -> int:
    """Tries the mutants whose names contain the words given; fails if one is not noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutants with one of these in their name")
    words = parser.parse_args().words
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    missed = [mutant.name for mutant in chosen if not is_noticed(mutant)]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutants noticed")
    for name in missed:
        print(f"not noticed: {name}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
