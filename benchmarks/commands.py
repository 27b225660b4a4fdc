"""The project's commands, run as a user would type them."""

import shlex
import subprocess
import sys

NAMES = {"glm5_jax": "glm5", "train": "glm5-train", "convert": "glm5-convert"}


def run_command(module: str, *arguments: object) -> str:
    """Runs a command; returns what it printed, having shown it.

    Args:
      module: one of `NAMES`.

    Raises:
      SystemExit: it failed.
    """
    command, words = NAMES[module], [str(argument) for argument in arguments]
    print(f"\n$ {command} {shlex.join(words)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", module, *words], stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"{command} {words[0]} ended with status {done.returncode}")
    return done.stdout
