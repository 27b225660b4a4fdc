"""What one device of a mesh of eight does, counted."""

import jax
import jax.numpy as jnp

from glm5_jax.plan.costs import count

P = jax.P
SIZES = {"data": 2, "model": 4}
ONE, BOTH = ("model",), ("data", "model")
WHOLE = P()
F32 = 4  # bytes


def spec(mesh, shape, axes=WHOLE, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, axes))


def costs_of(function, *args, loop_trips=None, platform="cpu"):
    jaxpr = jax.jit(function).trace(*args).jaxpr
    return count(jaxpr, SIZES, loop_trips=loop_trips or {}, platform=platform)


def sharded(mesh, function, in_specs, out_specs):
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
