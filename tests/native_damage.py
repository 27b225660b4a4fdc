"""Ways to damage a native checkpoint, and what is to be said of each."""

import hashlib
import os
import shutil

import numpy as np

from tests.damage import edit_json, replace

MANIFEST = "params/manifest.json"
METADATA = "params/_METADATA"
CHUNK = "params/head/0.0"
ZARRAY = "params/head/.zarray"
STACKED = "segments.0.experts.1.up"  # 1 layer, 4 experts


def manifest(edit):
    return lambda native: edit_json(native / MANIFEST, edit)


def leaf(name="head", **changes):
    return manifest(lambda found: found["leaves"][name].update(changes))


def renamed(name, to):
    return manifest(lambda found: found["leaves"].update({to: found["leaves"].pop(name)}))


def beside(value):
    return manifest(lambda found: found.update(beside=value))


def zarray(**changes):
    return lambda native: edit_json(native / ZARRAY, lambda found: found.update(changes))


def gone(*names):
    return lambda native: [(native / name).unlink() for name in names]


def text(name, data):
    return lambda native: (native / name).write_bytes(data)


def instead(name, by):
    return lambda native: replace(native / name, by)


def config(**changes):
    """Another config, which the manifest agrees with."""

    def damage(native):
        edit_json(native / "config.json", lambda found: found.update(changes))
        digest = hashlib.sha256((native / "config.json").read_bytes()).hexdigest()
        beside({"config.json": digest})(native)

    return damage


def relaid(name, shape, dtype, chunk, digests):
    """A leaf whose zarr metadata say what the manifest says."""

    def damage(native):
        leaf(name, shape=shape, dtype=dtype, chunk=chunk, sha256=digests)(native)
        path = native / "params" / name / ".zarray"
        held = {"bfloat16": "bfloat16"}.get(dtype) or np.dtype(dtype).str
        edit_json(path, lambda found: found.update(shape=shape, chunks=chunk, dtype=held))

    return damage


def without_folder(native):
    shutil.rmtree(native / "params" / "head")


def folder_is_a_file(native):
    without_folder(native)
    (native / "params" / "head").touch()


def linked_to_another(native):
    (native / CHUNK).unlink()
    (native / CHUNK).symlink_to(native / "params" / "embedding" / "0.0")


def pickled(native):
    shutil.rmtree(native / "params")
    (native / "params").touch()


def halves(native):
    """The head in two chunks side by side, all of it consistent."""
    whole = np.fromfile(native / CHUNK, np.float32).reshape(97, 64)
    parts = [np.ascontiguousarray(part) for part in np.split(whole, 2, axis=1)]
    for number, part in enumerate(parts):
        (native / "params" / "head" / f"0.{number}").write_bytes(part.tobytes())
    digests = [hashlib.sha256(part.tobytes()).hexdigest() for part in parts]
    relaid("head", [97, 64], "float32", [97, 32], digests)(native)


def together(native):
    """All experts of a layer in one chunk, all of it consistent."""
    folder = native / "params" / STACKED
    whole = b"".join((folder / f"0.{expert}.0.0").read_bytes() for expert in range(4))
    (folder / "0.0.0.0").write_bytes(whole)
    digest = hashlib.sha256(whole).hexdigest()
    relaid(STACKED, [1, 4, 32, 64], "float32", [1, 4, 32, 64], [digest])(native)


CASES = {
    # name: (how to damage, *what the one line says)
    "a chunk that is missing": (gone(CHUNK), "leaf head, chunk 0.0: is missing"),
    "an empty chunk": (text(CHUNK, b""), "leaf head, chunk 0.0: damaged, has 0 bytes"),
    "a chunk that is too long": (
        lambda native: os.truncate(native / CHUNK, 24_833),
        "leaf head, chunk 0.0: damaged, has 24,833 bytes, expected 24,832",
    ),
    "a chunk of a terabyte": (
        instead(CHUNK, "a terabyte of holes"),
        "leaf head, chunk 0.0: damaged, has 1,099,511,627,776 bytes",
    ),
    "a chunk that is another": (linked_to_another, "leaf head, chunk 0.0: damaged, its SHA-256"),
    "a chunk that is a folder": (instead(CHUNK, "a folder"), "leaf head, chunk 0.0: "),
    "a chunk that is a pipe": (instead(CHUNK, "a pipe"), "leaf head, chunk 0.0: "),
    "a chunk that is a device": (instead(CHUNK, "a link to a device"), "leaf head, chunk 0.0: "),
    "a chunk that is a loop": (instead(CHUNK, "a loop of links"), "leaf head, chunk 0.0: "),
    "a leaf that is missing": (without_folder, "head/.zarray: "),
    "a leaf that is a file": (folder_is_a_file, "head/.zarray: "),
    "a leaf without metadata": (gone(ZARRAY), "head/.zarray: "),
    "metadata of a leaf that are garbage": (text(ZARRAY, b"\xff"), "head/.zarray: "),
    "metadata of a leaf that are cut off": (text(ZARRAY, b'{"chun'), "head/.zarray: "),
    "metadata of another shape": (zarray(shape=[64, 97]), "head/.zarray: "),
    "metadata of another dtype": (zarray(dtype="<i4"), "head/.zarray: "),
    "metadata of another order": (zarray(order="F"), "head/.zarray: "),
    "metadata of other names": (zarray(dimension_separator="/"), "head/.zarray: "),
    "metadata of a compressor": (zarray(compressor={"id": "zlib", "level": 1}), "head/.zarray: "),
    "metadata that are a folder": (instead(ZARRAY, "a folder"), "head/.zarray: "),
    "metadata that are a pipe": (instead(ZARRAY, "a pipe"), "head/.zarray: "),
    "metadata that are a device": (instead(ZARRAY, "a link to a device"), "head/.zarray: "),
    "no manifest": (gone(MANIFEST), "manifest.json: No such file"),
    "a manifest that is no JSON": (text(MANIFEST, b"leaves"), "manifest.json: not valid JSON"),
    "a manifest that is a list": (text(MANIFEST, b"[]"), "manifest.json", "found list"),
    "a manifest that is a folder": (instead(MANIFEST, "a folder"), "manifest.json: not a file"),
    "a manifest that is a pipe": (instead(MANIFEST, "a pipe"), "manifest.json: not a file"),
    "a manifest of a terabyte": (instead(MANIFEST, "a terabyte of holes"), "manifest.json"),
    "a manifest of another format": (manifest(lambda m: m.update(format=1)), "format is 1"),
    "a manifest of no leaves": (manifest(lambda m: m.pop("leaves")), "manifest.json: damaged"),
    "leaves in a list": (manifest(lambda m: m.update(leaves=[1])), "manifest.json: damaged"),
    "a leaf of nothing": (manifest(lambda m: m["leaves"].update(head=3)), "manifest.json: damaged"),
    "a shape of letters": (leaf(shape="ab"), "manifest.json: damaged"),
    "a shape below zero": (leaf(shape=[-97, 64]), "manifest.json: damaged"),
    "a shape of another rank": (leaf(shape=[97]), "manifest.json: damaged"),
    "another shape": (
        leaf(shape=[98, 64], chunk=[98, 64]),
        "leaf head has shape [98, 64], expected [97, 64]",
    ),
    "chunks of zero": (leaf(chunk=[0, 64]), "manifest.json: damaged"),
    "chunks of a half": (leaf(chunk=[48.5, 64]), "manifest.json: damaged"),
    "a billion chunks": (leaf(shape=[10**9, 64], chunk=[1, 64]), "manifest.json: damaged"),
    "more chunks than numbers": (leaf(shape=[2**70, 64], chunk=[1, 64]), "manifest.json: damaged"),
    "a digest that is missing": (leaf(sha256=[]), "manifest.json: damaged"),
    "a digest too many": (leaf(sha256=["", ""]), "manifest.json: damaged"),
    "digests in no list": (leaf(sha256=5), "manifest.json: damaged"),
    "a dtype that is none": (leaf(dtype="float99"), "manifest.json: damaged"),
    "a dtype of objects": (leaf(dtype="O"), "leaf head"),
    "a dtype of records": (leaf(dtype="i4,i4"), "leaf head"),
    "a dtype of integers": (
        relaid("head", [97, 64], "int32", [97, 64], [""]),
        "leaf head has dtype int32",
    ),
    "a dtype of doubles": (
        relaid("head", [97, 64], "float64", [97, 64], [""]),
        "leaf head has dtype float64",
    ),
    "leaves that are unknown or missing": (
        renamed("head", "../../secret"),
        "leaf head is missing",
        "leaf ../../secret is unknown",
    ),
    "a leaf whose name moves the cursor": (renamed("head", "\x1b[2J"), r"\x1b[2J", "is unknown"),
    "chunks side by side": (halves, "leaf head", "chunks of [97, 32]"),
    "chunks of many tensors": (together, f"leaf {STACKED}", "chunks of [1, 4, 32, 64]"),
    "a file beside that leads up": (beside({"../secret": "0"}), "manifest.json", "'../secret'"),
    "a file beside that is elsewhere": (beside({"/etc/passwd": "0"}), "'/etc/passwd'"),
    "a file beside of zero bytes": (beside({"a\0b": "0"}), "manifest.json"),
    "a file beside without a name": (beside({"": "0"}), "manifest.json"),
    "a file beside that is missing": (beside({"config.json": "0", "b": "0"}), "not as it was"),
    "files beside in a list": (beside(["config.json"]), "manifest.json", "beside"),
    "no files beside": (manifest(lambda m: m.pop("beside")), "manifest.json", "beside"),
    "a device beside": (
        lambda native: (
            instead("tokenizer.json", "a link to a device")(native),
            beside({"tokenizer.json": "0"})(native),
        ),
        "tokenizer.json",
    ),
    "no metadata": (gone(METADATA), "_METADATA: damaged"),
    "metadata of garbage": (text(METADATA, b"{}"), "_METADATA: damaged"),
    "metadata that are a folder, too": (instead(METADATA, "a folder"), "_METADATA: not a file"),
    "metadata that are a pipe, too": (instead(METADATA, "a pipe"), "_METADATA: not a file"),
    "no digest of metadata": (manifest(lambda m: m.pop("metadata_sha256")), "_METADATA: damaged"),
    "no config": (gone("config.json"), "config.json: No such file"),
    "another config": (
        lambda native: edit_json(native / "config.json", lambda c: c.update(rms_norm_eps=0.5)),
        "config.json: not as it was written",
    ),
    "a config of other sizes": (
        config(vocab_size=96),
        "leaf head has shape [97, 64], expected [96, 64]",
        "leaf embedding has shape [97, 64], expected [96, 64]",
    ),
    "a config of a billion experts": (config(n_routed_experts=10**9), "n_routed_experts is"),
    "no weights": (pickled, "has no params, expected a native checkpoint"),
}
