"""What one device does when a traced program runs once: products, memory traffic, communication.

XLA's own cost analysis counts the body of a loop once; here each body counts as often as it runs.
Nothing is left out for being unused: what the compiler would drop is counted.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from jax.extend import core

from glm5_jax.plan.tally import Axes, Collective, Costs
from glm5_jax.quantized import MULTIPLY_OUT

_Atom = core.Var | core.Literal


def count(
    closed_jaxpr: core.ClosedJaxpr,
    mesh_axis_sizes: Mapping[str, int],
    *,
    loop_trips: Mapping[str, float],
    platform: str,
) -> Costs:
    """Counts a program, as traced by `jax.jit(f).trace(*args).jaxpr`.

    Args:
      mesh_axis_sizes: of all axes, manual or explicit, in the order of the mesh.
      loop_trips: how often a loop runs whose bounds are data, by part of its name scope.
      platform: cpu, tpu, cuda or rocm, whose branch of `jax.lax.platform_dependent` is counted. Of
        other branches it is the most expensive one.

    Raises:
      ValueError: a part's cost is not known; for want of knowing nothing is free, or runs once.
    """
    return _Program(mesh_axis_sizes, loop_trips, platform).count(closed_jaxpr.jaxpr, fused=False)


_NOTHING = Costs({}, 0.0, {})
_ALL_REDUCE = "all-reduce"
_KINDS = {"pmax": _ALL_REDUCE, "pmin": _ALL_REDUCE, "psum": _ALL_REDUCE}
_KINDS |= {"all_gather": "all-gather", "all_to_all": "all-to-all", "ppermute": "collective-permute"}
_KINDS |= {"ragged_all_to_all": "ragged-all-to-all", "reduce_scatter": "reduce-scatter"}
# They name mesh axes, but change at most the type of what a device already holds.
_LOCAL = {"axis_index", "preduced", "pvary", "reduced_vary_cast", "vary_unreduced_cast"}

_PRODUCTS = {"conv_general_dilated", "dot_general", "ragged_dot_general"}
_STREAMS = ("approx_top_k", "cum", "sort", "top_k")  # what names begin with
_UNKNOWN = {"custom_linear_solve", "pallas_call", "scaled_dot", "scaled_matmul"}

# Each holds one jaxpr, which runs once and gives the same results.
_CALLS = {"call", "checkpoint", "closed_call", "composite", "custom_jvp_call", "custom_vjp_call"}
_CALLS |= {"eval_jaxpr", "jit", "pjit", "remat"}
_CONTROL = {"cond", "scan", "shard_map", "while"}


@dataclasses.dataclass(frozen=True)
class _Program:
    """What a jaxpr does not say of itself."""

    sizes: Mapping[str, int]
    loop_trips: Mapping[str, float]
    platform: str

    def count(self, jaxpr: core.Jaxpr, *, fused: bool) -> Costs:
        """A jaxpr's costs; those of its elementwise work only if it is not fused into the rest."""
        elementwise = 0.0 if fused else self._bytes(*_passed_once(jaxpr))
        each = (self._count_one(eqn, fused) for eqn in jaxpr.eqns)
        return sum(each, Costs({}, elementwise, {}))

    def _count_one(self, eqn: core.JaxprEqn, fused: bool) -> Costs:
        name = _name(eqn)
        if eqn.params.get("name") == MULTIPLY_OUT:
            # The product that reads the result counts it, and reads instead what it is made of.
            return Costs({}, self._bytes(*eqn.invars) - self._bytes(*eqn.outvars), {})
        if name in _CALLS:
            # An elementwise call is part of the single pass of the jaxpr that it stands in.
            return self.count(*_held(eqn), fused=fused or _elementwise(eqn))
        if name in _CONTROL:
            return self._control(eqn, fused)
        if name in _KINDS:
            return self._collective(eqn)
        combines = name.startswith(("reduce", "scatter"))  # pairs of elements, by a jaxpr
        named = _named_axes(eqn) and name not in _LOCAL and not name.endswith("_done")
        if named or name in _UNKNOWN or (_held(eqn) and not combines):
            raise ValueError(f"the cost of {name} is not known")
        flops = {_product_dtype(eqn): self._product_flops(eqn)} if name in _PRODUCTS else {}
        return self._implied(eqn) + Costs(flops, self._bytes(*_touched(eqn)), {})

    def _control(self, eqn: core.JaxprEqn, fused: bool) -> Costs:
        name = _name(eqn)
        if name == "cond":
            choices = (self.count(branch, fused=fused) for branch in self._branches(eqn))
            return max(choices, key=_expense)
        if name == "while":
            trips = self._trips(eqn)
            body = self.count(*_held(eqn, "body_jaxpr"), fused=fused)
            condition = self.count(*_held(eqn, "cond_jaxpr"), fused=fused)
            return body.times(trips) + condition.times(trips + 1)
        body = self.count(*_held(eqn), fused=fused or name == "shard_map")
        return body.times(eqn.params["length"]) if name == "scan" else body

    def _trips(self, eqn: core.JaxprEqn) -> float:
        scope = str(eqn.source_info.name_stack)
        found = [name for name in self.loop_trips if name in scope]
        if len(found) != 1:
            known = sorted(self.loop_trips)
            raise ValueError(f"a while loop in scope {scope!r} has no one length among {known}")
        return self.loop_trips[found[0]]

    def _branches(self, eqn: core.JaxprEqn) -> list[core.Jaxpr]:
        branches = _held(eqn)
        platforms = eqn.params.get("branches_platforms")  # only platform_dependent sets it
        if platforms is None:
            return branches
        for branch, names in zip(branches, platforms, strict=True):
            if names is None or self.platform in names:  # None is the default, which comes last
                return [branch]
        raise ValueError(f"no branch for platform {self.platform!r}, only for {platforms}")

    def _collective(self, eqn: core.JaxprEqn) -> Costs:
        kind = _KINDS[_name(eqn)]
        if eqn.params.get("axis_index_groups") is not None:
            raise ValueError(f"the cost of {kind} among axis_index_groups is not known")
        # The other operands of a ragged exchange are its result's buffer, offsets and sizes.
        operands = eqn.invars[:1] if kind == "ragged-all-to-all" else eqn.invars
        each = (self._exchange(kind, _named_axes(eqn), self._bytes(x)) for x in operands)
        return sum(each, _NOTHING)

    def _implied(self, eqn: core.JaxprEqn) -> Costs:
        """The exchange that XLA puts in outside of shard_map, where types carry shardings."""
        name = _name(eqn)
        reduces = name in _PRODUCTS or name.startswith(("arg", "reduce_"))
        if not reduces and name != "reshard":
            return _NOTHING
        before = {axis for atom in eqn.invars for dim in _spec(atom) for axis in dim}
        after = {axis for dim in _spec(eqn.outvars[0]) for axis in dim}
        kind = _ALL_REDUCE if reduces else "all-to-all" if after - before else "all-gather"
        held = eqn.outvars if reduces else eqn.invars
        return self._exchange(kind, tuple(before - after), self._bytes(*held))

    def _exchange(self, kind: str, axes: Axes, held: float) -> Costs:
        """One exchange among devices of which each holds some bytes; alone it has none to make."""
        n = math.prod(map(self._size, axes))
        if n == 1:
            return _NOTHING
        over = tuple(axis for axis in self.sizes if axis in axes and self.sizes[axis] > 1)
        share = held * (n - 1) / n
        sent = {"all-gather": n * share, _ALL_REDUCE: 2 * share, "collective-permute": held}
        return Costs({}, 0.0, {(kind, over): Collective(1.0, sent.get(kind, share))})

    def _product_flops(self, eqn: core.JaxprEqn) -> float:
        """Two for each multiply and add; ragged groups count as filling all rows."""
        params = eqn.params
        left, right = (self._shape(operand) for operand in eqn.invars[:2])
        if _name(eqn) == "conv_general_dilated":
            outputs = right[params["dimension_numbers"].rhs_spec[0]]
            return 2.0 * math.prod(self._shape(eqn.outvars[0])) * math.prod(right) / outputs
        ragged = params.get("ragged_dot_dimension_numbers")
        numbers = ragged.dot_dimension_numbers if ragged else params["dimension_numbers"]
        (_, contracted), (_, batch) = numbers
        once = {*contracted, *batch, *(ragged.rhs_group_dimensions if ragged else ())}
        return 2.0 * math.prod(left) * math.prod(d for i, d in enumerate(right) if i not in once)

    def _shape(self, atom: _Atom) -> tuple[int, ...]:
        """What one device holds; a shard_map's own types are local, and name no axes."""
        parts = (math.prod(map(self._size, dim)) for dim in _spec(atom))
        return tuple(-(-d // n) for d, n in zip(_array(atom).shape, parts, strict=True))

    def _bytes(self, *atoms: _Atom) -> float:
        return float(sum(math.prod(self._shape(x)) * _array(x).dtype.itemsize for x in atoms))

    def _size(self, axis: str) -> int:
        if axis not in self.sizes:
            raise ValueError(f"mesh axis {axis!r} has no size in {dict(self.sizes)}")
        return self.sizes[axis]


def _expense(costs: Costs) -> tuple[float, float]:
    sent = sum(part.bytes for part in costs.by_axes.values())
    return sum(costs.flops.values()), costs.hbm_bytes + sent


def _name(eqn: core.JaxprEqn) -> str:
    """Variants of a collective do the same to memory; asynchronous ones count where they start."""
    name = eqn.primitive.name.removeprefix("unreduced_")
    for variant in ("_p", "_start", "2", "_invariant", "_reduced"):  # jax 0.10 has a few in _p
        name = name.removesuffix(variant)
    return name


def _held(eqn: core.JaxprEqn, *names: str) -> list[core.Jaxpr]:
    return list(core.jaxprs_in_params({n: eqn.params[n] for n in names or eqn.params}))


def _named_axes(eqn: core.JaxprEqn) -> Axes:
    named = eqn.params.get("axis_name", eqn.params.get("axes", ()))
    every = named if isinstance(named, tuple | list | frozenset | set) else (named,)
    return tuple(axis for axis in every if isinstance(axis, str))  # numbers are array axes


def _array(atom: _Atom) -> jax.core.ShapedArray:
    if not isinstance(atom.aval, jax.core.ShapedArray):
        raise ValueError(f"{atom.aval} has no size that could be counted")
    return atom.aval


def _spec(atom: _Atom) -> tuple[Axes, ...]:
    """The mesh axes that each dimension is divided over."""
    aval = _array(atom)
    padded = (*aval.sharding.spec, *(None,) * aval.ndim)[: aval.ndim]
    return tuple(d if isinstance(d, tuple) else (d,) if isinstance(d, str) else () for d in padded)


def _product_dtype(eqn: core.JaxprEqn) -> str:
    """The wider operand's dtype; of float32 with its precision, where that is not the default."""
    dtype = max((_array(operand).dtype for operand in eqn.invars[:2]), key=lambda d: d.itemsize)
    precision = eqn.params["precision"]
    level = precision[0] if isinstance(precision, tuple) else precision
    default = dtype.name != "float32" or level in (None, jax.lax.Precision.DEFAULT)
    return dtype.name if default else f"float32_{level.name.lower()}"


def _touched(eqn: core.JaxprEqn) -> Sequence[_Atom]:
    """What an equation reads and writes that nothing can be fused into."""
    name = _name(eqn)
    if name in _PRODUCTS or name.startswith(_STREAMS):
        return [*eqn.invars, *eqn.outvars]
    if name == "gather":
        return 2 * eqn.outvars
    if name == "dynamic_update_slice":
        return 2 * [eqn.invars[1]]
    return 2 * [eqn.invars[2]] if name.startswith("scatter") else []


def _elementwise(eqn: core.JaxprEqn) -> bool:
    """Whether an equation is part of its jaxpr's single pass over memory."""
    name = _name(eqn)
    if name in _CALLS:
        return all(_elementwise(e) for one in _held(eqn) for e in one.eqns)
    return name not in _CONTROL and name not in _KINDS and not _touched(eqn)


def _passed_once(jaxpr: core.Jaxpr) -> list[core.Var]:
    """What elementwise work reads, and what of its results something else reads."""
    inside = [eqn for eqn in jaxpr.eqns if _elementwise(eqn)]
    others = [eqn for eqn in jaxpr.eqns if not _elementwise(eqn)]
    made = {var for eqn in inside for var in eqn.outvars}
    read = {var for eqn in inside for var in eqn.invars if isinstance(var, core.Var)}
    wanted = {var for eqn in others for var in eqn.invars if isinstance(var, core.Var)}
    wanted |= {var for var in jaxpr.outvars if isinstance(var, core.Var)}
    return [*(read - made), *(made & wanted)]
