import jax
import pytest


@pytest.fixture(scope="session")
def mesh():
    return jax.make_mesh(
        (2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
