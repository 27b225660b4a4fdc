"""What a conversion says of itself, beside what it made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm5_jax.checkpoint import PARAMS_NAME
from glm5_jax.errors import InputError
from glm5_jax.findings import installed_versions
from glm5_jax.plain_files import is_plain_name
from glm5_jax.published.native import NativeSource
from glm5_jax.remote import AnyPath, RemotePath
from glm5_jax.strict_json import read_json
from glm5_jax.tree_store import MANIFEST_NAME, file_digest

RECORD_NAME = "conversion.json"
CARD_NAME = "CONVERSION.md"
_FORMAT = "glm5-jax conversion 1"

Files = Mapping[str, Mapping[str, Any]]  # name -> size and sha256


def write_record(
    directory: Path,
    command: str,
    source: AnyPath,
    options: Mapping[str, Any],
    *,
    read: Files,
    written: Files,
) -> None:
    """Writes what was done, for programs and for readers.

    Args:
      read: the files of the source, a digest of None being that of one that was read in part;
        digests of what is not a file stand in its manifest.
      written: the files of weights that were made.
    """
    record = {
        "format": _FORMAT,
        "command": command,
        "source": str(source) if isinstance(source, RemotePath) else source.resolve().name,
        "revision": revision(source),
        "options": options,
        "versions": installed_versions(),
        "read": read,
        "written": written,
    }
    (directory / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n")
    # A folder's name need not be text.
    card = _card(record).encode("utf-8", errors="backslashreplace")
    (directory / CARD_NAME).write_bytes(card)


def entries_of(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of what a workspace notes of shards, what the record of the conversion keeps."""
    return {
        shard: {"size": record["size"], "sha256": record["sha256"]}
        for shard, record in records.items()
    }


def entry_of(path: Path) -> dict[str, Any]:
    """What the record keeps of a small file."""
    return {"size": path.stat().st_size, "sha256": file_digest(path)}


def manifest_entry(source: NativeSource) -> dict[str, dict[str, Any]]:
    """What the record keeps of a native source: its manifest, which has digests of all weights.

    Raises:
      InputError: it is not what it was when the source was opened.
    """
    name = f"{PARAMS_NAME}/{MANIFEST_NAME}"
    path = source.directory / name
    if file_digest(path) != source.digest:
        raise InputError(f"{path}: changed while weights were converted")
    return {name: entry_of(path)}


def revision(source: AnyPath) -> str | None:
    """The revision of a model: `hf://...@REVISION`, or `snapshots/REVISION` in the cache."""
    if isinstance(source, RemotePath):
        return source.revision
    path = source.resolve()
    return path.name if path.parent.name == "snapshots" else None


def written_files(directory: Path) -> dict[str, dict[str, Any]] | None:
    """The files of weights that a conversion made there; None if it says of none.

    Raises:
      InputError: the record is damaged.
    """
    path = directory / RECORD_NAME
    if not path.exists():
        return None
    record = read_json(path)
    written = record.get("written")
    if record.get("format") != _FORMAT or not isinstance(written, dict):
        raise InputError(f"{path}: damaged, or not of this version")
    for name, entry in written.items():
        if not _is_entry(name, entry):
            raise InputError(f"{path}: {name!r:.80} is {entry!r:.80}, expected a size and a sha256")
    return written or None


def _is_entry(name: str, entry: Any) -> bool:
    """Whether it can be a file beside the record."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and type(entry.get("size")) is int
        and entry["size"] >= 0
        and is_plain_name(name)
    )


def _card(record: Mapping[str, Any]) -> str:
    lines = [
        f"# Converted from {record['source']}",
        "",
        f"By `glm5-convert {record['command']}` of glm5-jax.",
        "",
        f"- Revision: {record['revision'] or 'not known'}",
        *(f"- {name}: {value}" for name, value in record["options"].items()),
        *(f"- {name} {version}" for name, version in record["versions"].items()),
    ]
    for title, key in (("What was read", "read"), ("What was written", "written")):
        if record[key]:
            lines += ["", f"## {title}", "", "| file | bytes | SHA-256 |", "|---|---|---|"]
            lines += [
                f"| {name} | {entry['size']:,} | {_digest(entry)} |"
                for name, entry in record[key].items()
            ]
    lines += ["", "`glm5-convert verify` reads it again and compares."]
    return "\n".join(lines) + "\n"


def _digest(entry: Mapping[str, Any]) -> str:
    return f"`{entry['sha256']}`" if entry["sha256"] else "read in part"
