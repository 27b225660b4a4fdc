"""The tensor files of a published directory."""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from glm5_jax.errors import InputError, Missing
from glm5_jax.plain_files import is_plain_name
from glm5_jax.published.families import by_family
from glm5_jax.published.safetensors import SafetensorsFile
from glm5_jax.published.storage import Opener, open_storage
from glm5_jax.published.tensor_file import TensorFile
from glm5_jax.published.torch_file import TorchFile
from glm5_jax.remote import AnyPath, RemotePath
from glm5_jax.strict_json import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_AT_A_TIME = 16  # files that are opened, which takes time over a network


class _Kind(NamedTuple):
    """A format that tensors are published in."""

    index_name: str  # the file that says which other one holds which tensor
    single_name: str  # the file there is where there is no index
    suffixes: tuple[str, ...]
    open: Callable[[AnyPath, Opener], TensorFile]


_SAFETENSORS = _Kind(INDEX_NAME, SINGLE_NAME, (".safetensors",), SafetensorsFile)
_TORCH = _Kind(
    "pytorch_model.bin.index.json", "pytorch_model.bin", (".bin", ".pt", ".pth"), TorchFile
)


def open_files(
    directory: AnyPath,
    wanted: Callable[[str], bool] = lambda name: True,
    opener: Opener = open_storage,
) -> list[TensorFile]:
    """Opens the files of a published directory; of safetensors, if it has them.

    Args:
      wanted: tells by its name whether a tensor is; a file is only opened, and need only be there,
        if the index names one in it that is.

    Raises:
      InputError: a file is missing, damaged or outside the directory, or the index does not list
        exactly what the files hold. All mismatches are named.
    """
    kind, single = _find(directory)
    index_path = directory / kind.index_name
    listed = None if single else _read_index(index_path, kind)
    if listed is None:
        names = [single]
    else:
        used = {file for tensor, file in listed.items() if wanted(tensor)}
        listed = {tensor: file for tensor, file in listed.items() if file in used}
        names = sorted(used)

    def attempt(name: str) -> TensorFile | InputError:
        try:
            return kind.open(_inside(directory, name), opener)
        except InputError as error:
            return error

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        found = dict(zip(names, pool.map(attempt, names), strict=True))
    opened = [file for file in found.values() if isinstance(file, TensorFile)]
    try:
        if missing := [name for name in names if isinstance(found[name], Missing)]:
            said = f"{', '.join(missing)} missing, named by {kind.index_name}"
            raise InputError(f"{directory}: {said}")
        if faults := [str(error) for error in found.values() if isinstance(error, InputError)]:
            raise InputError("; ".join(faults))
        if listed is not None:
            _compare(index_path, listed, opened)
    except BaseException:
        for file in opened:
            file.close()
        raise
    return opened


def _find(directory: AnyPath) -> tuple[_Kind, str]:
    """The format of the files, and the name of the only one if there is no index."""
    for kind in (_SAFETENSORS, _TORCH):
        if (directory / kind.index_name).exists():
            return kind, ""
        if (directory / kind.single_name).exists():
            return kind, kind.single_name
    found = sorted(path.name for end in _TORCH.suffixes for path in directory.glob(f"*{end}"))
    if len(found) == 1:
        return _TORCH, found[0]
    hint = f"; of {', '.join(found)} it is not clear which is meant" if found else ""
    raise InputError(f"{directory}: has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")


def _read_index(path: AnyPath, kind: _Kind) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: weight_map is missing or not an object")
    expected = f"expected the plain name of a {' or '.join(kind.suffixes)} file"
    faults = [
        (tensor, f"is said to be in {name!r:.80}, {expected}")
        for tensor, name in weight_map.items()
        if not _is_plain(name, kind)
    ]
    if faults:
        said = "; ".join(f"tensor {subject} {fault}" for subject, fault, _ in by_family(faults))
        raise InputError(f"{path}: {said}")
    return weight_map


def _is_plain(name: Any, kind: _Kind) -> bool:
    """Whether it is the name of a tensor file, and no path that could lead elsewhere."""
    return is_plain_name(name) and name.endswith(kind.suffixes)


def _inside(directory: AnyPath, name: str) -> AnyPath:
    """The path of a file, which must not lead out of the directory.

    The one link that may is that of the Hugging Face cache: `snapshots/REVISION/NAME` leads to
    `blobs/` beside `snapshots/`.
    """
    path = directory / name
    if isinstance(path, RemotePath) or isinstance(directory, RemotePath):
        return path  # has no links
    real, home = Path(os.path.realpath(path)), directory.resolve()  # bears loops of links
    blobs = home.parent.parent / "blobs"
    if home not in real.parents and blobs not in real.parents:
        raise InputError(f"{path}: leads out of the directory, to {real}")
    return path


def _compare(index_path: AnyPath, listed: dict[str, str], files: list[TensorFile]) -> None:
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
