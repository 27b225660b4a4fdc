"""Eight CPU devices, no dtype promoted without being asked for, repeatable property tests.

What one process has compiled the others find in a folder that is there for this run only.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator

from tests.flags import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", xla_flags(8))

import hypothesis
import jax
import pytest

# Compiling makes the first example slow whatever the test does.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

_CACHE = "JAX_COMPILATION_CACHE_DIR"
_own_cache: list[str] = []


def pytest_configure() -> None:
    """Makes the folder, which workers and commands find in the environment."""
    if _CACHE not in os.environ:
        _own_cache.append(tempfile.mkdtemp(prefix="glm5-tests-"))
        os.environ[_CACHE] = _own_cache[0]
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        jax.config.update("jax_compilation_cache_dir", _own_cache[0])  # it was imported before
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_unconfigure() -> None:
    for folder in _own_cache:
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first: workers take files, and the last is worked on alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def devices() -> None:
    """Finds them all, lest a test that plans for two GPUs comes first and is given two."""
    jax.devices()


@pytest.fixture(autouse=True)
def promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    marked = request.node.get_closest_marker("standard_promotion")
    with jax.numpy_dtype_promotion("standard" if marked else "strict"):
        yield


@pytest.fixture(autouse=True)
def precision() -> None:
    """Takes back what a command that ran in this process chose for its process."""
    jax.config.update("jax_default_matmul_precision", None)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs() -> Iterator[None]:
    """Forgets a module's compiled programs after it; all together take gigabytes."""
    yield
    jax.clear_caches()
