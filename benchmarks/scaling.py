"""How the work of one chip falls as chips are added: GLM-5's steps, compiled for 8 to 512 of them.

The batch stays the same, so with twice the chips each would at best do half the work, move half
the bytes and take half the time.
"""

import math
from pathlib import Path
from typing import Any

from benchmarks.arguments import parser, run
from benchmarks.output import own_command, write_results
from glm5_jax.mesh import format_mesh
from glm5_jax.model import Glm5
from glm5_jax.plan.programs import Work, find_job
from glm5_jax.plan.report import Plan, compile_plan, estimate
from glm5_jax.plan.table import verdict
from glm5_jax.plan.topology import find_topology
from glm5_jax.presets import load_preset
from glm5_jax.sharding import mesh_sizes

_TOPOLOGIES = ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_WORK = {"decode": Work(256, 32768, None), "train": Work(512, 4096, None)}


def plan(preset: str, job_name: str, chip: str, layout: str, *, compiles: bool) -> Plan:
    """The plan for one number of chips, on the mesh that `auto` stands for."""
    config, job, work = load_preset(preset).config, find_job(job_name), _WORK[job_name]
    topology = find_topology(f"{chip}:{layout}")
    sizes = mesh_sizes("auto", len(topology.devices), Glm5(config), job.rules, work.batch)
    found, traced = estimate(config, job, topology, sizes, work)
    if compiles and found.fits is None:
        found = compile_plan(found, traced, topology)
    return found


def to_row(job: str, chips: int, found: Plan) -> dict[str, Any]:
    """What is published of a plan."""
    return {
        "job": job,
        "chips": chips,
        "mesh": format_mesh(found.mesh),
        "flops": sum(found.costs.flops.values()),
        "hbm_bytes": found.costs.hbm_bytes,
        "collective_bytes": sum(part.bytes for part in found.costs.by_axes.values()),
        "collectives": sum(part.count for part in found.costs.by_axes.values()),
        "seconds": dict(found.seconds),
        "bound": found.bound,
        "tokens_per_second_per_chip": found.tokens_per_second,
        "arguments": found.arguments,
        "peak": found.peak,
        "verdict": verdict(found),
        "compile_seconds": found.compiled["seconds"] if found.compiled else None,
    }


def main(arguments: list[str] | None = None) -> int:
    """Plans, prints and writes."""
    command_line = parser(__doc__)
    command_line.add_argument("--preset", default="glm-5")
    command_line.add_argument("--chip", default="v5p", help="with three dimensions of links")
    command_line.add_argument("--jobs", nargs="+", default=list(_WORK), choices=list(_WORK))
    command_line.add_argument(
        "--compile",
        nargs="*",
        default=list(_WORK),
        choices=list(_WORK),
        help="jobs to compile, for peaks of memory; training takes six minutes each",
    )
    args = command_line.parse_args(arguments)
    rows = []
    for job in args.jobs:
        for layout in _TOPOLOGIES:
            found = plan(args.preset, job, args.chip, layout, compiles=job in args.compile)
            chips = math.prod(map(int, layout.split("x")))
            rows.append(to_row(job, chips, found))
            print(_line(rows[-1]), flush=True)
    if args.results:
        command = own_command("scaling")
        write_results(args.results, "scaling", command, rows, _table(rows), "libtpu")
        _draw(rows, args.results / "scaling.png", f"{args.preset} on {args.chip}")
    return 0


def _line(row: dict[str, Any]) -> str:
    peak = "-" if row["peak"] is None else f"{row['peak'] / 2**30:.1f}"
    return (
        f"| {row['job']} | {row['chips']} | {row['mesh']} | {row['flops'] / 1e12:,.2f} | "
        f"{row['hbm_bytes'] / 1e9:,.1f} | {row['collective_bytes'] / 1e9:,.2f} | "
        f"{1e3 * max(row['seconds'].values()):,.1f} | {row['bound']} | "
        f"{row['tokens_per_second_per_chip']:,.1f} | {row['arguments'] / 2**30:,.1f} | {peak} | "
        f"{row['verdict']} |"
    )


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = [
        "| job | chips | mesh | TFLOP | GB moved in HBM | GB sent | ms | bound | tokens/s/chip | "
        "arguments, GiB | peak, GiB | memory |",
        "|" + "---|" * 12,
    ]
    return head + [_line(row) for row in rows]


def _draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    jobs = list(dict.fromkeys(row["job"] for row in rows))
    figure, all_axes = plt.subplots(1, len(jobs), figsize=(6 * len(jobs), 4.5), squeeze=False)
    quantities = {"compute": "o", "HBM": "s", "interconnect": "^"}
    for axes, job in zip(all_axes[0], jobs, strict=True):
        own = [row for row in rows if row["job"] == job]
        chips = [row["chips"] for row in own]
        for name, marker in quantities.items():
            seconds = [1e3 * row["seconds"][name] for row in own]
            axes.plot(chips, seconds, marker=marker, label=name)
        ideal = max(own[0]["seconds"].values()) * 1e3
        axes.plot(chips, [ideal * chips[0] / n for n in chips], "k:", label="work divided evenly")
        axes.set(xscale="log", yscale="log", xlabel="chips", ylabel="ms a step, one resource alone")
        axes.set_xticks(chips, [str(n) for n in chips])
        axes.set_title(f"{title}, {job}")
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
