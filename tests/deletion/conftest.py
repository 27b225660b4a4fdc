"""A checkpoint whose shards are to be deleted, and what it is converted to."""

import shutil
from pathlib import Path

import pytest

from convert.__main__ import main
from glm5_jax.published.safetensors import FIRST_READ
from tests.deletion.runs import RAW, shards
from tests.resuming.runs import forked
from tests.tiny import float8_weights, random_weights, write_published


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """Float8, whose scales are in other shards, with copies of embedding and head."""
    weights, _ = float8_weights(random_weights(RAW))
    weights |= {
        "model.layers.7.embed_tokens.weight": weights["model.embed_tokens.weight"].copy(),
        "model.layers.7.shared_head.head.weight": weights["lm_head.weight"].copy(),
    }
    source = write_published(tmp_path_factory.mktemp("whole"), RAW, weights, num_shards=5)
    (source / "README.md").write_text("# A model")
    assert min(path.stat().st_size for path in shards(source)) > 1.2 * FIRST_READ
    return source


@pytest.fixture(scope="session")
def whole(original):
    native = original.with_name("native")
    assert main(["from-hf", str(original), str(native)]) == 0
    return native


@pytest.fixture
def source(original, tmp_path):
    """A copy of its own for a test, to be deleted."""
    return Path(shutil.copytree(original, tmp_path / "source"))


@pytest.fixture(scope="session")
def processes():
    return forked()
