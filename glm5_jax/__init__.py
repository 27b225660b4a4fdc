"""GLM-5 in JAX and Flax.

Arrays of activations end in their axes, `x_BTD`; capitals are logical axes, the same everywhere:

    B  batch                           T  query tokens        S  visible tokens, slots of a cache
    D  model width                     N  heads               Q  rank of the query latent
    C  rank of the key-value latent    H  unrotated key dim   R  rotated key dim
    X  a head's whole key, H + R       V  a head's value      A  a remembered row, C + R
    I  index heads                     J  index head dim      K  chosen tokens, or chosen experts
    E  experts                         F  feed-forward width  L  layers of a segment slot
    G  blocks of rows of one expert    M  rows of a block     P  pairs that rotate
    Z  vocabulary                      W  pages of a row      Y  pages of a pool
    U  slots of a page

The names below are the public interface; they are loaded when first used, so that commands can
answer `--help` without loading JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm5_jax.cache import KVCache as KVCache
    from glm5_jax.checkpoint import restore_checkpoint as restore_checkpoint
    from glm5_jax.checkpoint import save_checkpoint as save_checkpoint
    from glm5_jax.config import Config as Config
    from glm5_jax.errors import InputError as InputError
    from glm5_jax.inference.engine import Engine as Engine
    from glm5_jax.inference.generate import Generator as Generator
    from glm5_jax.inference.request import Request as Request
    from glm5_jax.inference.request import Sampling as Sampling
    from glm5_jax.load import load_model as load_model
    from glm5_jax.model import Glm5 as Glm5
    from glm5_jax.model import forward as forward
    from glm5_jax.model import logits as logits
    from glm5_jax.model import predict_ahead as predict_ahead
    from glm5_jax.params import abstract as abstract
    from glm5_jax.params import initialize as initialize
    from glm5_jax.places import Places as Places
    from glm5_jax.presets import load_preset as load_preset

_HOMES = {
    "Config": "config",
    "Engine": "inference.engine",
    "Generator": "inference.generate",
    "Glm5": "model",
    "InputError": "errors",
    "KVCache": "cache",
    "Places": "places",
    "Request": "inference.request",
    "Sampling": "inference.request",
    "abstract": "params",
    "forward": "model",
    "initialize": "params",
    "load_model": "load",
    "load_preset": "presets",
    "logits": "model",
    "predict_ahead": "model",
    "restore_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
