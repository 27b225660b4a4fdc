"""`glm5 plan`: whether a model fits on chips that are not here, and how fast it can be."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5_jax.commands.arguments import add_mesh, integer, read_config_of
from glm5_jax.console import add_command, notice, progress
from glm5_jax.errors import InputError

if TYPE_CHECKING:
    from glm5_jax.config import Config
    from glm5_jax.plan.programs import Job, Work
    from glm5_jax.plan.report import Plan
    from glm5_jax.plan.topology import Topology

_BATCH = {"decode": 256, "prefill": 64, "train": 1024}
_CONTEXT = {"decode": 32768, "prefill": 32768, "train": 4096}


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "plan",
        _run,
        "Compile a step for chips that are not here: does it fit, and how fast can it be?\n\n"
        "The step that runs is traced and compiled for the topology, without any weights. Memory\n"
        "is the compiler's; work is counted in the traced step with every loop's length; times\n"
        "are what each resource of the chip would need at its published rate, latencies left out,\n"
        "so no step is faster than the longest of them. Decoding reads one token of each row at\n"
        "the end of the context, prefill one portion of 512 tokens there, and training a whole\n"
        "batch of rows as long as the context. For TPUs libtpu compiles; for GPUs memory is that\n"
        "of virtual CPU devices, an estimate.",
    )
    command.add_argument("model", metavar="MODEL_OR_PRESET", help="a checkpoint or a preset's name")
    command.add_argument(
        "--topology", required=True, metavar="CHIP:AxB", help="such as v6e:16x16 or v5p:8x8x8"
    )
    add_mesh(command)
    command.add_argument("--job", default="decode", help="decode, prefill or train")
    command.add_argument(
        "--batch", type=integer(1), metavar="N", help="rows (default: 256, 64 or 1024 by job)"
    )
    command.add_argument(
        "--context",
        type=integer(1),
        metavar="T",
        help="tokens of a row (default: 32768, to train 4096, at most the model's)",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of weights (default: the model's); for train, that steps compute in (float32)",
    )
    command.add_argument(
        "--weights",
        choices=("plain", "float8", "int8", "int4"),
        help="how matrices are kept (default: as in the checkpoint, plain for presets)",
    )
    command.add_argument(
        "--search",
        action="store_true",
        help="rank all meshes by their times, and compile the fastest that fit",
    )
    command.add_argument(
        "--compile",
        type=integer(0),
        default=3,
        metavar="N",
        help="meshes to compile in a search, until so many fit",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _run(args: argparse.Namespace) -> int:
    from glm5_jax.plan.programs import Work, find_job
    from glm5_jax.plan.topology import find_topology

    config, job = read_config_of(args.model), find_job(args.job)
    if args.context is not None and args.context > config.max_positions:
        raise InputError(
            f"--context is {args.context}, expected at most the model's {config.max_positions}"
        )
    usual = min(_CONTEXT.get(args.job, _CONTEXT["decode"]), config.max_positions)
    batch = args.batch or _BATCH.get(args.job, _BATCH["decode"])
    work = Work(batch, args.context or usual, args.dtype, _scheme(args))
    topology = find_topology(args.topology)
    kept = f" with weights in {work.scheme}" if work.scheme else ""
    title = (
        f"{args.model}{kept}, {args.job}, {work.batch} x {work.context:,} tokens on "
        f"{topology.name}, {topology.num_chips} chips"
    )
    plans = (_search if args.search else _plan_one)(args, config, job, topology, work)

    from glm5_jax.plan.table import format_plan, format_search, to_json

    if args.json:
        found = [to_json(plan) for plan in plans]
        facts = {"model": args.model, "topology": topology.name, "chips": topology.num_chips}
        facts |= {"job": args.job, **work._asdict()}
        print(json.dumps(facts | ({"plans": found} if args.search else found[0])))
    elif args.search:
        print(format_search(title, plans))
    else:
        mesh = ", ".join(f"{axis} {size}" for axis, size in plans[0].mesh.items())
        print(format_plan(f"{title}: {mesh}", plans[0]))
    return 0


def _scheme(args: argparse.Namespace) -> str | None:
    """How weights are to be kept; None if as plain arrays."""
    from glm5_jax.checkpoint import scheme_of

    scheme = args.weights or scheme_of(Path(args.model))
    if scheme in (None, "plain"):
        return None
    if args.job not in ("decode", "prefill"):
        raise InputError(f"--weights is {scheme}, in which {args.job} cannot keep them")
    return scheme


def _plan_one(
    args: argparse.Namespace, config: "Config", job: "Job", topology: "Topology", work: "Work"
) -> "list[Plan]":
    from glm5_jax.mesh import format_mesh
    from glm5_jax.model import Glm5
    from glm5_jax.plan.report import compile_plan, estimate
    from glm5_jax.sharding import mesh_sizes

    count = len(topology.devices)
    sizes = mesh_sizes(args.mesh, count, Glm5(config), job.rules, work.batch)
    plan, traced = estimate(config, job, topology, sizes, work)
    if plan.fits is False:
        notice("the arguments alone do not fit: nothing is compiled")
        return [plan]
    notice(f"compiles for {topology.name} with {format_mesh(sizes)}, which takes minutes")
    return [compile_plan(plan, traced, topology)]


def _search(
    args: argparse.Namespace, config: "Config", job: "Job", topology: "Topology", work: "Work"
) -> "list[Plan]":
    """Every mesh that divides the model, the fastest first; the first ones compiled."""
    from glm5_jax.mesh import factorisations, format_mesh
    from glm5_jax.plan.report import compile_plan, estimate

    if args.mesh != "auto":
        raise InputError(f"--mesh is {args.mesh!r:.80}, expected none with --search")
    candidates, refusals = [], []
    meshes = [
        sizes
        for sizes in factorisations(len(topology.devices))
        if sizes["data"] == 1 or not job.interchangeable
    ]
    with progress("trace", len(meshes)) as advance:
        for sizes in meshes:
            advance(1)
            try:
                candidates.append(estimate(config, job, topology, sizes, work))
            except InputError as error:
                refusals.append(str(error))
    if not candidates:
        raise InputError(
            f"no mesh of {args.topology} divides the model and the batch: {refusals[0]}"
        )
    candidates.sort(key=lambda pair: (pair[0].fits is False, max(pair[0].seconds.values())))
    plans, fitting = [], 0
    for plan, traced in candidates:
        if fitting < args.compile and plan.fits is None:
            notice(f"compiles {format_mesh(plan.mesh)}")
            plan = compile_plan(plan, traced, topology)
            fitting += plan.fits is True
        plans.append(plan)
    return plans
