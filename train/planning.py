"""The command `glm5-train plan`: the stages of a run file on chips that are not here."""

import argparse
import functools
from typing import Any

from glm5_jax.commands.arguments import add_mesh
from glm5_jax.console import add_command, notice
from train.run_file import READY, config_of, make_settings, read_run_file


def add_plan(commands: Any) -> None:
    """Adds the command to the others."""
    command = add_command(
        commands,
        "plan",
        _plan,
        "Compile the stages of a run file for chips that are not here.\n\n"
        "For each stage: does a step fit, and how fast can it be? As `glm5 plan --help` says of\n"
        "any step.",
    )
    command.add_argument(
        "file", metavar="NAME|FILE", help=f"a run file, or a ready one: {', '.join(READY)}"
    )
    command.add_argument(
        "--topology", required=True, metavar="CHIP:AxB", help="such as v5p:4x4x2 or h200:8"
    )
    add_mesh(command)


def _plan(args: argparse.Namespace) -> int:
    from glm5_jax.mesh import format_mesh
    from glm5_jax.model import Glm5
    from glm5_jax.plan.programs import Job, Work
    from glm5_jax.plan.report import compile_plan, estimate
    from glm5_jax.plan.table import format_plan
    from glm5_jax.plan.topology import find_topology
    from glm5_jax.sharding import TRAIN, mesh_sizes
    from train.fit import common_batch, require_fit
    from train.plan import program

    file = read_run_file(args.file)
    config = config_of(file.config).config
    topology = find_topology(args.topology)
    stages = make_settings(file.stages, {})
    sizes = mesh_sizes(args.mesh, len(topology.devices), Glm5(config), TRAIN, common_batch(stages))
    for number, settings in enumerate(stages, start=1):
        require_fit(config, settings, sizes)
        work = Work(settings.batch_size, settings.length, settings.dtype)
        job = Job(TRAIN, functools.partial(program, settings=settings))
        notice(f"stage {number}: compiles for {topology.name} with {format_mesh(sizes)}")
        plan, traced = estimate(config, job, topology, sizes, work)
        if plan.fits is not False:
            plan = compile_plan(plan, traced, topology)
        title = (
            f"{args.file}, stage {number}, {settings.stage}, {work.batch} x {work.context:,} "
            f"tokens on {topology.name}, {topology.num_chips} chips: {format_mesh(sizes)}"
        )
        print(format_plan(title, plan), end="\n\n")
    return 0
