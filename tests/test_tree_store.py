import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from glm5_jax import chunks
from glm5_jax.chunks import layout
from glm5_jax.errors import InputError
from glm5_jax.mesh import make_mesh, put
from glm5_jax.tree_store import TreeReader
from glm5_jax.tree_writer import TreeWriter, write_tree

TREE = {
    "a.b": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "a.c": np.linspace(0, 1, 70).reshape(7, 10).astype(jnp.bfloat16),
    "step": np.array(17, np.int32),
    "e": np.arange(8).astype(jnp.float8_e4m3fn),
}
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 60)  # a.c in chunks of three rows
    leaves = {
        leaf: layout(x.shape, x.dtype, num_single_axes=leaf == "a.b") for leaf, x in TREE.items()
    }
    writer = TreeWriter(tmp_path / "tree", leaves)
    for leaf, place in leaves.items():
        for position in place.positions():
            writer.put(leaf, position, TREE[leaf][place.region(position)])
    writer.commit()
    return tmp_path / "tree"


@pytest.mark.parametrize("fetched_whole", [0, 2**26], ids=["slices", "whole"])
def test_sharded_leaves_are_put_together_chunk_by_chunk(tmp_path, monkeypatch, fetched_whole):
    """Shards of x.w, 3 by 5, are neither parts of its chunks, 4 by 10, nor made of them."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 80)
    monkeypatch.setattr("glm5_jax.mesh._FETCHED_WHOLE", fetched_whole)
    mesh = make_mesh({"data": 4, "expert": 1, "model": 2})
    held = {"x.w": np.arange(120).reshape(12, 10).astype(jnp.bfloat16), "x.all": np.array(3.5)}
    specs = {"x.w": jax.P("data", "model"), "x.all": jax.P()}
    arrays = {leaf: put(array, mesh, specs[leaf]) for leaf, array in held.items()}
    leaves = {leaf: layout(array.shape, array.dtype) for leaf, array in arrays.items()}
    assert leaves["x.w"].chunk == (4, 10)
    with jax.set_mesh(mesh):  # as in training
        write_tree(tmp_path / "tree", arrays, leaves)
    for leaf, array in restore(tmp_path / "tree").items():
        np.testing.assert_array_equal(array, held[leaf])


def restore(directory):
    reader = TreeReader(directory)
    return {leaf: reader.restore(leaf, DEVICE) for leaf in reader.leaves}


def data_files(directory):
    return sorted(p for p in directory.rglob("*") if p.parent != directory and p.name != ".zarray")


def test_leaves_come_back_as_they_were(saved):
    restored = restore(saved)
    assert restored.keys() == TREE.keys()
    for leaf, expected in TREE.items():
        assert restored[leaf].dtype == expected.dtype
        np.testing.assert_array_equal(restored[leaf], expected)


def test_chunks_come_back_one_by_one(saved):
    reader = TreeReader(saved)
    assert reader.leaves["a.c"].grid == (3, 1) and reader.leaves["a.b"].grid == (2, 1, 1)
    for leaf, place in reader.leaves.items():
        for position in place.positions():
            np.testing.assert_array_equal(
                reader.read(leaf, position), TREE[leaf][place.region(position)]
            )


def test_a_sharded_leaf_is_put_together_from_parts_of_chunks(saved):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "y"))
    restored = TreeReader(saved).restore("a.c", sharding)
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, TREE["a.c"])


def test_orbax_alone_can_restore_the_tree(saved):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(saved)
    np.testing.assert_array_equal(tree["a"]["b"], TREE["a.b"])
    np.testing.assert_array_equal(tree["a"]["c"], TREE["a.c"])


def test_a_flipped_bit_anywhere_is_found_and_its_leaf_named(saved):
    rng = np.random.default_rng(0)
    for path in data_files(saved):
        whole = path.read_bytes()
        leaf = path.parent.name
        size = min(len(whole), TREE[leaf].nbytes)  # the last chunk of a.c is padded
        broken = bytearray(whole)
        broken[rng.integers(min(size, 20))] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        with pytest.raises(InputError, match=f"leaf {leaf}, chunk {path.name}: damaged"):
            restore(saved)
        path.write_bytes(whole)
    restore(saved)


@pytest.mark.parametrize("fault", ["truncated", "deleted"])
def test_a_chunk_that_is_not_whole_is_named(saved, fault):
    for path in data_files(saved):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1]) if fault == "truncated" else path.unlink()
        said = "" if fault == "truncated" else ": is missing"
        with pytest.raises(InputError, match=f"leaf {path.parent.name}, chunk {path.name}{said}"):
            restore(saved)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["_METADATA", "manifest.json", "a.b/.zarray"])
@pytest.mark.parametrize("fault", ["truncated", "deleted", "garbage"])
def test_damaged_metadata_is_one_error(saved, name, fault):
    path = saved / name
    text = path.read_bytes()
    if fault == "deleted":
        path.unlink()
    else:
        path.write_bytes(text[: len(text) // 2] if fault == "truncated" else b"\xff\x00garbage")
    with pytest.raises(InputError, match="tree/"):
        restore(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "something else"},
        {"leaves": {"a": {"shape": [2], "dtype": "float32"}}},
        {"leaves": {"a": {"shape": [2], "dtype": "float99", "chunk": [2], "sha256": ["x"]}}},
        {"leaves": {"a": {"shape": [2], "dtype": "float32", "chunk": [0], "sha256": ["x"]}}},
        {"leaves": {"a": {"shape": [4], "dtype": "float32", "chunk": [2], "sha256": ["x"]}}},
        {"leaves": [1, 2]},
    ],
)
def test_a_senseless_manifest_is_one_error(saved, change):
    path = saved / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"manifest\.json"):
        TreeReader(saved)


def test_a_chunk_of_another_shape_or_dtype_is_refused(tmp_path):
    writer = TreeWriter(tmp_path / "tree", {"a": layout((4, 2), np.float32)})
    with pytest.raises(ValueError, match="expected float32"):
        writer.put("a", (0, 0), np.zeros((4, 2), np.float64))
    with pytest.raises(ValueError, match="expected float32"):
        writer.put("a", (0, 0), np.zeros((2, 4), np.float32))


@pytest.mark.parametrize("killed", ["while chunks are put", "in commit", "after Orbax wrote"])
def test_another_writer_goes_on_with_what_was_put(tmp_path, monkeypatch, killed):
    leaves = {leaf: layout(x.shape, x.dtype, leaf == "a.b") for leaf, x in TREE.items()}
    digests = {}
    first = TreeWriter(tmp_path / "tree", leaves)
    chosen = list(leaves)[: 2 if killed == "while chunks are put" else None]
    for leaf in chosen:
        for position in leaves[leaf].positions():
            chunk = TREE[leaf][leaves[leaf].region(position)]
            digests[leaf, position] = first.put(leaf, position, chunk)
    if killed != "while chunks are put":
        step = "json.dumps" if killed == "in commit" else "pathlib.Path.rename"
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            target = "glm5_jax.tree_writer." + step if step == "json.dumps" else step
            patched.setattr(target, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            first.commit()

    second = TreeWriter(tmp_path / "tree", leaves)
    for (leaf, position), digest in digests.items():
        second.has_put(leaf, position, digest)
    for leaf in leaves.keys() - set(chosen):
        for position in leaves[leaf].positions():
            second.put(leaf, position, TREE[leaf][leaves[leaf].region(position)])
    second.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]
    for leaf, array in restore(tmp_path / "tree").items():
        np.testing.assert_array_equal(array, TREE[leaf])


def test_a_chunk_that_did_not_reach_the_disk_is_told_to_all(tmp_path, monkeypatch):
    """The system says so once, to whoever asks first."""
    leaves = {"a": layout((4, 2), np.float32)}
    writer = TreeWriter(tmp_path / "tree", leaves)
    writer.put("a", (0, 0), np.zeros((4, 2), np.float32))
    with monkeypatch.context() as patched, pytest.raises(OSError, match="Input/output"):
        patched.setattr("glm5_jax.tree_writer.sync", fail)
        writer.flush()
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            writer.flush()
    with pytest.raises(OSError, match="Input/output"):
        writer.commit()


def fail(path):
    raise OSError(5, "Input/output error")
