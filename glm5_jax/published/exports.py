"""Tensors that PyTorch programs name or stack in other ways, seen under their published names.

Only what headers say is changed: the bytes of a fused tensor are those of the published ones, one
after the other.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from glm5_jax.config import Config
from glm5_jax.console import notice
from glm5_jax.errors import InputError
from glm5_jax.published.families import by_family
from glm5_jax.published.fp8 import BLOCK, scale_shape
from glm5_jax.published.header import TensorInfo
from glm5_jax.remote import AnyPath

Headers = Mapping[str, Mapping[str, TensorInfo]]  # name of a file -> its tensors

_INNER = re.compile(r"((?:.*?\.)??)((?:layers\.\d+|embed_tokens|norm)\..+)")
_HEAD = re.compile(r"((?:.*\.)?)(lm_head\.weight)")
# What transformers' modules hold, and it saves with `save_original_format=False`: of shape
# [experts, rows, columns], the rows of gate before those of up.
_FUSED = re.compile(r"(.+\.mlp\.experts\.)(gate_up|down)_proj(?:\.weight)?(_scale_inv)?")
_PARTS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def as_published(
    directory: AnyPath, headers: Headers, config: Config
) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of files under their published names.

    Raises:
      InputError: names begin in several ways, or a fused tensor is not what the config demands, or
        is there beside what it is fused of. All cases are named.
    """
    renamed = _without_prefix(directory, headers)
    found: dict[str, dict[str, TensorInfo]] = {file: {} for file in headers}
    times: Counter[str] = Counter()
    faults = []
    for file, tensors in renamed.items():
        for name, info in tensors.items():
            fused = _FUSED.fullmatch(name)
            parts = _parts(fused, info, config) if fused else {name: info}
            if isinstance(parts, str):
                faults.append((name, parts))
            else:
                found[file] |= parts
                times.update(parts.keys())
    faults += [(name, "stands both alone and fused") for name, count in times.items() if count > 1]
    if faults:
        said = "; ".join(f"{subject} {fault}" for subject, fault, _ in by_family(faults))
        raise InputError(f"{directory}: {said}")
    return found


def _without_prefix(directory: AnyPath, headers: Headers) -> Headers:
    """Names as they were published, if all of them begin in one other way."""
    inner, head = (
        _beginnings(directory, pattern, (name for tensors in headers.values() for name in tensors))
        for pattern in (_INNER, _HEAD)
    )
    if inner is None or (inner, head or "") == ("model.", ""):
        return headers
    if head is not None and not inner.startswith(head):
        raise InputError(
            f"{directory}: layers are named {inner!r:.80} and the head {head!r:.80}, expected the "
            "second within the first"
        )
    notice(f"{directory}: tensors named {inner!r:.80} are read as 'model.'")

    def published(name: str) -> str:
        if match := _INNER.fullmatch(name):
            return "model." + match[2]
        match = _HEAD.fullmatch(name)
        return match[2] if match else name

    return {
        file: {published(name): info for name, info in tensors.items()}
        for file, tensors in headers.items()
    }


def _beginnings(directory: AnyPath, pattern: re.Pattern[str], names: Iterable[str]) -> str | None:
    """What precedes a pattern in all names that have it; None if none has.

    Raises:
      InputError: that differs.
    """
    found = {match[1]: "" for name in names if (match := pattern.fullmatch(name))}
    if len(found) > 1:
        said = " and ".join(
            f"with {start or 'nothing'}" for start, _, _ in by_family(found.items())
        )
        raise InputError(f"{directory}: names of tensors begin {said}, expected one of these")
    return next(iter(found), None)


def _parts(fused: re.Match[str], info: TensorInfo, config: Config) -> dict[str, TensorInfo] | str:
    """The published tensors that lie in a fused one, or why they do not."""
    prefix, kind, scale = fused.groups(default="")
    names, ffn = _PARTS[kind], config.moe.ffn
    shape: tuple[int, ...] = (ffn, config.dim) if kind == "gate_up" else (config.dim, ffn)
    if scale:
        if kind == "gate_up" and ffn % BLOCK:
            return f"may scale gate and up together: {BLOCK} does not divide their {ffn} rows"
        shape = scale_shape(shape)
    expected = (config.moe.num_experts, len(names) * shape[0], shape[1])
    if info.shape != expected:
        return f"has shape {list(info.shape)}, expected {list(expected)}"
    parts = {}
    part = info._replace(shape=shape)
    for expert in range(config.moe.num_experts):
        for name in names:
            parts[f"{prefix}{expert}.{name}.weight{scale}"] = part
            part = part._replace(start=part.start + part.num_bytes)
    return parts
