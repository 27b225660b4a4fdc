import json
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from convert.writer import Entry, file_header, split_shards
from glm5_jax.errors import InputError
from glm5_jax.published.header import LONGEST
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
    "not json": (b"{", b"", "not valid JSON"),
    "a list": (b"[]", b"", "expected a JSON object, found list"),
    "bad UTF-8": (b'{"\xff":1}', b"", "not valid JSON"),
    "10,000 deep": (b'{"a":' * 10_000, b"", "not valid JSON"),
    "a tensor twice": (
        b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2),
        bytes(8),
        "'a' stands twice",
    ),
    "overlap": ({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12), "byte 4, within a"),
    "hole": ({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20), "byte 12, 4 after"),
    "a hole first": ({"a": tensor(offsets=(4, 12))}, bytes(12), "begins at byte 4, 4 after"),
    "offsets backwards": ({"a": tensor(offsets=(8, 0))}, bytes(8), "a has data_offsets [8, 0]"),
    "negative offset": ({"a": tensor(offsets=(-8, 0))}, bytes(8), "a has data_offsets [-8, 0]"),
    "three offsets": ({"a": tensor(offsets=(0, 4, 8))}, bytes(8), "expected a start and an end"),
    "offsets that overflow": (
        {"a": tensor(offsets=(2**64 - 8, 2**64))},
        bytes(8),
        "expected a start and an end",
    ),
    "beyond the end": (
        {"a": tensor(shape=(4,), offsets=(0, 16))},
        bytes(8),
        "has 8 bytes, expected 16; is the file truncated?",
    ),
    "trailing bytes": ({"a": tensor()}, bytes(9), "a is followed by 1 bytes of no tensor"),
    "nothing but bytes": ({}, bytes(9), "the header is followed by 9 bytes"),
    "shape and size disagree": ({"a": tensor(shape=(3,))}, bytes(8), "8 bytes, expected 12"),
    "shape overflows": ({"a": tensor(shape=(2**62, 8))}, bytes(8), "too large for any file"),
    "shape overflows to the size": (
        {"a": tensor(shape=(2**32, 2**32, 0), offsets=(0, 0))},
        b"",
        "too large for any file",
    ),
    "negative size": ({"a": tensor(shape=(-2,))}, bytes(8), "a has shape [-2]"),
    "fractional size": ({"a": tensor(shape=(2.0,))}, bytes(8), "a has shape [2.0]"),
    "true as a size": ({"a": tensor(shape=(True, 2))}, bytes(8), "a has shape [True, 2]"),
    "100,000 axes": ({"a": tensor(shape=[2**40] * 100_000)}, bytes(8), "at most 64 sizes"),
    "unknown dtype": ({"a": tensor(dtype="F31")}, bytes(8), "a has dtype 'F31'"),
    "a list as dtype": ({"a": tensor(dtype=["F32"])}, bytes(8), "a has dtype ['F32']"),
    "an entry that is none": ({"a": 3}, bytes(8), "a is not an object of"),
    "an entry without shape": ({"a": {"dtype": "F32"}}, bytes(8), "a is not an object of"),
    "metadata of numbers": (
        {"__metadata__": {"a": 1}, "b": tensor()},
        bytes(8),
        "__metadata__ is not an object of strings",
    ),
    "a name that moves the cursor": ({"\x1b[2J": 3}, b"", r"'\x1b[2J' is not an object"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_one_error(tmp_path, case):
    header, data, said = HOSTILE[case]
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(InputError) as raised:
        SafetensorsFile(path)
    assert str(raised.value).startswith(f"{path}: not a valid safetensors file: ")
    assert said in str(raised.value) and len(str(raised.value)) < 1000


def test_every_fault_of_a_header_is_named(tmp_path):
    header = {f"layers.{i}.w": tensor(dtype="F31") for i in range(500)}
    header |= {"a": tensor(shape=(3,)), "b": tensor(shape=(-1,), offsets=(5, 1))}
    with pytest.raises(InputError) as raised:
        SafetensorsFile(raw_file(tmp_path / "x.safetensors", header))
    said = str(raised.value)
    assert "layers.*.w (500 tensors, such as layers.0.w) has dtype 'F31'" in said
    assert "a has 8 bytes" in said and "b has shape" in said and "b has data_offsets" in said


SMALL = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "I64": 8, "BOOL": 1}


@st.composite
def headers(draw):
    """Sound headers, and how long their data is."""
    header, end = {}, 0
    for name in draw(st.lists(st.text(max_size=3), max_size=4, unique=True)):
        if name == "__metadata__":
            continue
        dtype = draw(st.sampled_from(sorted(SMALL)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        stop = end + int(np.prod(shape, dtype=np.int64)) * SMALL[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, stop]}
        end = stop
    return header, end


NUMBERS = st.integers(-3, 40) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30, 0.5, True])
ODD = NUMBERS | st.none() | st.text(max_size=3) | st.lists(NUMBERS, max_size=4)


@st.composite
def broken_headers(draw):
    """Headers in which some things are changed, with data of about the right length."""
    header, size = draw(headers())
    for name in list(header):
        change = draw(st.integers(0, 8))
        if change == 0:
            header[name] = draw(ODD)
        elif change < 4:
            key = ("dtype", "shape", "data_offsets")[change - 1]
            header[name][key] = draw(ODD)
        elif change == 4:
            header[name]["data_offsets"][draw(st.integers(0, 1))] += draw(st.integers(-9, 9))
    if draw(st.integers(0, 5)) == 0:
        header["__metadata__"] = draw(ODD | st.dictionaries(st.text(max_size=2), ODD, max_size=2))
    text = json.dumps(header).encode()
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):  # and bytes of the text
        at = draw(st.integers(0, max(0, len(text) - 1)))
        text = text[:at] + bytes([draw(st.integers(0, 255))]) + text[at + 1 :]
    return text, bytes(max(0, size + draw(st.sampled_from([0, 0, 0, -1, 1, 8]))))


def check_like_the_library(folder, text, data):
    """What we open the library opens, too, and sees the same in; all else is one error."""
    path = raw_file(folder / "x.safetensors", text, data)
    try:
        with SafetensorsFile(path) as file:
            ours = {name: (info.dtype, list(info.shape)) for name, info in file.tensors.items()}
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        try:
            with safe_open(path, framework="np"):
                assert any(said in str(error) for said in STRICTER), error
        except SafetensorError:
            pass
        return
    with safe_open(path, framework="np") as file:
        theirs = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert ours == {name: (s.get_dtype(), s.get_shape()) for name, s in theirs.items()}


# What the library lets pass.
STRICTER = (
    "stands twice",
    "is not an object of dtype, shape and data_offsets",
    "too large for any",
)


@hypothesis.given(broken_headers())
@hypothesis.settings(max_examples=300)
def test_headers_that_may_be_anything(tmp_path_factory, broken):
    check_like_the_library(tmp_path_factory.getbasetemp(), *broken)


@pytest.mark.slow
@hypothesis.given(broken_headers())
@hypothesis.settings(max_examples=10_000)
def test_ten_thousand_headers_that_may_be_anything(tmp_path_factory, broken):
    check_like_the_library(tmp_path_factory.getbasetemp(), *broken)


@hypothesis.given(headers())
def test_sound_headers_are_opened(tmp_path_factory, sound):
    header, size = sound
    path = raw_file(tmp_path_factory.getbasetemp() / "y.safetensors", header, bytes(size))
    with SafetensorsFile(path) as file:
        assert file.tensors.keys() == header.keys()


@pytest.mark.slow
@pytest.mark.parametrize("unit", [b"[],", b'{"":0},', b'"a",', b"0,"])
def test_the_longest_header_takes_less_than_a_gibibyte(tmp_path, unit):
    """In a process of its own, whose memory is limited."""
    text = b'{"a":[' + unit * ((LONGEST - 20) // len(unit))
    text += unit[:-1] + b"]}"
    path = raw_file(tmp_path / "x.safetensors", text)
    code = (
        "import resource, sys; from pathlib import Path;"
        "from glm5_jax.published.safetensors import SafetensorsFile;"
        "from glm5_jax.errors import InputError;"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096;"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)\n"
        "try: SafetensorsFile(Path(sys.argv[1]))\n"
        "except InputError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "is not an object of" in done.stdout, done.stderr


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
