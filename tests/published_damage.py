"""Ways to damage a published checkpoint, and what is to be said of each."""

import json
import os
import shutil

import jax.numpy as jnp
import numpy as np

from glm5_jax.published.files import INDEX_NAME
from glm5_jax.published.header import LONGEST
from tests.damage import SMALL, edit_header, edit_json, replace, weights
from tests.tiny import write_published

FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
EMBEDDING = "model.embed_tokens.weight"  # the first tensor of the first file
MATRIX = "model.layers.0.self_attn.q_b_proj.weight"  # in float8
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"  # in float8
OTHER_EXPERT = EXPERT.replace("2", "0")
NORM = "model.layers.1.input_layernorm.weight"


def header(edit, file=FIRST):
    return lambda source: edit_header(source / file, edit)


def entry(name, **changes):
    """Changes what the header of the first file says of a tensor."""
    return header(lambda found: found[name].update(changes))


def moved(by_start, by_stop, name=EMBEDDING):
    def edit(found):
        offsets = found[name]["data_offsets"]
        offsets[:] = offsets[0] + by_start, offsets[1] + by_stop

    return header(edit)


def doubled(found):
    text = json.dumps(found)
    name = json.dumps(EMBEDDING)
    return (text[:-1] + f", {name}: {json.dumps(found[EMBEDDING])}}}").encode()


def index(edit):
    return lambda source: edit_json(source / INDEX_NAME, lambda found: edit(found["weight_map"]))


def listed(name):
    """Has the index say that two tensors are in a file of that name."""
    return index(lambda weight_map: weight_map.update({NORM: name, EMBEDDING: name}))


def instead(file, by):
    return lambda source: replace(source / file, by)


def text(file, data):
    return lambda source: (source / file).write_bytes(data)


def config(**changes):
    return lambda source: edit_json(source / "config.json", lambda found: found.update(changes))


def tensors(**changes):
    """Has other tensors than the config demands: of each, a function of what it was."""

    def damage(source):
        held = dict(weights())
        for name, change in changes.items():
            value = change(held.get(name))
            held.pop(name, None) if value is None else held.update({name: value})
        write_published(source, SMALL, held, num_shards=3)

    return damage


def scale(value):
    def change(scales):
        changed = scales.copy()
        changed[0, 0] = value
        return changed

    return tensors(**{MATRIX + "_scale_inv": change})


def linked_out(source):
    (source / FIRST).rename(source.parent / "outside.safetensors")
    (source / FIRST).symlink_to("../outside.safetensors")


def doubled_in_index(source):
    path = source / INDEX_NAME
    path.write_text(path.read_text().replace(f'"{NORM}"', f'"{EMBEDDING}"'))


def in_two_files(source):
    shutil.copyfile(source / SECOND, source / FIRST)


CASES = {
    # name: (how to damage, *what the one line says)
    "tensors overlap": (moved(-4, -4, NORM), f"{NORM} begins at", "within"),
    "a hole between tensors": (moved(8, 8), FIRST, f"{EMBEDDING} begins at byte 8"),
    "a tensor beyond the end": (
        entry(EMBEDDING, data_offsets=[2**40, 2**40 + 97 * 64 * 4]),
        FIRST,
        "is the file truncated?",
    ),
    "offsets that overflow": (
        entry(EMBEDDING, data_offsets=[2**64 - 8, 2**64]),
        FIRST,
        f"{EMBEDDING} has data_offsets",
    ),
    "offsets backwards": (entry(EMBEDDING, data_offsets=[8, 0]), f"{EMBEDDING} has data_offsets"),
    "a shape that overflows": (entry(EMBEDDING, shape=[2**62, 8]), EMBEDDING, "too large"),
    "a negative shape": (entry(EMBEDDING, shape=[-97, -64]), f"{EMBEDDING} has shape [-97, -64]"),
    "a dtype that is none": (entry(EMBEDDING, dtype="F31"), f"{EMBEDDING} has dtype 'F31'"),
    "a dtype of numbers": (entry(EMBEDDING, dtype=32), f"{EMBEDDING} has dtype 32"),
    "a dtype of integers": (entry(EMBEDDING, dtype="I32"), f"{EMBEDDING} has dtype I32"),
    "a tensor twice in a header": (header(doubled), FIRST, f"'{EMBEDDING}' stands twice"),
    "a header that is no JSON": (header(lambda _: b"{'a': 1}"), FIRST, "not valid JSON"),
    "a header that is a list": (header(lambda _: b"[1]"), FIRST, "found list"),
    "a header of garbage": (header(lambda _: b"\xff\x00\x1b[2J" * 9), FIRST, "not valid JSON"),
    "a header 100,000 deep": (header(lambda _: b"[" * 100_000), FIRST, "not valid JSON"),
    "a header of an exabyte": (
        text(FIRST, (2**60).to_bytes(8, "little")),
        FIRST,
        f"promise a header of {2**60:,} bytes",
    ),
    "a header of a terabyte of holes": (
        lambda source: (
            text(FIRST, (LONGEST + 1).to_bytes(8, "little"))(source),
            os.truncate(source / FIRST, 2**40),
        ),
        f"promise a header of {LONGEST + 1:,} bytes",
    ),
    "a name that moves the cursor": (
        header(lambda found: found.update({"\x1b[2J": found.pop(EMBEDDING)})),
        r"\x1b[2J",
    ),
    "an empty file": (text(SECOND, b""), SECOND, "is it truncated?"),
    "bytes of no tensor": (
        lambda source: os.truncate(source / SECOND, (source / SECOND).stat().st_size + 3),
        SECOND,
        "3 bytes of no tensor",
    ),
    "an index that leads up": (listed("../secret.safetensors"), NORM, EMBEDDING, "plain name"),
    "an absolute index": (listed("/etc/secret.safetensors"), NORM, EMBEDDING, "plain name"),
    "an index of zero bytes": (listed("a\0.safetensors"), NORM, EMBEDDING, "plain name"),
    "an index of no names": (listed(["a.safetensors"]), NORM, EMBEDDING, "plain name"),
    "an index of half a letter": (listed("\ud800.safetensors"), NORM, EMBEDDING, "plain name"),
    "an index that moves the cursor": (listed("\x1b[2J.safetensors"), NORM, "plain name"),
    "an index of a very long name": (listed("a" * 300 + ".safetensors"), "aaa.safetensors"),
    "a file that is a link out": (linked_out, FIRST, "leads out of the directory"),
    "a file that is a link to a device": (instead(FIRST, "a link to a device"), FIRST, "leads out"),
    "a file that is a loop of links": (instead(FIRST, "a loop of links"), FIRST, "Too many levels"),
    "a file that is a folder": (instead(FIRST, "a folder"), FIRST, "not a file"),
    "a file that is a pipe": (instead(FIRST, "a pipe"), FIRST, "not a file"),
    "files that are missing": (
        lambda source: [(source / name).unlink() for name in (FIRST, THIRD)],
        FIRST,
        THIRD,
        "missing",
    ),
    "tensors that the index does not list": (
        index(lambda weight_map: [weight_map.pop(name) for name in (NORM, EMBEDDING)]),
        f"{NORM} is not listed",
        f"{EMBEDDING} is not listed",
    ),
    "tensors that only the index has": (
        index(lambda weight_map: weight_map.update({"ghost": FIRST, "shade": SECOND})),
        f"ghost is not in {FIRST}",
        f"shade is not in {SECOND}",
    ),
    "a tensor twice in the index": (doubled_in_index, INDEX_NAME, f"'{EMBEDDING}' stands twice"),
    "tensors in two files": (in_two_files, INDEX_NAME, "stands in 2 files"),
    "an index that is no JSON": (text(INDEX_NAME, b"weight_map"), INDEX_NAME, "not valid JSON"),
    "an index of nothing": (text(INDEX_NAME, b'{"weight_map": {}}'), INDEX_NAME, "weight_map"),
    "an index that is a folder": (instead(INDEX_NAME, "a folder"), INDEX_NAME, "not a file"),
    "an index that is a pipe": (instead(INDEX_NAME, "a pipe"), INDEX_NAME, "not a file"),
    "an index that is a device": (instead(INDEX_NAME, "a link to a device"), "not a file"),
    "an index of a terabyte": (
        instead(INDEX_NAME, "a terabyte of holes"),
        INDEX_NAME,
        "has 1,099,511,627,776 bytes",
    ),
    "no index": (lambda source: (source / INDEX_NAME).unlink(), "has neither"),
    "no config": (lambda source: (source / "config.json").unlink(), "config.json: No such file"),
    "a config that is a pipe": (instead("config.json", "a pipe"), "config.json", "not a file"),
    "a config that is a device": (instead("config.json", "a link to a device"), "not a file"),
    "a config of a terabyte": (instead("config.json", "a terabyte of holes"), "config.json"),
    "a config of a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers is"),
    "a config of a billion experts": (config(n_routed_experts=10**9), "n_routed_experts is"),
    "a config of too many experts in all": (
        config(
            num_hidden_layers=512,
            n_routed_experts=4096,
            mlp_layer_types=["sparse"] * 512,
            indexer_types=["full"] * 512,
        ),
        "n_routed_experts is 4096 in 512 layers",
    ),
    "a config 500 deep": (
        text("config.json", b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}"),
        "config.json: is nested deeper than",
    ),
    "a config of other sizes": (
        config(vocab_size=96, q_lora_rank=40),
        f"{EMBEDDING} has shape [97, 64], expected [96, 64]",
        f"{MATRIX} has shape",
    ),
    "a config of another model": (config(model_type="llama"), "model_type is 'llama'"),
    "tensors that are missing": (
        tensors(**{NORM: lambda _: None, EMBEDDING: lambda _: None}),
        f"{NORM} is missing",
        f"{EMBEDDING} is missing",
    ),
    "tensors that are unknown": (
        tensors(odd=lambda _: np.zeros(3, np.float32), even=lambda _: np.zeros(2, np.float32)),
        "odd is unknown",
        "even is unknown",
    ),
    "tensors of another shape": (
        tensors(**{NORM: lambda w: w[:-1], EMBEDDING: lambda w: np.ascontiguousarray(w.T)}),
        f"{NORM} has shape [63], expected [64]",
        f"{EMBEDDING} has shape [64, 97], expected [97, 64]",
    ),
    "a leaf of several dtypes": (
        tensors(
            **{
                EXPERT: lambda w: w.astype(np.float16),
                OTHER_EXPERT: lambda w: w.astype(np.float32),
                EXPERT + "_scale_inv": lambda _: None,
                OTHER_EXPERT + "_scale_inv": lambda _: None,
            }
        ),
        f"{EXPERT} has dtype F16, expected F32 as in other layers",
    ),
    "scales that are missing": (
        tensors(**{name + "_scale_inv": lambda _: None for name in (MATRIX, EXPERT)}),
        f"{MATRIX} has dtype F8_E4M3 but no _scale_inv",
        f"{EXPERT} has dtype F8_E4M3 but no _scale_inv",
    ),
    "scales of another shape": (
        tensors(**{MATRIX + "_scale_inv": lambda w: np.ones((2, 3), np.float32)}),
        f"{MATRIX} has F32 scales of shape [2, 3]",
    ),
    "scales of another dtype": (
        tensors(**{MATRIX + "_scale_inv": lambda w: w.astype(jnp.bfloat16)}),
        f"{MATRIX} has BF16 scales",
    ),
    "scales of nothing": (
        tensors(**{NORM + "_scale_inv": lambda _: np.ones((1, 1), np.float32)}),
        f"{NORM}_scale_inv is unknown",
    ),
    "a scale that is NaN": (scale(np.nan), f"{MATRIX}_scale_inv is nan at [0, 0]"),
    "a scale that is infinite": (scale(np.inf), f"{MATRIX}_scale_inv is inf at [0, 0]"),
    "a scale that is zero": (scale(0.0), f"{MATRIX}_scale_inv is 0.0 at [0, 0]"),
    "a scale that is minus zero": (scale(-0.0), f"{MATRIX}_scale_inv is 0.0 at [0, 0]"),
    "a scale that is negative": (scale(-1.0), f"{MATRIX}_scale_inv is -1.0 at [0, 0]"),
    "a copy that is none": (
        tensors(**{"model.layers.2.shared_head.head.weight": lambda _: weights()[EMBEDDING]}),
        "model.layers.2.shared_head.head.weight differs from lm_head.weight",
    ),
}
