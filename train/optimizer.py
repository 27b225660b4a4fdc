"""How weights move: AdamW or Muon, their learning rate, and the rule that balances the experts."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from glm5_jax.config import Config
from glm5_jax.errors import InputError
from glm5_jax.model import Glm5
from glm5_jax.params import ParamSpec, leaves_by_path
from train.loss import Loads, Objective
from train.muon import Cut, muon
from train.settings import Settings

Params = dict[str, jax.Array]  # weights by path


def learning_rate(settings: Settings) -> optax.Schedule:
    """The rate of every step: up in a line over the warm-up, then down to the last step."""
    peak, final = settings.learning_rate, settings.final_learning_rate
    rise = optax.linear_schedule(0.0, peak, settings.warmup_steps)
    left = max(1, settings.steps - settings.warmup_steps)
    match settings.schedule:
        case "cosine":
            fall = optax.cosine_decay_schedule(peak, left, alpha=final / peak)
        case "linear":
            fall = optax.linear_schedule(peak, final, left)
        case "wsd":  # warm-up, stable, decay
            steps = min(left, round(settings.steps * settings.decay_part))
            fall = optax.linear_schedule(peak, final, steps, transition_begin=left - steps)
    return optax.join_schedules([rise, fall], [settings.warmup_steps])


class Recipe(NamedTuple):
    """How a stage learns. Schedules are functions of the number of steps taken in it."""

    objective: Objective
    learnt: tuple[str, ...]  # paths of the weights that gradients move
    rate: optax.Schedule
    optimizer: optax.GradientTransformation  # of the weights that are learnt, by path
    mtp_weight: optax.Schedule
    balance_rate: optax.Schedule
    average_decay: float  # 0: no average of the weights is kept
    spike: float  # standard deviations, as `Watch.is_usual` has them


def make_recipe(config: Config, settings: Settings) -> Recipe:
    """What settings say of how to learn a model's weights.

    Raises:
      InputError: it has none that would be learnt.
    """
    specs = leaves_by_path(Glm5(config))
    objective = Objective(
        stage=settings.stage,
        mtp_depth=settings.mtp_depth,
        mtp_weight=settings.mtp_weight,
        index_weight=settings.index_weight,
        balance_weight=settings.balance_weight,
        z_weight=settings.z_weight,
    )
    rate = learning_rate(settings)
    chosen = {path: specs[path] for path in learnt(specs, objective)}
    if not chosen:
        raise InputError(f"stage is {settings.stage}, which learns no weight of such a model")
    cuts = {
        "adamw": None,
        "muon": {},
        "muon_split": {path: cut for path in chosen if (cut := _cut(path, config)) is not None},
    }
    optimizer = make_optimizer(
        chosen, rate, settings.weight_decay, settings.clip, cuts[settings.optimizer]
    )

    def until(part: float, before: float, after: float) -> optax.Schedule:
        last = round(part * settings.steps)
        return lambda taken: jnp.where(taken < last, before, after)

    return Recipe(
        objective,
        tuple(chosen),
        rate,
        optimizer,
        until(settings.mtp_weight_part, settings.mtp_weight, settings.final_mtp_weight),
        until(settings.balance_part, settings.balance_rate, 0.0),
        settings.average_decay,
        settings.spike,
    )


def _cut(path: str, config: Config) -> Cut | None:
    """How Muon Split cuts a weight: the up-projections of queries, keys and values, by head."""
    if path.endswith("attention.q_up"):
        return Cut(by_head=True)
    if path.endswith("attention.kv_up"):
        return Cut(by_head=True, sizes=(config.mla.nope_dim, config.mla.value_dim))
    return None


def make_optimizer(
    specs: Mapping[str, ParamSpec],
    rate: optax.Schedule,
    weight_decay: float,
    clip: float,
    cuts: Mapping[str, Cut] | None = None,
) -> optax.GradientTransformation:
    """An optimizer of weights by path, after clipping the norm of all gradients together.

    Matrices are decayed, norms and biases are not.

    Args:
      cuts: what `muon` takes, for Muon on all matrices but those of the vocabulary; AdamW on all
        without it.
    """
    by_label = {
        "matrix": optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=weight_decay),
        "vector": optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.0),
    }
    if cuts is not None:
        by_label["muon"] = muon(specs, cuts, rate, weight_decay)

    def label(spec: ParamSpec) -> str:
        if spec.start != "normal":
            return "vector"
        return "matrix" if cuts is None or "vocab" in spec.axes else "muon"

    labels = {path: label(spec) for path, spec in specs.items()}
    return optax.chain(optax.clip_by_global_norm(clip), optax.partition(by_label, labels))


def learnt(specs: Mapping[str, ParamSpec], objective: Objective) -> list[str]:
    """The paths of the weights that gradients move.

    Others have no gradient and no state of the optimizer: weights that the objective does not move,
    which decay alone would wear away, and the routers' biases, which are left to `balance`.
    """
    return [path for path in specs if objective.moves(path) and not path.endswith(_ROUTER_BIAS)]


_ROUTER_BIAS = "mlp.router.bias"


def balance(
    params: Params, loads: Loads, objective: Objective, rate: jax.typing.ArrayLike
) -> Params:
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
