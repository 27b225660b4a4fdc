"""transformers' GLM-5 with random weights, and the MTP layer put together from its parts.

Import this only where torch and transformers are installed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import (
    GlmMoeDsaDecoderLayer,
    GlmMoeDsaRMSNorm,
)

# transformers builds the latent norms with its class default, whatever the config says.
HF_LATENT_EPS = {"mla_norm_eps": 1e-6}


def hf_config(raw: Mapping[str, Any]) -> GlmMoeDsaConfig:
    keys = {key: value for key, value in raw.items() if key not in ("model_type", "dtype")}
    return GlmMoeDsaConfig(**keys, attn_implementation="eager", experts_implementation="eager")


def hf_model(raw: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> GlmMoeDsaForCausalLM:
    """transformers' model with the given weights, under published names, in float32."""
    model = GlmMoeDsaForCausalLM(hf_config(raw)).eval()
    load(model, weights)
    return model


def load(module: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Copies published tensors into a module; experts are fused there, gate above up."""
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, target in state.items():
        if name.endswith("inv_freq"):
            continue
        prefix, is_experts, part = name.rpartition("mlp.experts.")
        if is_experts:
            parts = ("gate", "up") if part == "gate_up_proj" else ("down",)
            stacked = [
                np.concatenate([weights[f"{prefix}mlp.experts.{e}.{p}_proj.weight"] for p in parts])
                for e in range(target.shape[0])
            ]
            values = np.stack(stacked)
        else:
            values = weights[name]
        assert target.shape == values.shape, name
        with torch.no_grad():
            target.copy_(torch.from_numpy(np.asarray(values, np.float32)))


def gradients(module: nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """The gradients of a module's parameters under published names, experts apart."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        gradient = parameter.grad.numpy()
        stem, is_experts, part = name.rpartition("mlp.experts.")
        if not is_experts:
            found[prefix + name] = gradient
            continue
        for expert, values in enumerate(gradient):
            parts = ("gate", "up") if part == "gate_up_proj" else ("down",)
            for kind, rows in zip(parts, np.split(values, len(parts)), strict=True):
                found[f"{prefix}{stem}mlp.experts.{expert}.{kind}_proj.weight"] = rows
    return found


class MtpLayer(nn.Module):
    """The MTP layer of the published checkpoints, which transformers leaves out."""

    def __init__(self, raw: Mapping[str, Any]):
        super().__init__()
        config = hf_config(raw)
        layers = config.num_hidden_layers
        # One more layer than the model has, for a layer is built by its number.
        config.indexer_types = [*config.indexer_types, "full"]
        config.mlp_layer_types = [*config.mlp_layer_types, "sparse"]
        dim, eps = raw["hidden_size"], raw["rms_norm_eps"]
        self.enorm = GlmMoeDsaRMSNorm(dim, eps)
        self.hnorm = GlmMoeDsaRMSNorm(dim, eps)
        self.eh_proj = nn.Linear(2 * dim, dim, bias=False)
        self.shared_head = nn.ModuleDict({"norm": GlmMoeDsaRMSNorm(dim, eps)})
        self.decoder = GlmMoeDsaDecoderLayer(config, layers)

    def load(self, raw: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> None:
        prefix = f"model.layers.{raw['num_hidden_layers']}."
        own = {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}
        heads = ("enorm.", "hnorm.", "eh_proj.", "shared_head.")
        load(self, {n if n.startswith(heads) else f"decoder.{n}": w for n, w in own.items()})

    def gradients(self, raw: Mapping[str, Any]) -> dict[str, np.ndarray]:
        found = gradients(self, f"model.layers.{raw['num_hidden_layers']}.")
        return {name.replace(".decoder.", "."): gradient for name, gradient in found.items()}

    def forward(self, model: GlmMoeDsaForCausalLM, hidden: Any, embedded: Any) -> Any:
        """Hidden states one token ahead; row i keeps position i."""
        joined = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        length = joined.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), torch.finfo(joined.dtype).min).triu(1)
        out, _ = self.decoder(
            joined,
            attention_mask=mask.expand(joined.shape[0], 1, length, length),
            position_ids=positions,
            position_embeddings=model.model.rotary_emb(joined, position_ids=positions),
        )
        return self.shared_head["norm"](out)


def mtp_hiddens(
    model: GlmMoeDsaForCausalLM, mtp: MtpLayer, tokens: torch.Tensor, depth: int
) -> list[torch.Tensor]:
    """Hidden states of the main model, then those of each depth, each one row shorter."""
    hiddens = [model.model(tokens).last_hidden_state]
    embedded = model.model.embed_tokens(tokens)
    for d in range(1, depth + 1):
        rows = tokens.shape[1] - d
        hiddens.append(mtp(model, hiddens[-1][:, :rows], embedded[:, d:]))
    return hiddens
