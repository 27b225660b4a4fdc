import pytest

from glm5_jax.inference import engine as engine_module
from tests.trained import trained_model


@pytest.fixture(autouse=True)
def short_pages(monkeypatch):
    """Pages and portions so short that prompts have many."""
    monkeypatch.setattr("glm5_jax.inference.steps._SHORTEST_PAGE", 4)
    monkeypatch.setattr("glm5_jax.inference.steps._SHORTEST_PART", 4)
    monkeypatch.setattr(engine_module, "PORTIONS", (8, 16))


@pytest.fixture(scope="session")
def trained():
    return trained_model()
