"""The gated feed-forward network of dense layers and of the shared expert."""

import jax
from flax import nnx

from glm5_jax.linear import project, project_f32
from glm5_jax.params import weight


class Mlp(nnx.Module):
    """Weights of a SwiGLU feed-forward network. On a mesh a device has some of its width.

    Source: arXiv:2002.05202.
    """

    def __init__(self, dim: int, ffn: int):
        self.gate = weight("ffn embed", ffn, dim)
        self.up = weight("ffn embed", ffn, dim)
        self.down = weight("embed ffn", dim, ffn)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Applies this device's share of the width; the shares' outputs add up."""
        gate_BTF = project_f32("BTD,FD->BTF", x_BTD, self.gate)
        up_BTF = project_f32("BTD,FD->BTF", x_BTD, self.up)
        hidden_BTF = (jax.nn.silu(gate_BTF) * up_BTF).astype(x_BTD.dtype)
        return project("BTF,DF->BTD", hidden_BTF, self.down)
