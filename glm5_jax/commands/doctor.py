"""`glm5 doctor`: what may keep a model from running here."""

import argparse
import json
from typing import Any

from glm5_jax.commands.arguments import add_mesh, integer
from glm5_jax.console import add_command
from glm5_jax.processes import add_processes, one_program


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "doctor",
        _run,
        "Look for what may keep a model from running here.\n\n"
        "Each finding is ok, a note or a problem, with what to do about it. The exit status is 1\n"
        "if there is a problem. With several processes, each looks at its own machine.",
    )
    add_mesh(command)
    command.add_argument(
        "--timeout",
        type=integer(1, 10**6),
        default=120,
        metavar="SECONDS",
        help="how long to wait for processes and for sums over devices",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    add_processes(command)


def _run(args: argparse.Namespace) -> int:
    with one_program(args):
        import jax

        from glm5_jax.doctor import diagnose
        from glm5_jax.findings import format_findings
        from glm5_jax.mesh import choose_mesh, parse_mesh

        count = len(jax.devices())
        if args.mesh == "auto":
            sizes = choose_mesh(count, "run", lambda _: None)
        else:
            sizes = parse_mesh(args.mesh, count)
        findings = diagnose(sizes, args.timeout)
        problems = sum(each.level == "problem" for each in findings)
        if args.json:
            print(json.dumps({"problems": problems, "findings": [f._asdict() for f in findings]}))
        else:
            print(format_findings(findings))
    return 1 if problems else 0
