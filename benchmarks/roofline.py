"""How near to what hardware allows: the hot primitives here, and a step of decoding on pods.

`machine` measures primitives at the sizes of the preset `bench` beside this machine's ceilings.
`chips` sets what the traced step of the full model reads and computes, as `glm5 plan` counts it,
beside the least that the model's sizes demand (`minimum.py`); nothing is run. A few of the steps
are compiled as well, and searched for copies of arguments and results, which no trace shows.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from benchmarks.arguments import parser, run
from benchmarks.minimum import least_of_decoding, weights_as_laid_out
from benchmarks.output import own_command, write_results
from benchmarks.primitives import measure
from glm5_jax.mesh import format_mesh
from glm5_jax.model import Glm5
from glm5_jax.plan.programs import Work, find_job
from glm5_jax.plan.report import Plan, estimate
from glm5_jax.plan.topology import find_topology, silenced
from glm5_jax.presets import load_preset
from glm5_jax.sharding import mesh_sizes


class Step(NamedTuple):
    """A step of decoding."""

    preset: str
    topology: str
    batch: int
    context: int
    scheme: str | None = "float8"

    @property
    def is_compiled(self) -> bool:
        """Whether it is among those that are: each takes a minute."""
        on_tpu = not self.topology.startswith("h200")
        return on_tpu and self.preset == "glm-5" and self.context == 32768


# The smallest slices that hold the model in float8 and a million tokens; GPUs come first, for which
# as many virtual devices are made before JAX has looked for any.
_SLICES = ("h200:8", "v5p:2x2x4", "v6e:4x8", "v7:2x2x2")
_WORK = ((1, 131072), (32, 32768), (256, 4096))
_STEPS = (
    *(
        Step(preset, topology, *work)
        for topology in _SLICES
        for preset in ("glm-5", "glm-5.2")
        for work in _WORK
    ),
    Step("glm-5", "v6e:16x16", 256, 32768, None),
)


def compare(step: Step) -> dict[str, Any]:
    """What a step takes at least, and as it is traced; a chip's share of work and seconds."""
    config, job = load_preset(step.preset).config, find_job("decode")
    topology = find_topology(step.topology)
    sizes = mesh_sizes("auto", len(topology.devices), Glm5(config), job.rules, step.batch)
    work = Work(step.batch, step.context, "bfloat16", step.scheme)
    plan, (traced, mesh) = estimate(config, job, topology, sizes, work)
    compiled = None
    if step.is_compiled:
        with silenced(), jax.set_mesh(mesh):
            compiled = _compiled(traced.lower().compile(), topology.chip.devices)
    float8 = step.scheme == "float8"
    least = least_of_decoding(config, step.batch, step.context, float8=float8)
    held = weights_as_laid_out(config, sizes, step.batch, float8=float8)
    seconds = least.seconds(topology.chip, topology.num_chips)
    return {
        **step._asdict(),
        "mesh": format_mesh(sizes),
        "fits": plan.fits is not False,  # its arguments: nothing is compiled
        "least": {
            name: value / topology.num_chips
            for name, value in (least._asdict() | {"bytes": least.bytes}).items()
        },
        "weights as laid out": held * topology.chip.devices,
        "least seconds": seconds,
        "counted": _counted(plan),
        "compiled": compiled,
        "times the least": max(plan.seconds.values()) / seconds,
        "tokens a second and chip": {
            "least": step.batch / topology.num_chips / seconds,
            "counted": plan.tokens_per_second,
        },
    }


def _counted(plan: Plan) -> dict[str, Any]:
    sent = plan.costs.collectives.values()
    return {
        "bytes": plan.costs.hbm_bytes,
        "flops": dict(plan.costs.flops),
        "exchanges": sum(part.count for part in sent),
        "bytes sent": sum(part.bytes for part in sent),
        "seconds": dict(plan.seconds),
        "bound": plan.bound,
    }


def _compiled(program: Any, devices: int) -> dict[str, float]:
    """What only the compiled program shows; of a chip of so many devices."""
    return {
        "bytes copied": devices * copied_bytes(program.as_text()),
        "temporaries": float(devices * program.memory_analysis().temp_size_in_bytes),
    }


def copied_bytes(text: str) -> float:
    """Bytes read and written by copies that stand outside of loops, from a program's HLO."""
    entry = re.search(r"^ENTRY .*?^}", text, re.MULTILINE | re.DOTALL)
    assert entry is not None
    total = 0.0
    for dtype, shape in re.findall(r"= (\w+)\[([\d,]*)\]\S* copy\(", entry[0]):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        total += 2 * math.prod(int(size) for size in shape.split(",") if size) * bits / 8
    return total


def _chip_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "One step of decoding, a chip's share: the least that the model's sizes demand, shared "
        "evenly by all chips, and what the traced step does as `glm5 plan` counts it. GB are read "
        "(counted: and written) in memory, of which weights, index keys and selected rows are the "
        "least; 'laid out' is the least of weights if each chip reads those that the mesh has it "
        "keep. Milliseconds are those at the chip's published rates, of whatever takes longest, "
        "in float8 weights unless said. Copied GB are those of copies that the compiler puts "
        "before and after the loops over layers, which a trace does not show: they come on top."
    )
    yield ""
    yield (
        "| model, rows x context | chips, mesh | least GB: weights + keys + rows | laid out, GB "
        "| counted GB | copied GB | least GFLOP | counted | exchanges | MB sent | least ms "
        "| counted ms | ratio |"
    )
    yield "|---|---|" + "---|" * 11
    for row in rows:
        least, counted = row["least"], row["counted"]
        parts = " + ".join(f"{least[name] / 1e9:.2f}" for name in ("weights", "index_keys", "rows"))
        plain = "" if row["scheme"] else ", bfloat16"
        compiled = row["compiled"]
        copied = "not compiled" if compiled is None else f"{compiled['bytes copied'] / 1e9:.2f}"
        unfit = "" if row["fits"] else ", does not fit"
        yield (
            f"| {row['preset']}{plain}, {row['batch']} x {row['context']:,} "
            f"| {row['topology']}, {row['mesh'].replace(',', ' ')}{unfit} "
            f"| {least['bytes'] / 1e9:.2f}: {parts} | {row['weights as laid out'] / 1e9:.2f} "
            f"| {counted['bytes'] / 1e9:.2f} | {copied} | {least['flops'] / 1e9:.1f} "
            f"| {sum(counted['flops'].values()) / 1e9:.1f} | {counted['exchanges']:,.0f} "
            f"| {counted['bytes sent'] / 1e6:.1f} | {1e3 * row['least seconds']:.2f} "
            f"| {1e3 * max(counted['seconds'].values()):.2f} ({counted['bound']}) "
            f"| {row['times the least']:.1f} |"
        )
    yield ""
    yield (
        "The steps for H200 are traced as on GPUs, with virtual CPU devices that stand in. Nothing "
        "is run, so no time here is measured."
    )


def _machine_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    ceilings = [row for row in rows if row["kind"] == "ceiling"]
    yield (
        "Primitives at the sizes of the preset `bench`, medians of rounds that take turns. FLOPs "
        "and bytes are those that the work demands; the roofline is the longer of the two at "
        "the ceilings, which are measured in the same rounds:"
    )
    yield ""
    for row in ceilings:
        unit = "GFLOP/s" if row["flops"] else "GB/s"
        rate = (row["flops"] or row["bytes"]) / row["seconds"] / 1e9
        yield f"- {row['name']}, {row['dtype']}: {rate:.1f} {unit}"
    yield ""
    yield "| primitive | dtype | ms | MFLOP | MB | GFLOP/s | GB/s | bound by | of the roofline |"
    yield "|---|---|" + "---|" * 7
    for row in rows:
        if row["kind"] == "ceiling":
            continue
        seconds = row["seconds"]
        yield (
            f"| {row['name']} | {row['dtype']} | {1e3 * seconds:.2f} | {row['flops'] / 1e6:,.1f} "
            f"| {row['bytes'] / 1e6:.1f} | {row['flops'] / seconds / 1e9:.1f} "
            f"| {row['bytes'] / seconds / 1e9:.1f} | {row['bound']} | {row['share']:.0%} |"
        )


def main(arguments: list[str] | None = None) -> int:
    """Measures or counts, prints and writes."""
    command_line = parser(__doc__)
    command_line.add_argument("part", choices=("machine", "chips"))
    args = command_line.parse_args(arguments)
    if args.part == "machine":
        rows, packages = measure(), []
        lines = list(_machine_lines(rows))
    else:
        rows, packages = [compare(step) for step in _STEPS], ["libtpu"]
        lines = list(_chip_lines(rows))
    print("\n".join(lines))
    if args.results is not None:
        command = own_command("roofline", arguments)
        write_results(args.results, f"roofline_{args.part}", command, rows, lines, *packages)
    return 0


if __name__ == "__main__":
    run(main)
