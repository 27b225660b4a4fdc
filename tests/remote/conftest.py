"""A checkpoint on a disk, and in memory behind a network that does what a test likes."""

import fsspec
import pytest

from convert.__main__ import main
from glm5_jax import remote
from tests.remote.unruly import SMALL, Unruly, upload
from tests.tiny import TINY, random_weights, write_published


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "x"
    source = write_published(folder, TINY, random_weights(TINY), num_shards=7)
    for name, text in SMALL.items():
        (source / name).write_text(text)
    return source


@pytest.fixture(scope="session")
def native(source):
    native = source.with_name("native")
    assert main(["from-hf", str(source), str(native)]) == 0
    return native


@pytest.fixture
def url(source, monkeypatch):
    """The source in memory; what fails is tried again at once."""
    fsspec.register_implementation("unruly", Unruly, clobber=True)
    monkeypatch.setattr(Unruly, "store", {})
    monkeypatch.setattr(Unruly, "before", None)
    monkeypatch.setattr(Unruly, "after", None)
    monkeypatch.setattr(remote, "_PAUSES", (0, 0, 0, 0))
    upload(source)
    return "unruly://bucket/model"
