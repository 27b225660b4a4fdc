"""One decoder layer: wiring only."""

from typing import NamedTuple

import jax
from flax import nnx

from glm5_jax.attention import Attention
from glm5_jax.cache import Rows
from glm5_jax.config import Config
from glm5_jax.experts import Experts
from glm5_jax.indexer import Indexer, Selection
from glm5_jax.layers import LayerKind
from glm5_jax.mlp import Mlp
from glm5_jax.moe import Moe
from glm5_jax.norm import rms_norm
from glm5_jax.params import scale
from glm5_jax.places import Places
from glm5_jax.rope import Rotation


class Memory(NamedTuple):
    """What a layer sees of the tokens so far; index keys only where it has an indexer."""

    rows: Rows
    index_keys: Rows | None


class Setting(NamedTuple):
    """What is the same for every layer of a pass."""

    query_places: Places
    key_places: Places
    slot_BT: jax.Array | None  # where new rows go in the cache; None without a cache
    turn: Rotation


class Report(NamedTuple):
    """What can be observed of a layer."""

    load_E: jax.Array | None  # tokens per expert, int32; None for dense layers
    selection: Selection | None  # None where every visible token is attended to


class Block(nnx.Module):
    """Weights of one decoder layer, but for its routed experts."""

    def __init__(self, kind: LayerKind, config: Config):
        self.norm_eps = config.norm_eps
        self.attention_norm = scale("embed", config.dim)
        self.attention = Attention(config)
        self.indexer = Indexer(config) if kind.indexer == "full" else None
        self.mlp_norm = scale("embed", config.dim)
        self.mlp = Moe(config) if kind.mlp == "moe" else Mlp(config.dim, config.dense_ffn)

    def __call__(
        self,
        x_BTD: jax.Array,
        experts: Experts | None,
        first_expert: jax.Array,
        memory: Memory | None,
        selection: Selection | None,
        setting: Setting,
    ) -> tuple[jax.Array, Memory, Report]:
        """Applies the layer.

        Args:
          experts: the list that holds the layer's routed experts, from `first_expert` on.
          memory: of the tokens before these; None in a pass without a cache.
          selection: of the layer before; used if this layer has no indexer.

        Returns:
          BTD; the memory with these tokens in it; and a report, whose selection the next layer may
          need.
        """
        normed_BTD = rms_norm(x_BTD, self.attention_norm, self.norm_eps)
        latent_BTQ = self.attention.query_latent(normed_BTD)
        rows = _remember(
            None if memory is None else memory.rows,
            self.attention.rows(normed_BTD, setting.turn),
            setting.slot_BT,
        )
        index_keys = None
        if self.indexer is not None:
            index_keys = _remember(
                None if memory is None else memory.index_keys,
                self.indexer.keys(normed_BTD, setting.turn),
                setting.slot_BT,
            )
            selection = self.indexer.select(
                normed_BTD, latent_BTQ, index_keys, setting.turn, *setting[:2]
            )
        queries = self.attention.queries(latent_BTQ, setting.turn)
        x_BTD = x_BTD + self.attention.attend(queries, rows, *setting[:2], selection)

        normed_BTD = rms_norm(x_BTD, self.mlp_norm, self.norm_eps)
        load_E = None
        if isinstance(self.mlp, Moe):
            assert experts is not None
            real_BT = setting.query_places.real_BT
            out_BTD, load_E = self.mlp(normed_BTD, experts, first_expert, real_BT)
        else:
            out_BTD = self.mlp(normed_BTD)
        return x_BTD + out_BTD, Memory(rows, index_keys), Report(load_E, selection)


def _remember(rows: Rows | None, new_BTA: jax.Array, slot_BT: jax.Array | None) -> Rows:
    """Earlier rows with the new ones written among them; the new ones alone without a cache."""
    if rows is None or slot_BT is None:
        return Rows.of(new_BTA)
    return rows.written(new_BTA, slot_BT)
