"""The tensor files of a published directory."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from glm5_jax.errors import InputError
from glm5_jax.published.families import by_family
from glm5_jax.published.safetensors import SafetensorsFile, TensorFile
from glm5_jax.strict_json import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def open_files(directory: Path) -> list[TensorFile]:
    """Opens the files of a published directory.

    Raises:
      InputError: a file is missing, damaged or outside the directory, or the index does not list
        exactly what the files hold. All mismatches are named.
    """
    index_path = directory / INDEX_NAME
    if index_path.exists():
        listed = _read_index(index_path)
    elif (directory / SINGLE_NAME).exists():
        listed = None
    else:
        pickles = any(directory.glob("*.bin")) or any(directory.glob("*.pth"))
        hint = "; pickles (.bin, .pth) are not read" if pickles else ""
        raise InputError(f"{directory}: has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")
    names = [SINGLE_NAME] if listed is None else sorted(set(listed.values()))
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise InputError(f"{directory}: {', '.join(missing)} missing, named by {INDEX_NAME}")

    opened: list[TensorFile] = []
    try:
        faults = []
        for name in names:
            try:
                opened.append(SafetensorsFile(_inside(directory, name)))
            except InputError as error:
                faults.append(str(error))
        if faults:
            raise InputError("; ".join(faults))
        if listed is not None:
            _compare(index_path, listed, opened)
    except BaseException:
        for file in opened:
            file.close()
        raise
    return opened


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: weight_map is missing or not an object")
    faults = [
        (tensor, f"is said to be in {name!r:.80}, expected the plain name of a .safetensors file")
        for tensor, name in weight_map.items()
        if not _is_plain(name)
    ]
    if faults:
        said = "; ".join(f"tensor {subject} {fault}" for subject, fault, _ in by_family(faults))
        raise InputError(f"{path}: {said}")
    return weight_map


def _is_plain(name: Any) -> bool:
    """Whether it is the name of a tensor file, and no path that could lead elsewhere."""
    return (
        isinstance(name, str)
        and name == os.path.basename(name)
        and not set("\0\\") & set(name)
        and name.endswith(".safetensors")
    )


def _inside(directory: Path, name: str) -> Path:
    """The path of a file, which must not lead out of the directory.

    The one link that may is that of the Hugging Face cache: `snapshots/REVISION/NAME` leads to
    `blobs/` beside `snapshots/`.
    """
    path = directory / name
    real, home = path.resolve(), directory.resolve()
    blobs = home.parent.parent / "blobs"
    if home not in real.parents and blobs not in real.parents:
        raise InputError(f"{path}: leads out of the directory, to {real}")
    return path


def _compare(index_path: Path, listed: dict[str, str], files: list[TensorFile]) -> None:
    held = [(name, file.path.name) for file in files for name in file.tensors]
    times = Counter(name for name, _ in held)
    pairs = set(held)
    faults = [(name, f"stands in {count} files") for name, count in times.items() if count > 1]
    faults += [(name, "is not listed") for name in times if name not in listed]
    faults += [
        (name, f"is not in {file}")
        for name, file in listed.items()
        if (name, file) not in pairs and times[name] < 2
    ]
    if faults:
        said = "; ".join(f"{subject} {fault}" for subject, fault, _ in by_family(faults))
        raise InputError(f"{index_path}: {said}")
