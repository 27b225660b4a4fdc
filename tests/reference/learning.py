"""The losses of the three stages of training, in torch, around transformers' model.

Import this only where torch and transformers are installed.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import (
    GlmMoeDsaAttention,
    GlmMoeDsaIndexer,
    apply_rotary_pos_emb_interleave,
)


class Asked(NamedTuple):
    """An indexer, what it was given and what it chose."""

    indexer: GlmMoeDsaIndexer
    hidden: torch.Tensor
    latent: torch.Tensor
    turn: tuple[torch.Tensor, torch.Tensor]
    chosen: torch.Tensor


@contextlib.contextmanager
def watched(*modules: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """The divergence of the indexer that serves it, of every attention that is called, by query."""
    asked: list[Asked] = []
    found: list[torch.Tensor] = []

    def note(indexer: Any, given: Any, chosen: Any) -> None:
        hidden, latent, turn = given[:3]
        asked.append(Asked(indexer, hidden.detach(), latent.detach(), turn, chosen))

    def compare(_: Any, __: Any, output: Any) -> None:
        found.append(divergence(asked[-1], output[1].detach()))

    with contextlib.ExitStack() as stack:
        for part in (part for module in modules for part in module.modules()):
            if isinstance(part, GlmMoeDsaIndexer):
                stack.callback(part.register_forward_hook(note).remove)
            if isinstance(part, GlmMoeDsaAttention):
                stack.callback(part.register_forward_hook(compare).remove)
        yield found


def divergence(asked: Asked, paid: torch.Tensor) -> torch.Tensor:
    """KL(attention || indexer) over the tokens that each query attends to, BT.

    Args:
      paid: the attention, by head.
    """
    length = paid.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    chosen = torch.zeros(len(paid), length, length, dtype=torch.bool)
    chosen = chosen.scatter(-1, asked.chosen.long(), True) & causal
    share = paid.sum(dim=1)
    share = share / share.sum(dim=-1, keepdim=True)
    expected = scores(asked).masked_fill(~chosen, float("-inf")).log_softmax(dim=-1)
    expected = expected.masked_fill(~chosen, 0.0)
    return (torch.special.xlogy(share, share) - share * expected).sum(dim=-1)


def scores(asked: Asked) -> torch.Tensor:
    """`sum_i w_i relu(q_i . k)` of every query and token, with a gradient."""
    indexer, rope = asked.indexer, asked.indexer.qk_rope_head_dim
    heads, width = indexer.n_heads, indexer.head_dim
    query = indexer.wq_b(asked.latent).unflatten(-1, (heads, width))
    key = indexer.k_norm(indexer.wk(asked.hidden))[:, :, None]
    turned = apply_rotary_pos_emb_interleave(
        query[..., :rope], key[..., :rope], *asked.turn, unsqueeze_dim=2
    )
    query = torch.cat([turned[0], query[..., rope:]], dim=-1)
    key = torch.cat([turned[1], key[..., rope:]], dim=-1)[:, :, 0]
    gate = indexer.weights_proj(asked.hidden) * heads**-0.5 * width**-0.5
    return torch.einsum("bti,btis->bts", gate, torch.einsum("btij,bsj->btis", query, key).relu())
