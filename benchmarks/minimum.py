"""The least that a step of decoding must read and compute, by arithmetic on a config alone.

Each row of a batch reads one token. Every weight that some row needs is read once in the step, and
of the cache every index key and the selected rows; a product is two FLOPs for each multiply and
add, in the cheapest of the equal forms. What is merely written, and what stays on the chip, is
nothing; nor is there any communication.
"""

from typing import NamedTuple

from glm5_jax.config import Config
from glm5_jax.mesh import Sizes
from glm5_jax.model import Glm5
from glm5_jax.params import ParamSpec, leaf_dtype, leaves_by_path
from glm5_jax.plan.chips import Chip
from glm5_jax.quantization import SCHEMES
from glm5_jax.sharding import DECODE

# Bytes of a weight of a matrix that is kept in float8, with its part of a scale: the published
# blocks are of 128 x 128 weights, DeepSeek-V3, arXiv:2412.19437, section 3.3.2.
_FLOAT8 = 1 + 4 / 128**2
_PLAIN = 2  # bytes of a bfloat16, in which the rest of the model and the cache are


class Least(NamedTuple):
    """What all chips together must read, in bytes, and compute in one step."""

    weights: float
    index_keys: float
    rows: float  # of the latent cache, those selected
    flops: float

    @property
    def bytes(self) -> float:
        """All that is read."""
        return self.weights + self.index_keys + self.rows

    def seconds(self, chip: Chip, num_chips: int) -> float:
        """If all chips share it evenly, and memory and arithmetic never wait for each other."""
        reading = self.bytes / chip.hbm_bandwidth
        return max(reading, self.flops / chip.rate("bfloat16")) / num_chips


def least_of_decoding(config: Config, batch: int, context: int, *, float8: bool) -> Least:
    """A step of `batch` rows that see `context` tokens each.

    Args:
      float8: whether matrices are kept in it, all but the embedding, the head, routers and the
        gates of index heads, as published.
    """
    mla, indexer = config.mla, config.indexer
    full = sum(kind.indexer == "full" for kind in config.layers)
    kept, plain, active = _weights(config, batch)
    attended = min(context, indexer.topk)
    per_row = mla.row_dim + mla.kv_rank  # a score, and a sum of latents
    flops = 2.0 * batch * active
    flops += 2.0 * batch * config.num_layers * mla.num_heads * attended * per_row
    scored = context if context > indexer.topk else 0  # else all are selected unseen
    flops += 2.0 * batch * full * indexer.num_heads * scored * (indexer.head_dim + 1)
    return Least(
        weights=kept * (_FLOAT8 if float8 else _PLAIN) + plain * _PLAIN,
        index_keys=float(_PLAIN * batch * full * scored * indexer.head_dim),
        rows=float(_PLAIN * batch * config.num_layers * attended * mla.row_dim),
        flops=flops,
    )


def _weights(config: Config, batch: int) -> tuple[float, float, float]:
    """Weights that are read: in matrices that float8 keeps, and others; and a token's products."""
    mla, indexer, moe, dim = config.mla, config.indexer, config.moe, config.dim
    attention = dim * (mla.q_rank + mla.row_dim)
    attention += mla.num_heads * mla.q_rank * (mla.nope_dim + mla.rope_dim)
    attention += mla.num_heads * mla.kv_rank * (mla.nope_dim + mla.value_dim)
    attention += mla.num_heads * mla.value_dim * dim
    norms = 2 * dim + mla.q_rank + mla.kv_rank
    kept = plain = active = 0.0
    for kind in config.layers:
        kept, plain, active = kept + attention, plain + norms, active + attention
        if kind.indexer == "full":
            matrices = indexer.head_dim * (indexer.num_heads * mla.q_rank + dim)
            gates = indexer.num_heads * dim
            kept, plain = kept + matrices, plain + gates + 2 * indexer.head_dim
            active += matrices + gates
        if kind.mlp == "dense":
            kept, active = kept + 3 * dim * config.dense_ffn, active + 3 * dim * config.dense_ffn
        else:
            expert, router = 3 * dim * moe.ffn, dim * moe.num_experts
            experts = touched(moe.num_experts, moe.experts_per_token, batch)
            kept += (experts + moe.num_shared_experts) * expert
            active += (moe.experts_per_token + moe.num_shared_experts) * expert + router
            plain += router + 2 * moe.num_experts  # a bias is float32
    head = config.vocab_size * dim
    return kept, plain + dim + head + batch * dim, active + head


def touched(num_experts: int, experts_per_token: int, batch: int) -> float:
    """How many experts of a layer some row chooses, the mean if rows choose at random."""
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** batch)


def weights_as_laid_out(config: Config, sizes: Sizes, batch: int, *, float8: bool) -> float:
    """Bytes of weights that one device must read of those it keeps.

    More than its even share: the devices along `data` and `expert` keep the same weights, but for
    experts, and those along `model` some that are not divided.
    """
    share = touched(config.moe.num_experts, config.moe.experts_per_token, batch)
    share /= config.moe.num_experts

    def read(path: str, weight: ParamSpec) -> float:
        if path.startswith("mtp.") or path == "embedding":
            return 0.0
        in_float8 = float8 and SCHEMES["float8"].keeps(path, weight)
        each = _FLOAT8 if in_float8 else leaf_dtype(weight, "bfloat16").itemsize
        parts = 1
        for axes in DECODE.divisors(weight):
            for axis in axes:
                parts *= sizes[axis]
        return weight.size * each / parts * (share if ".experts." in f".{path}." else 1)

    looked_up = _PLAIN * config.dim * batch / (sizes["data"] * sizes["expert"])
    leaves = leaves_by_path(Glm5(config))
    return looked_up + sum(read(path, weight) for path, weight in leaves.items())
