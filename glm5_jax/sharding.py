"""Which axis of the mesh divides which axis of every weight: one table for each job."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm5_jax.bits import from_bits
from glm5_jax.collectives import BATCH, EXPERT, MODEL, Axes, gathered, num_shards
from glm5_jax.errors import InputError
from glm5_jax.mesh import Sizes, choose_mesh, parse_mesh, single_device
from glm5_jax.params import ParamSpec, is_spec, map_specs
from glm5_jax.quantized import Quantized, is_quantized, multiplied_out, repeated

Tree = TypeVar("Tree")


class Rules(NamedTuple):
    """Where weights are kept.

    A mesh axis divides one axis of a weight: the first that asks for it.
    """

    axes: Mapping[str, Axes]  # by logical axis
    # Logical axes that are divided to save memory only: a layer's weights are gathered along them
    # where they are used.
    stored: frozenset[str] = frozenset()

    def divisors(self, weight: ParamSpec) -> list[Axes]:
        """The mesh axes that divide each axis of a weight."""
        taken: set[str] = set()
        by_dim = []
        for name in weight.axes:
            free = tuple(axis for axis in self.axes[name] if axis not in taken)
            taken.update(free)
            by_dim.append(free)
        return by_dim

    def spec(self, weight: ParamSpec) -> PartitionSpec:
        """The same as JAX wants it."""
        return PartitionSpec(*(axes or None for axes in self.divisors(weight)))


# Each device keeps what it computes with; experts are spread over all that batches are.
DECODE = Rules(
    {
        "vocab": (MODEL,),
        "heads": (MODEL,),
        "ffn": (MODEL,),
        "q_latent": (MODEL,),
        "index_heads": (MODEL,),
        "experts": BATCH,
        "layers": (),
        "embed": (),
        "q_rank": (),
        "kv_rank": (),
        "kv_row": (),
        "head_dim": (),
        "index_dim": (),
        "index_gates": (),
        "routes": (),
        "joined": (),
        "norm": (),
    }
)
# Matrices and what the optimizer keeps of them are divided over all devices (FSDP, ZeRO-3).
TRAIN = Rules(
    {
        **DECODE.axes,
        "experts": (EXPERT,),
        "embed": BATCH,
        "q_rank": BATCH,
        "kv_rank": BATCH,
    },
    stored=frozenset({"embed", "q_rank", "kv_rank"}),
)

# How the rows of a batch lie on the devices.
ROWS = PartitionSpec(BATCH)

# What a logical axis is called in `config.json`.
_SIZES = {
    "vocab": "vocab_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size or moe_intermediate_size",
    "q_latent": "q_lora_rank",
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "index_heads": "index_n_heads",
    "experts": "n_routed_experts",
    "embed": "hidden_size",
}


def whole(
    shards: Tree, blueprint: Tree, rules: Rules, dtype: jax.typing.DTypeLike | None = None
) -> Tree:
    """A layer's weights as they are computed with: multiplied out if they are kept in few bits, and
    gathered along the axes that are only stored.

    Args:
      dtype: of weights that are held as bits.
    """

    def gather(weight: ParamSpec, kept: jax.Array | Quantized) -> jax.Array:
        shard = multiplied_out(kept)
        if dtype is not None:
            shard = from_bits(shard, dtype)
        for dim, (name, axes) in enumerate(zip(weight.axes, rules.divisors(weight), strict=True)):
            if name in rules.stored:
                shard = gathered(shard, axes, dim)
        return shard

    return jax.tree.map(gather, blueprint, shards, is_leaf=is_spec)


def is_whole(shards: Tree, blueprint: Tree, rules: Rules) -> bool:
    """Whether `whole` returns the weights as they are, but for bits."""

    def is_kept_whole(weight: ParamSpec, kept: jax.Array | Quantized) -> bool:
        divisors = zip(weight.axes, rules.divisors(weight), strict=True)
        return not is_quantized(kept) and all(
            name not in rules.stored or num_shards(axes) == 1 for name, axes in divisors
        )

    kept = jax.tree.map(is_kept_whole, blueprint, shards, is_leaf=is_spec)
    return all(jax.tree.leaves(kept))


@dataclasses.dataclass(frozen=True, eq=False)
class Partition:
    """A mesh, and the rules by which weights are kept on it."""

    mesh: Mesh
    rules: Rules

    @property
    def platform(self) -> str:
        """The kind of device: cpu, gpu or tpu."""
        return str(self.mesh.devices.flat[0].platform)

    def num_shards(self, axes: Axes) -> int:
        """Into how many shards the axes divide what they shard."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def specs(self, blueprint: Tree) -> Tree:
        """The mesh axes that divide each weight."""
        return map_specs(lambda _, weight: self.rules.spec(weight), blueprint)

    def sharding(self, weight: ParamSpec) -> NamedSharding:
        """How a weight lies on the devices."""
        return NamedSharding(self.mesh, self.rules.spec(weight))

    def shardings(self, blueprint: Tree) -> Tree:
        """How all weights lie on the devices."""
        return map_specs(lambda _, weight: self.sharding(weight), blueprint)

    def place(self, model: Tree, blueprint: Tree) -> Tree:
        """The weights, moved to the devices that keep them."""

        def divisible(weight: ParamSpec, kept: jax.Array | Quantized) -> jax.Array | Quantized:
            if not isinstance(kept, Quantized):
                return kept
            times = self.times_of_scales(weight, kept.scales.shape)
            return dataclasses.replace(kept, scales=repeated(kept.scales, times))

        model = jax.tree.map(divisible, blueprint, model, is_leaf=is_spec)
        return jax.device_put(model, self.shardings(blueprint))

    def times_of_scales(self, weight: ParamSpec, counts: Sequence[int]) -> tuple[int, ...]:
        """How often each scale must stand along every axis for a device to have all of its own.

        Args:
          counts: scales of a quantized weight along every axis.
        """
        shards = (self.num_shards(axes) for axes in self.rules.divisors(weight))
        return tuple(n // math.gcd(n, count) for n, count in zip(shards, counts, strict=True))

    def on_shards(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """The function, run by every device on its shards of the arguments."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)


@functools.cache
def on_one_device() -> Partition:
    """Everything on the first device."""
    return Partition(single_device(), DECODE)


def keeping(partition: Partition | None) -> Callable[[ParamSpec], jax.sharding.Sharding]:
    """How weights lie on the devices of a partition, or on the first device without one."""
    if partition is not None:
        return partition.sharding
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return lambda _: device


def from_parts(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """An array of which every process reads the parts that its devices keep, each part once.

    Args:
      read: gives a part, whose slices have a start and a stop.
    """
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(wanted: tuple[slice, ...] | None) -> np.ndarray:
        bounds = tuple(
            each.indices(size)[:2] for each, size in zip(wanted or (), shape, strict=True)
        )
        if bounds not in parts:
            parts[bounds] = read(tuple(slice(*pair) for pair in bounds))
        return parts[bounds]

    return jax.make_array_from_callback(shape, sharding, part)


def require_divisible(
    blueprint: Any, rules: Rules, sizes: Mapping[str, int], batch: int = 0
) -> None:
    """Checks that a mesh divides every weight, and the rows of a batch, into equal shards.

    Args:
      sizes: of the mesh axes.

    Raises:
      InputError: an axis does not divide what it shards; the nearest sizes that do are named.
    """

    def check(what: str, size: int, axes: Axes) -> None:
        parts = math.prod(sizes[axis] for axis in axes)
        if size % parts:
            given = ",".join(f"{axis}={sizes[axis]}" for axis in axes)
            raise InputError(
                f"mesh {given} does not divide {what} {size} evenly, expected {'*'.join(axes)} to "
                f"be {_nearest_divisors(size, parts)}"
            )

    def check_weight(_: str, weight: ParamSpec) -> None:
        for name, size, axes in zip(weight.axes, weight.shape, rules.divisors(weight), strict=True):
            if axes:
                check(_SIZES[name], size, axes)

    map_specs(check_weight, blueprint)
    check("batch size", batch, BATCH)


def mesh_sizes(text: str, num_devices: int, blueprint: Any, rules: Rules, batch: int = 0) -> Sizes:
    """The mesh that `--mesh` names, or a sensible one where that is `auto`.

    Raises:
      InputError: it is not for that many devices, or does not divide weights and batch evenly.
    """

    def check(sizes: Sizes) -> None:
        require_divisible(blueprint, rules, sizes, batch)

    if text == "auto":
        return choose_mesh(num_devices, "train" if rules is TRAIN else "run", check)
    sizes = parse_mesh(text, num_devices)
    check(sizes)
    return sizes


def _nearest_divisors(size: int, wanted: int) -> str:
    divisors = [part for part in range(1, size + 1) if size % part == 0]
    below = max(part for part in divisors if part < wanted)
    above = [part for part in divisors if part > wanted][:1]
    return " or ".join(map(str, [below, *above]))
