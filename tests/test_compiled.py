import os
import subprocess
import sys

import pytest

from glm5_jax import compiled
from glm5_jax.compiled import VARIABLE, keep_compiled_programs

PROGRAM = """
from glm5_jax.compiled import keep_compiled_programs
keep_compiled_programs()
import jax
jax.jit(lambda x: jax.numpy.sort(x) @ x)(jax.numpy.arange(8.0))
"""


@pytest.fixture
def home(monkeypatch, tmp_path):
    """Where programs are kept; what the function sets is taken back."""
    for name in (VARIABLE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "glm5-jax"


def test_what_one_process_compiles_the_next_one_finds(home):
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    kept = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True)
        kept.append({path.name for path in home.rglob("*-cache")})
    assert kept[0] and kept[0] == kept[1]


@pytest.mark.parametrize("chosen", ["", "/elsewhere"])
def test_the_environment_goes_first(home, monkeypatch, chosen):
    monkeypatch.setenv(VARIABLE, chosen)
    keep_compiled_programs()
    assert os.environ[VARIABLE] == chosen and not home.exists()


def test_where_nothing_can_be_written_nothing_is_kept(home):
    home.write_text("a file where the folder should be")
    keep_compiled_programs()
    assert VARIABLE not in os.environ


def test_programs_that_were_not_used_for_longest_go_first(home, monkeypatch):
    keep_compiled_programs()
    (folder,) = home.iterdir()
    for age in range(5):
        (folder / f"{age}-cache").write_bytes(bytes(100))
        os.utime(folder / f"{age}-cache", (1e9 - age, 1e9 - age))
    os.utime(folder / "4-cache", (1e9, 1e9 - 4))  # made before all others, read since
    (folder / "gone-cache").symlink_to("removed by another command")
    monkeypatch.setattr(compiled, "_MOST_BYTES", 250)
    monkeypatch.delenv(VARIABLE)
    keep_compiled_programs()
    assert os.environ[VARIABLE] == str(folder)
    kept = sorted(path.name for path in folder.iterdir() if path.exists())
    assert kept == ["0-cache", "4-cache"]
