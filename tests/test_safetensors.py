import json

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.writer import Entry, file_header, split_shards
from glm5_jax.errors import InputError
from glm5_jax.published.safetensors import SafetensorsFile

VALUES = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(6).reshape(2, 3).astype(jnp.bfloat16),
    "c": np.arange(5, dtype=np.float16),
    "d": np.arange(8).reshape(4, 2).astype(jnp.float8_e4m3fn),
}


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("name", VALUES)
def test_rows_are_read_as_they_were_saved(tmp_path, name):
    save_file(VALUES, tmp_path / "x.safetensors")
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        whole = VALUES[name]
        for start in range(len(whole) + 1):
            for stop in range(start, len(whole) + 1):
                rows = file.read(name, start, stop)
                assert rows.dtype == whole.dtype
                np.testing.assert_array_equal(rows, whole[start:stop])


def test_a_written_file_is_read_by_the_safetensors_library(tmp_path):
    entries = [Entry(name, value.shape, value.dtype) for name, value in VALUES.items()]
    data = b"".join(value.tobytes() for value in VALUES.values())
    (tmp_path / "x.safetensors").write_bytes(file_header(entries) + data)
    with SafetensorsFile(tmp_path / "x.safetensors") as file:  # opens it with the library first
        for name, value in VALUES.items():
            np.testing.assert_array_equal(file.read(name, 0, len(value)), value)


@pytest.mark.parametrize("length", [0, 7, 8, 100, 300, -1])
def test_truncation_anywhere_is_noticed_on_opening(tmp_path, length):
    path = tmp_path / "x.safetensors"
    save_file(VALUES, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"x\.safetensors: not a valid"):
        SafetensorsFile(path)


HOSTILE = {
    "not json": (b"{", b""),
    "a list": (b"[]", b""),
    "a tensor twice": (b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2), bytes(8)),
    "overlap": ({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12)),
    "hole": ({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20)),
    "offsets backwards": ({"a": tensor(offsets=(8, 0))}, bytes(8)),
    "beyond the end": ({"a": tensor(shape=(4,), offsets=(0, 16))}, bytes(8)),
    "trailing bytes": ({"a": tensor()}, bytes(9)),
    "shape and size disagree": ({"a": tensor(shape=(3,))}, bytes(8)),
    "shape overflows": ({"a": tensor(shape=(2**62, 8))}, bytes(8)),
    "negative size": ({"a": tensor(shape=(-2,))}, bytes(8)),
    "unknown dtype": ({"a": tensor(dtype="F31")}, bytes(8)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_one_error(tmp_path, case):
    path = raw_file(tmp_path / "x.safetensors", *HOSTILE[case])
    with pytest.raises(InputError, match=r"x\.safetensors"):
        SafetensorsFile(path)


def test_a_huge_header_length_allocates_nothing(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="not a valid"):
        SafetensorsFile(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"x\.safetensors"):
        SafetensorsFile(tmp_path / "x.safetensors")


@hypothesis.given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 120))
def test_shards_keep_order_and_stay_within_their_size(sizes, limit):
    entries = [Entry(f"t{i}", (size,), np.dtype(np.int8)) for i, size in enumerate(sizes)]
    shards = split_shards(entries, limit)
    assert [entry for shard in shards for entry in shard] == entries
    for shard in shards:
        assert len(shard) == 1 or sum(entry.num_bytes for entry in shard) <= limit
