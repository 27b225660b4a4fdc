"""What conversions are made of, and what they come to when nothing ends them."""

import pytest

from convert.__main__ import main
from tests.resuming.runs import PUBLISHED, forked
from tests.tiny import TINY, float8_weights, random_weights, write_published


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    weights, _ = float8_weights(random_weights(TINY))
    return write_published(tmp_path_factory.mktemp("published"), TINY, weights, num_shards=7)


@pytest.fixture(scope="session")
def native(source, tmp_path_factory):
    """Converted from the source without an interruption, and back."""
    folder = tmp_path_factory.mktemp("native") / "from-hf"
    assert main(["from-hf", str(source), str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def whole(native):
    back = native.with_name("to-hf")
    assert main(["to-hf", str(native), str(back), *PUBLISHED]) == 0
    rounded = native.with_name("quantize")
    assert main(["quantize", str(native), str(rounded), "--to", "int4"]) == 0
    return {"from-hf": native, "to-hf": back, "quantize": rounded}


@pytest.fixture(scope="session")
def processes():
    return forked()
