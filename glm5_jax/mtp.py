"""The multi-token prediction layer."""

import jax
import jax.numpy as jnp
from flax import nnx

from glm5_jax.block import Block, Memory, Report, Setting
from glm5_jax.config import Config
from glm5_jax.experts import ExpertList, Experts
from glm5_jax.linear import project
from glm5_jax.norm import rms_norm
from glm5_jax.params import scale, weight
from glm5_jax.selection import Selection


class Mtp(nnx.Module):
    """Weights of the MTP layer; embedding and head are the main model's."""

    def __init__(self, config: Config):
        self.norm_eps = config.norm_eps
        self.embedding_norm = scale("norm", config.dim)
        self.hidden_norm = scale("norm", config.dim)
        self.join = weight("embed joined", config.dim, 2 * config.dim)
        self.block = Block(config.mtp_kind, config)
        self.experts = Experts(config)
        self.norm = scale("norm", config.dim)

    def __call__(
        self,
        hidden_BTD: jax.Array,
        embedded_BTD: jax.Array,
        experts: ExpertList,
        setting: Setting,
        memory: Memory | None = None,
        selection: Selection | None = None,
    ) -> tuple[jax.Array, Memory, Report]:
        """Moves hidden states one token ahead.

        Args:
          hidden_BTD: of the main model after its final norm, or of this layer one depth before.
          embedded_BTD: the embedding of the token that each row sees next.
          experts: this layer's own; as they are kept, or whole where they are stored in parts.
          memory: of the tokens before these; None in a pass without a cache.
          selection: what to attend to, if the setting has no indexer asked.

        Returns:
          Hidden states after the layer's own final norm, once: for the head and the next depth; the
          memory with these tokens in it; and the layer's report.

        Source: DeepSeek-V3, arXiv:2412.19437, equations 21 to 23. The published weights take the
        embedding first and the hidden state second, unlike equation 21.
        """
        parts = (
            rms_norm(embedded_BTD, self.embedding_norm, self.norm_eps),
            rms_norm(hidden_BTD, self.hidden_norm, self.norm_eps),
        )
        joined_BTD = project("BTJ,DJ->BTD", jnp.concatenate(parts, axis=-1), self.join)
        given = Selection() if selection is None else selection
        out_BTD, _, memory, report = self.block(joined_BTD, experts, memory, given, setting)
        return rms_norm(out_BTD, self.norm, self.norm_eps), memory, report
