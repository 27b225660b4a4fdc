"""AdamW with warm-up and decay, and the rule that balances the experts."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from glm5_jax.params import ParamSpec
from train.loss import Loads, Objective
from train.settings import Settings

Params = dict[str, jax.Array]  # weights by path


def learning_rate(peak: float, final: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """The rate of every step: up in a line over the warm-up, then down in a cosine to the end."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=max(steps, warmup_steps + 1),
        end_value=final,
    )


class Recipe(NamedTuple):
    """How a run learns."""

    objective: Objective
    rate: optax.Schedule
    optimizer: optax.GradientTransformation


def make_recipe(specs: Mapping[str, ParamSpec], settings: Settings) -> Recipe:
    """What settings say of how to learn the given weights."""
    objective = Objective(
        mtp_depth=settings.mtp_depth,
        mtp_weight=settings.mtp_weight,
        index_weight=settings.index_weight,
    )
    rate = learning_rate(
        settings.learning_rate,
        settings.final_learning_rate,
        settings.warmup_steps,
        settings.steps,
    )
    optimizer = make_optimizer(specs, objective, rate, settings.weight_decay, settings.clip)
    return Recipe(objective, rate, optimizer)


def make_optimizer(
    specs: Mapping[str, ParamSpec],
    objective: Objective,
    rate: optax.Schedule,
    weight_decay: float,
    clip: float,
) -> optax.GradientTransformation:
    """AdamW over weights by path, after clipping the norm of all gradients together.

    Matrices are decayed, norms and biases are not. The routers' biases are left to `balance`, and
    weights that the objective does not move stay as they are: decay alone would wear them away.
    """
    by_label = {
        "matrix": optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=weight_decay),
        "vector": optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.0),
        "kept": optax.set_to_zero(),
    }
    labels = {
        path: _label(path, spec) if objective.moves(path) else "kept"
        for path, spec in specs.items()
    }
    return optax.chain(optax.clip_by_global_norm(clip), optax.partition(by_label, labels))


def _label(path: str, spec: ParamSpec) -> str:
    if path.endswith(_ROUTER_BIAS):
        return "kept"
    return "matrix" if spec.start == "normal" else "vector"


_ROUTER_BIAS = "mlp.router.bias"


def balance(params: Params, loads: Loads, objective: Objective, rate: float) -> Params:
    """Moves the bias of every expert up if it got less than the mean load, down if it got more.

    The loads are those of the whole batch, padding left out. Experts that the objective does not
    move are not balanced either.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
    """
    by_path = {
        f"segments.{number}.layers.{slot}.{_ROUTER_BIAS}": load
        for number, segment in enumerate(loads.segments)
        for slot, load in enumerate(segment)
    }
    by_path[f"mtp.block.{_ROUTER_BIAS}"] = loads.mtp_E
    moved = dict(params)
    for path, load in by_path.items():
        if load is not None and objective.moves(path):
            load = load.astype(jnp.float32)
            missing = jnp.mean(load, axis=-1, keepdims=True) - load
            moved[path] = params[path] + rate * jnp.sign(missing)
    return moved
