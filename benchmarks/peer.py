"""What is compared with: transformers' GLM-5, whose attention to few tokens is a mask over all."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.contest import Program
from benchmarks.workload import NUM_LAST, Work, remembered


class Setting(NamedTuple):
    """How transformers is told to compute."""

    attention: str = "eager"  # or sdpa
    experts: str = "eager"  # or grouped_mm, batched_mm
    compiled: bool = False  # by torch.compile

    def __str__(self) -> str:
        return f"{self.attention}, {self.experts}" + (", compiled" if self.compiled else "")


def settings(kind: str) -> list[Setting]:
    """Those that may be the fastest for a kind of work.

    batched_mm copies every token's experts, which for more than a few tokens takes tens of times
    as long; experts one by one (eager) leave torch.compile nothing whole to compile.
    """
    experts = ["eager", "grouped_mm", *(["batched_mm"] if kind == "decode" else [])]
    attentions = ["eager", "sdpa"]
    plain = [Setting(attention, each) for attention in attentions for each in experts]
    return plain + [
        Setting(attention, each, compiled=True) for attention in attentions for each in experts[1:]
    ]


def make(checkpoint: Path, work: Work, setting: Setting, ties_in_order: bool = False) -> Program:
    """A `contest.Maker`.

    The output is the logits of the last positions or of the tokens decoded; of gradients, the loss
    and their norm.

    Args:
      ties_in_order: whether the indexer is to select the first of tokens with equal scores, as
        this project's does; torch leaves open which.
    """
    import torch
    from transformers import GlmMoeDsaForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    calls = _take_ties_in_order() if ties_in_order else None
    model = GlmMoeDsaForCausalLM.from_pretrained(
        checkpoint,
        dtype=getattr(torch, work.dtype),
        attn_implementation=setting.attention,
        experts_implementation=setting.experts,
    ).eval()
    tokens = torch.from_numpy(work.tokens().astype(np.int64))
    run = torch.compile(model) if setting.compiled else model

    def prefill() -> np.ndarray:
        with torch.no_grad():
            output = run(tokens, use_cache=True, logits_to_keep=NUM_LAST)
        return output.logits.float().numpy()

    def gradient() -> Any:
        model.zero_grad()
        loss = run(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss

    def loss_and_norm() -> np.ndarray:
        loss = gradient().item()
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        return np.array([[loss], [torch.stack(squares).sum().sqrt().item()]])

    if work.kind == "prefill":
        program = Program(prefill, prefill)
    elif work.kind == "gradient":
        program = Program(gradient, loss_and_norm)
    else:
        program = _decode(model, run, tokens, work)
    if calls is None:
        return program

    def output() -> np.ndarray:
        found = program.output()
        if not calls:
            raise RuntimeError("the indexer asked no Tensor.topk, so that ties are in any order")
        return found

    return program._replace(output=output)


class _Highest(NamedTuple):
    values: Any
    indices: Any


def _take_ties_in_order() -> list[None]:
    """Has tensors' topk take the first of equal values; an entry for each call is added."""
    import torch

    calls: list[None] = []

    def topk(values: Any, k: int, dim: int = -1, **options: Any) -> _Highest:
        calls.append(None)
        return _first_of_equal(values, k, dim)

    torch.Tensor.topk = topk  # type: ignore[method-assign, assignment]
    return calls


def _first_of_equal(values: Any, k: int, dim: int = -1) -> _Highest:
    falling = values.sort(dim=dim, descending=True, stable=True)
    return _Highest(*(part.narrow(dim, 0, k) for part in falling))


def _decode(model: Any, run: Any, tokens: Any, work: Work) -> Program:
    """One token after so many, which are in the cache; each time the same, for the cache is cut."""
    import torch
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    rank = model.config.kv_lora_rank
    for layer, kind in enumerate(model.config.indexer_types):
        rows, keys = (torch.from_numpy(each).to(model.dtype) for each in remembered(work, layer))
        cache.update(rows[:, None, :, :rank], rows[:, None, :, rank:], layer)
        if kind == "full":
            cache.update_indexer(keys, layer)

    def decoded(token: Any) -> np.ndarray:
        with torch.no_grad():
            logits = run(token, past_key_values=cache, use_cache=True).logits[:, -1]
        for layer in cache.layers:
            layer.crop(-1)
        return logits.float().numpy()

    each = tokens.split(1, dim=1)
    return Program(
        lambda: decoded(each[0]), lambda: np.stack([decoded(token) for token in each], axis=1)
    )
