"""Puts each bug into a copy of the project, and runs the tests that should notice."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutants import MUTANTS, ROOT
from tests.mutants.mutant import Mutant

COPIED = ("glm5_jax", "train", "convert", "tests", "benchmarks", "pyproject.toml")
_CRASHES = ("AttributeError", "NameError", "SyntaxError", "TypeError")


def is_noticed(mutant: Mutant) -> bool:
    """Whether a test fails in a copy of the project that has the bug."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for part in COPIED:
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, copy / part)
        file = copy / mutant.file
        before = file.read_text()
        if before.count(mutant.text) != 1:
            raise SystemExit(f"{mutant.name}: its text is not once in {mutant.file}")
        file.write_text(before.replace(mutant.text, mutant.becomes))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", *mutant.tests.split()],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        print(f"{mutant.name}: {' '.join(failed) or 'not noticed'}"[:180], flush=True)
        if any(error in line for error in _CRASHES for line in failed):
            raise SystemExit(f"{mutant.name}: is no program that runs, let alone a bug")
        return done.returncode == 1


def main() -> int:
    """Tries the mutants whose names contain the words given; fails if one is not noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutants with one of these in their name")
    words = parser.parse_args().words
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    missed = [mutant.name for mutant in chosen if not is_noticed(mutant)]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutants noticed")
    for name in missed:
        print(f"not noticed: {name}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
