"""GLM-5: embedding, segments of layers, final norm and head."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from glm5_jax.bits import as_bits
from glm5_jax.block import Memory, Report, Setting
from glm5_jax.cache import KVCache, LayerCache
from glm5_jax.config import Config
from glm5_jax.experts import ExpertList
from glm5_jax.mtp import Mtp
from glm5_jax.norm import rms_norm
from glm5_jax.params import leaf_path, scale, weight
from glm5_jax.places import Places
from glm5_jax.rope import rotation
from glm5_jax.segment import Observe, Remat, Segment, rematerialised, run_segment
from glm5_jax.selection import Selection
from glm5_jax.sharding import DECODE, Rules, whole
from glm5_jax.vocabulary import look_up, scores


class Glm5(nnx.Module):
    """The whole model. `Glm5(config)` is a blueprint; `params` makes arrays of it."""

    def __init__(self, config: Config):
        self.config = config
        self.embedding = weight("vocab embed", config.vocab_size, config.dim)
        self.segments = nnx.List([Segment(plan, config) for plan in config.segments])
        self.norm = scale("norm", config.dim)
        self.head = weight("vocab embed", config.vocab_size, config.dim)
        self.mtp = Mtp(config) if config.num_mtp_layers else None


class Output(NamedTuple):
    """What a forward pass returns."""

    hidden_BTD: jax.Array  # after the final norm: for the head and for MTP
    cache: KVCache | None
    observed: tuple[tuple[Any, ...], ...]  # by segment and slot, stacked over the groups


def observe_load(report: Report) -> Any:
    """The default observation: how many tokens chose each expert."""
    return report.load_E


def forward(
    model: Glm5,
    tokens_BT: jax.Array,
    places: Places,
    cache: KVCache | None = None,
    *,
    rules: Rules = DECODE,
    remat: Remat = "none",
    teach_indexers: bool = False,
    attend_to_all: bool = False,
    measure_recall: bool = False,
    observe: Observe = observe_load,
) -> Output:
    """Runs all layers over a batch of tokens.

    On a mesh this runs inside a `jax.shard_map` over it (`Partition.on_shards`): arguments and
    results are one device's shards.

    Args:
      model: with arrays at its leaves, of one dtype but for those that are pinned to another.
      tokens_BT: ids; those of padding count for nothing.
      places: where the tokens stand. With a cache, the tokens of a row are of one sequence.
      cache: of earlier tokens; the new ones are stored in the cache that is returned. Those beyond
        its capacity are not stored, and then not seen. Routed experts have no gradient with it.
      rules: where weights are kept on a mesh.
      remat: what the gradient computes again instead of keeping it: "none"; "layers", all but the
        input of each group of layers; "products", all but that and products with weights.
      teach_indexers: whether layers report how far their indexers are from the attention paid. A
        shared layer reports that of the indexer it is served by, which thus learns from the mean
        attention of all its layers. Not with a cache.
      attend_to_all: whether layers attend to all visible tokens, whatever indexers select.
      measure_recall: whether layers report how much of the attention to all visible tokens, from
        the hidden states at hand, those get that their indexers select. Not with a cache.
      observe: what to return of every layer.

    Returns:
      The final hidden states, of which `logits` and `predict_ahead` make predictions, the cache,
      and the observations.

    Raises:
      ValueError: indexers are to be taught or measured with a cache, or the cache is of another
        dtype than the weights.
    """
    if cache is not None and (teach_indexers or measure_recall):
        raise ValueError("indexers are taught and measured without a cache")
    if cache is not None and cache.dtype != model.embedding.dtype:
        raise ValueError(
            f"the cache is of {cache.dtype}, expected the weights' {model.embedding.dtype}"
        )
    config = model.config
    setting = Setting(
        query_places=places,
        key_places=places if cache is None else cache.key_places(),
        slot_BT=None if cache is None else cache.write_slots(places),
        turn=rotation(places.position_BT, config.mla.rope_dim, config.rope_theta),
        counted_BT=places.real_BT,
        teach_indexers=teach_indexers,
        rules=rules,
        attend_to_all=attend_to_all,
        measure_recall=measure_recall,
    )
    batch, length = tokens_BT.shape
    num_slots = length if cache is None else cache.slots.everywhere
    selection = Selection.nothing(
        batch, length, num_slots, config.indexer.topk, with_share=teach_indexers
    )
    starts_shared = [plan.starts_shared for plan in config.segments] + [False]

    x_BTD = embed(model, tokens_BT, rules)
    segments: list[tuple[LayerCache, ...]] = []
    observed = []
    for number, segment in enumerate(model.segments):
        x_BTD, selection, segment_caches, seen = run_segment(
            segment,
            x_BTD,
            selection,
            None if cache is None else cache.pools.segments[number],
            setting,
            cache_dtype=x_BTD.dtype,
            page_BW=None if cache is None else cache.page_BW,
            carry_selection=starts_shared[number] or starts_shared[number + 1],
            remat=remat,
            observe=observe,
        )
        segments += [] if segment_caches is None else [segment_caches]
        observed.append(seen)
    if cache is not None:
        cache = cache.grown(places, tuple(segments))
    hidden_BTD = rms_norm(x_BTD, model.norm, config.norm_eps)
    return Output(hidden_BTD, cache, tuple(observed))


def embed(model: Glm5, tokens_BT: jax.Array, rules: Rules = DECODE) -> jax.Array:
    """The embeddings of tokens, BTD."""
    return look_up(whole(model.embedding, Glm5(model.config).embedding, rules), tokens_BT)


def logits(model: Glm5, hidden_BTD: jax.Array, rules: Rules = DECODE) -> jax.Array:
    """Scores of the next token, from hidden states of the model or its MTP layer.

    Returns:
      BTZ float32; on a mesh, of this device's share of the vocabulary.
    """
    head = whole(model.head, Glm5(model.config).head, rules, hidden_BTD.dtype)
    return scores(head, hidden_BTD)


def predict_ahead(
    model: Glm5,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    places: Places,
    depth: int,
    *,
    rules: Rules = DECODE,
    teach_indexers: bool = False,
    attend_to_all: bool = False,
    measure_recall: bool = False,
    remat: Remat = "none",
) -> list[tuple[jax.Array, Report]]:
    """Applies the MTP layer `depth` times, each time seeing one token further.

    Row i of depth d (from 1) predicts token i + 1 + d of the sequence. It is meaningful where token
    i + d is of the same sequence as token i; no such row sees one that is not, and only such rows
    count in the report. The tokens of a sequence must follow each other without padding between.

    Returns:
      For each depth the hidden states, of which `logits` makes predictions, and the MTP layer's
      report.

    Raises:
      ValueError: the model has no MTP layer.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.2, with one layer shared by all depths as in
    GLM-5, arXiv:2602.15763, section 2.1.
    """
    if model.mtp is None:
        raise ValueError("the model has no MTP layer")
    config = model.config
    turn = rotation(places.position_BT, config.mla.rope_dim, config.rope_theta)
    mtp = whole(model.mtp, Mtp(config), rules)
    predictions = []
    for distance in range(1, depth + 1):
        tokens_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
        setting = Setting(
            query_places=places,
            key_places=places,
            slot_BT=None,
            turn=turn,
            counted_BT=places.followed(distance),
            teach_indexers=teach_indexers,
            rules=rules,
            attend_to_all=attend_to_all,
            measure_recall=measure_recall,
        )

        def apply(
            mtp: Mtp, hidden_BTD: jax.Array, embedded_BTD: jax.Array, setting: Setting = setting
        ) -> tuple[jax.Array, Report]:
            experts = ExpertList.of(mtp.experts)
            hidden_BTD, _, report = mtp(hidden_BTD, embedded_BTD, experts, setting)
            return hidden_BTD, report

        layer = rematerialised(apply, remat, in_scan=False)
        hidden_BTD, report = layer(mtp, hidden_BTD, embed(model, tokens_BT, rules))
        predictions.append((hidden_BTD, report))
    return predictions


def read_ahead(
    model: Glm5,
    before_BTD: jax.Array,
    tokens_BT: jax.Array,
    places: Places,
    cache: KVCache,
    selection: Selection | None = None,
    *,
    rules: Rules = DECODE,
) -> tuple[jax.Array, KVCache, Selection]:
    """Applies the MTP layer to tokens, with a cache of its own.

    Where `predict_ahead` gives a row the position of its hidden state, here it has that of its
    token, one further: attention and indexer go by distances, so it comes to the same, and a row
    depends on nothing beyond its position. The first token of a sequence has no row.

    Args:
      before_BTD: the hidden state of the token before each: of the main model, or of this layer.
      places: of the tokens.
      selection: what to attend to; chosen by the layer's indexer unless given.

    Returns:
      Hidden states, of which `logits` makes predictions of the token after each; the cache, whose
      length stays that of the main model; and the selection.

    Raises:
      ValueError: the model or its cache has no MTP layer.
    """
    if model.mtp is None or cache.pools.mtp is None:
        raise ValueError("the model or its cache has no MTP layer")
    config, keys_at = model.config, cache.key_places()
    is_row_BT = places.real_BT & (places.position_BT > 0)
    places = Places(places.position_BT, is_row_BT.astype(jnp.int32))
    setting = Setting(
        query_places=places,
        key_places=Places(keys_at.position_BT, (keys_at.position_BT > 0).astype(jnp.int32)),
        slot_BT=cache.write_slots(places),
        turn=rotation(places.position_BT, config.mla.rope_dim, config.rope_theta),
        counted_BT=is_row_BT,
        teach_indexers=False,
        rules=rules,
        selects=selection is None,
    )
    memory = Memory(*cache.pools.mtp.memory(jnp.zeros((), jnp.int32), cache.dtype, cache.page_BW))
    mtp = whole(model.mtp, Mtp(config), rules, before_BTD.dtype)
    # As they are kept: those that are chosen are multiplied out or widened one by one.
    experts = ExpertList(model.mtp.experts, jnp.zeros((), jnp.int32), None)
    hidden_BTD, memory, report = mtp(
        before_BTD, embed(model, tokens_BT, rules), experts, setting, memory, selection
    )
    pools = cache.pools._replace(mtp=memory.stacks())
    return hidden_BTD, dataclasses.replace(cache, pools=pools), report.selection


def for_decoding(model: Glm5) -> Glm5:
    """The same model with the weights of its layers and its head held as bits (`bits.as_bits`)."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, w: w if leaf_path(keys) in ("embedding", "norm") else as_bits(w), model
    )
