"""Files of JSON that may say anything: what they say is true, or one clear error."""

import contextlib
import io
import json

import hypothesis
import hypothesis.strategies as st
import pytest

from convert.__main__ import main
from glm5_jax.config_keys import LARGEST_SIZE
from glm5_jax.published.files import INDEX_NAME
from tests.damage import SMALL, little_memory, make_checkpoints

HUGE = [LARGEST_SIZE, 2**31, 10**9, 2**62, 2**63, 2**64, 10**30, 10**400, -1, -(2**63)]
NUMBERS = st.integers(-3, 600) | st.sampled_from(HUGE) | st.floats()
WORDS = st.sampled_from(
    [
        "float32",
        "float8_e4m3fn",
        "int8",
        "uint8",
        "O",
        "i4,i4",
        "full",
        "shared",
        "dense",
        "sparse",
        "F",
        "fp8",
    ]
    + ["../x", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J", "default", "x" * 5000, "nan"]
    + ["model-00001-of-00003.safetensors", "model.safetensors", "ghost.safetensors"]
)
PLAIN = st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=4)
ODD = st.recursive(
    PLAIN,
    lambda held: st.lists(held, max_size=4) | st.dictionaries(WORDS, held, max_size=3),
    max_leaves=6,
) | st.builds(lambda value, count: [value] * count, PLAIN, st.sampled_from([7, 512, 5_000]))


@st.composite
def changes(draw, paths):
    """Places in an object, and what is to stand there; None is to be taken out."""
    place = draw(st.sampled_from(paths))
    return place, draw(st.none() | ODD.map(lambda value: [value]))


@st.composite
def texts(draw, whole, paths):
    """JSON in which some things are changed, and then perhaps some bytes."""
    value = json.loads(whole)
    for path, new in draw(st.lists(changes(paths), min_size=1, max_size=3)):
        held = value
        for key in path[:-1]:
            held = held.get(key) if isinstance(held, dict) else None
        if isinstance(held, dict):
            held.pop(path[-1], None)
            held |= {path[-1]: new[0]} if new else {}
    text = json.dumps(value).encode()
    how = draw(st.sampled_from(["as it is"] * 8 + ["twice", "other bytes"]))
    if how == "twice":
        text = text[:-1] + b"," + text[1:]
    for _ in range(3 if how == "other bytes" else 0):
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + bytes([draw(st.integers(0, 255))]) + text[at + 1 :]
    return text


CONFIG_KEYS = [
    *SMALL,
    *("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset", "first_k_dense_replace"),
    *("quantization_config", "rope_theta", "rope_scaling", "num_experts", "torch_dtype", "unknown"),
    *("\x1b[2J", "\ud800\nx", "x" * 5000),
]
CONFIG_PATHS = [(key,) for key in CONFIG_KEYS]
CONFIG_PATHS += [("rope_parameters", "rope_theta"), ("rope_parameters", "rope_type")]
NAMES = ["model.embed_tokens.weight", "lm_head.weight", "ghost", "\x1b[2J", ""]
INDEX_PATHS = [("weight_map",), ("metadata",), *(("weight_map", name) for name in NAMES)]
EXPERTS = "segments.0.experts.1.up"
LEAVES = ["head", "norm", "mtp.join", "ghost", "../../x"]
LEAVES += [EXPERTS, f"{EXPERTS}.values", f"{EXPERTS}.scales"]
MANIFEST_PATHS = [(key,) for key in ("format", "leaves", "metadata_sha256", "beside", "unknown")]
MANIFEST_PATHS += [("beside", name) for name in ("config.json", "../x", "")]
MANIFEST_PATHS += [("leaves", leaf) for leaf in LEAVES]
MANIFEST_PATHS += [
    ("leaves", leaf, key) for leaf in LEAVES for key in ("shape", "dtype", "chunk", "sha256")
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints whose files are changed one at a time, and what these files are to say."""
    folder = make_checkpoints(tmp_path_factory.mktemp("made"))
    files = {
        "config": folder / "source" / "config.json",
        "index": folder / "source" / INDEX_NAME,
        "manifest": folder / "native" / "params" / "manifest.json",
        "manifest of few bits": folder / "few" / "params" / "manifest.json",
    }
    return folder, files, {name: path.read_bytes() for name, path in files.items()}


PATHS = {
    "config": CONFIG_PATHS,
    "index": INDEX_PATHS,
    "manifest": MANIFEST_PATHS,
    "manifest of few bits": MANIFEST_PATHS,
}
COMMANDS = {
    "config": ["check", "source"],
    "index": ["check", "source"],
    "manifest": ["verify", "native", "--sample", "0.05", "--threads", "1"],
    "manifest of few bits": ["verify", "few", "--sample", "0.05", "--threads", "1"],
}


def check_one(made, name, data):
    """Whatever a file says ends in one line or is taken, within some memory."""
    folder, files, wholes = made
    command, directory, *options = COMMANDS[name]
    files[name].write_bytes(data.draw(texts(wholes[name], PATHS[name])))
    said = io.StringIO()
    try:
        with (
            little_memory(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(said),
        ):
            status = main([command, str(folder / directory), *options])
    finally:
        files[name].write_bytes(wholes[name])
    *notices, last = said.getvalue().splitlines() or [""]
    assert status in (0, 2) and len(last) < 20_000
    assert all(line.isprintable() for line in (*notices, last))
    assert len(notices) <= 2 and not any("error" in line for line in notices)
    if status:
        assert last.startswith(f"glm5-convert: error: {folder / directory}")


@pytest.mark.parametrize("name", PATHS)
@hypothesis.given(st.data())
@hypothesis.settings(max_examples=200)
def test_what_a_file_says_is_true_or_one_line(made, name, data):
    check_one(made, name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
@hypothesis.given(st.data())
@hypothesis.settings(max_examples=10_000 // len(PATHS))
def test_ten_thousand_files_that_may_say_anything(made, name, data):
    check_one(made, name, data)
