"""One decoder layer: wiring only."""

import functools
from typing import NamedTuple

import jax
from flax import nnx

from glm5_jax.attention import Attention
from glm5_jax.cache import LayerCache, Rows
from glm5_jax.collectives import MODEL, share, spread, total
from glm5_jax.config import Config
from glm5_jax.experts import ExpertList
from glm5_jax.indexer import Indexer
from glm5_jax.layers import LayerKind
from glm5_jax.mlp import Mlp
from glm5_jax.moe import Moe, Routing
from glm5_jax.norm import rms_norm
from glm5_jax.params import scale
from glm5_jax.places import Places
from glm5_jax.rope import Rotation
from glm5_jax.selection import Recall, Selection, divergence
from glm5_jax.sharding import Rules


class Memory(NamedTuple):
    """What a layer sees of the tokens so far; index keys only where it has an indexer."""

    rows: Rows
    index_keys: Rows | None

    def stacks(self) -> LayerCache:
        """What is kept of it in the cache."""
        keys = self.index_keys
        return LayerCache(self.rows.stack_LYUA, None if keys is None else keys.stack_LYUA)


class Setting(NamedTuple):
    """What is the same for every layer of a pass."""

    query_places: Places
    key_places: Places
    slot_BT: jax.Array | None  # where new rows go in the cache; None without a cache
    turn: Rotation
    counted_BT: jax.Array  # True for tokens that have experts and count in reports
    teach_indexers: bool  # whether to report how far they are from the attention paid
    rules: Rules  # where weights are kept
    selects: bool = True  # whether indexers are asked, or all layers attend to what is given
    attend_to_all: bool = False  # whether to attend to all visible tokens, whatever is selected
    measure_recall: bool = False  # whether to report it


class Report(NamedTuple):
    """What can be observed of a layer, by one device of its part of the batch."""

    load_E: jax.Array | None  # counted tokens per expert, int32; None for dense layers
    routing: Routing | None  # the experts of each token; None for dense layers
    selection: Selection
    index_nats: jax.Array | None  # divergence of the indexer, summed over its counted queries
    # Of the selection that serves the layer; None unless asked for, or if all tokens are selected.
    recall: Recall | None


class Block(nnx.Module):
    """Weights of one decoder layer, but for its routed experts."""

    def __init__(self, kind: LayerKind, config: Config):
        self.norm_eps = config.norm_eps
        self.attention_norm = scale("norm", config.dim)
        self.attention = Attention(config)
        self.indexer = Indexer(config) if kind.indexer == "full" else None
        self.mlp_norm = scale("norm", config.dim)
        self.mlp = Moe(config) if kind.mlp == "moe" else Mlp(config.dim, config.dense_ffn)

    def __call__(
        self,
        x_BTD: jax.Array,
        experts: ExpertList | None,
        memory: Memory | None,
        selection: Selection,
        setting: Setting,
    ) -> tuple[jax.Array, ExpertList | None, Memory, Report]:
        """Applies the layer.

        Args:
          experts: the list that holds the layer's routed experts; None for dense layers.
          memory: of the tokens before these; None in a pass without a cache.
          selection: of the layer before; used if this layer asks no indexer.

        Returns:
          BTD; the experts as `weighted_experts` returns them; the memory with these tokens in it;
          and a report, whose selection the next layer may need.
        """
        turn, queries_at, keys_at = setting.turn, setting.query_places, setting.key_places
        normed_BTD = spread(rms_norm(x_BTD, self.attention_norm, self.norm_eps), (MODEL,))
        latent_BTQ = self.attention.query_latent(normed_BTD)
        rows = _remember(
            None if memory is None else memory.rows,
            self.attention.rows(normed_BTD, turn),
            setting.slot_BT,
        )
        index_keys = None if memory is None else memory.index_keys
        if self.indexer is not None and setting.selects:
            index_keys = _remember(index_keys, self.indexer.keys(normed_BTD, turn), setting.slot_BT)
            selection = self.indexer.select(
                normed_BTD, latent_BTQ, index_keys, turn, queries_at, keys_at
            )
            if setting.teach_indexers:
                log_share = self.indexer.log_share(
                    normed_BTD, latent_BTQ, turn, queries_at, selection
                )
                selection = selection._replace(log_share=log_share)
        attend = functools.partial(
            self.attention.attend,
            self.attention.queries(latent_BTQ, turn),
            rows,
            queries_at,
            keys_at,
            selection,
        )
        out_BTD, mass = attend(to_all=setting.attend_to_all, with_mass=setting.teach_indexers)
        index_nats = recall = None
        if mass is not None:
            index_nats = divergence(mass, selection, share(setting.counted_BT, (MODEL,), 1))
        if setting.measure_recall and selection.topk is not None:
            _, mass = attend(to_all=True, with_mass=True)
            assert mass is not None
            sees_more_BT = setting.counted_BT & (queries_at.position_BT >= selection.topk)
            share_BTK = mass / self.attention.config.num_heads
            recall = Recall.of(share_BTK, share(sees_more_BT, (MODEL,), 1))
        x_BTD = x_BTD + total(out_BTD, (MODEL,))

        normed_BTD = rms_norm(x_BTD, self.mlp_norm, self.norm_eps)
        load_E = routing = None
        if isinstance(self.mlp, Moe):
            assert experts is not None
            expert_axes = setting.rules.axes["experts"]
            out_BTD, experts, load_E, routing = self.mlp(
                normed_BTD, experts, setting.counted_BT, expert_axes
            )
        else:
            out_BTD = self.mlp(spread(normed_BTD, (MODEL,)))
        report = Report(load_E, routing, selection, index_nats, recall)
        x_BTD = x_BTD + total(out_BTD, (MODEL,))
        return x_BTD, experts, Memory(rows, index_keys), report


def _remember(rows: Rows | None, new_BTA: jax.Array, slot_BT: jax.Array | None) -> Rows:
    """Earlier rows with the new ones written among them; the new ones alone without a cache."""
    if rows is None or slot_BT is None:
        return Rows.of(new_BTA)
    return rows.written(new_BTA, slot_BT)
