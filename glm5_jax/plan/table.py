"""Plans as tables for people and as JSON for programs."""

from typing import Any

from glm5_jax.mesh import format_mesh
from glm5_jax.plan.report import Plan

_GIB = 2**30


def to_json(plan: Plan) -> dict[str, Any]:
    """All that a plan says; memory in bytes a chip, work a chip and step."""
    return {
        "mesh": plan.mesh,
        "tokens": plan.tokens,
        "memory": {**plan.memory, "arguments": plan.arguments, "limit": plan.limit},
        "weights": dict(plan.weights),
        "compiled": plan.compiled and {**plan.compiled, "temporaries": plan.temporaries},
        "fits": plan.fits,
        "flops": dict(plan.costs.flops),
        "hbm_bytes": plan.costs.hbm_bytes,
        "collectives": [
            {"kind": kind, "axes": list(axes), "count": part.count, "bytes": part.bytes}
            for (kind, axes), part in plan.costs.by_axes.items()
        ],
        "seconds": dict(plan.seconds),
        "bound": plan.bound,
        "tokens_per_second_per_chip": plan.tokens_per_second,
    }


def format_plan(title: str, plan: Plan) -> str:
    """One plan in full."""
    lines = [title, "", "memory of a chip"]

    def add(label: str, value: str) -> None:
        lines.append(f"  {label:24}{value}")

    for name, size in plan.memory.items():
        add(name, _gib(size))
        if name == "weights":
            lines.extend(f"    {part:22}{_gib(of)}" for part, of in plan.weights.items() if of)
    add("all arguments", _gib(plan.arguments))
    if plan.temporaries is not None and plan.peak is not None:
        add("temporaries, compiled", _gib(plan.temporaries))
        add("peak, compiled", _gib(plan.peak))
    add("a program can have", _gib(plan.limit))
    add("", verdict(plan))
    lines += ["", "work of a chip in a step"]
    for dtype, flops in plan.costs.flops.items():
        add(f"{dtype} products", f"{flops / 1e12:14,.3f} TFLOP")
    add("memory traffic", f"{plan.costs.hbm_bytes / 1e9:14,.3f} GB")
    for (kind, axes), part in sorted(plan.costs.by_axes.items()):
        label = f"{kind}, {'*'.join(axes)}"
        lines.append(f"  {label:36}{part.count:10,.0f} times{part.bytes / 1e6:14,.1f} MB sent")
    lines += ["", "time of a step, each resource alone"]
    for name, seconds in plan.seconds.items():
        bound = "   the bound" if name == plan.bound else ""
        add(name, f"{1e3 * seconds:14,.3f} ms{bound}")
    add("tokens a second, chip", f"{plan.tokens_per_second:14,.1f}")
    if plan.compiled is not None:
        lines += ["", f"compiled in {plan.compiled['seconds']:.0f} s"]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """Whether a plan fits, and by how much."""
    used = plan.peak if plan.peak is not None else plan.arguments
    if plan.fits is None:
        return "not compiled: its arguments fit"
    spare = _gib(abs(plan.limit - used)).strip()
    if plan.fits:
        return f"fits, {spare} to spare"
    known = used > plan.limit
    return f"does not fit, {spare} too much" if known else "does not fit, says the compiler"


def format_search(title: str, plans: list[Plan]) -> str:
    """Several plans, a line each, in the order given."""
    head = f"{'mesh':32}{'ms':>10}  {'bound':13}{'tokens/s/chip':>14}{'arguments':>14}  verdict"
    rows = [
        f"{format_mesh(plan.mesh):32}{1e3 * max(plan.seconds.values()):>10,.2f}  {plan.bound:13}"
        f"{plan.tokens_per_second:>14,.1f}{_gib(plan.arguments)}  {verdict(plan)}"
        for plan in plans
    ]
    return "\n".join([title, "", head, *rows])


def _gib(size: float) -> str:
    return f"{size / _GIB:10,.2f} GiB"
