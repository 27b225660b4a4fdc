"""What the header of a safetensors file says, and whether it can be true."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from glm5_jax.published.families import by_family

# Bytes of a header. Those of all of GLM-5's tensors would take half of it, and parsing as many
# bytes of the worst kind less than a GiB of memory.
LONGEST = 2**25
_MOST_AXES = 64
_LARGEST = 2**63  # elements or bytes, beyond which other readers overflow
# Bits of an element, by the format's names.
_BITS = (
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8)
    | dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64", "C64"), 64)
)


class TensorInfo(NamedTuple):
    """What a header says of a tensor."""

    dtype: str  # as the file spells it
    shape: tuple[int, ...]
    start: int  # of its bytes, counted from the start of the file

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8


def tensors_of(
    header: Mapping[str, Any], data_start: int, data_size: int
) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of a file.

    Args:
      header: as parsed.
      data_start: where the data begins in the file, in bytes.
      data_size: how many bytes of it there are.

    Returns:
      The tensors, and a phrase for everything that the format does not allow. If there is any, the
      tensors are not to be trusted.
    """
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    faults: list[tuple[str, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not _is_metadata(entry):
                faults.append((name, "is not an object of strings"))
            continue
        found = list(_entry_faults(entry))
        if found:
            faults += [(name, fault) for fault in found]
            continue
        start, stop = entry["data_offsets"]
        tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), data_start + start)
        spans.append((start, stop, name))
    if not faults:  # else there are gaps where tensors were left out
        faults += _gaps(sorted(spans), data_size)
    return tensors, [f"{subject} {fault}" for subject, fault, _ in by_family(faults)]


def _is_metadata(entry: Any) -> bool:
    if entry is None:
        return True
    return isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values())


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST  # True is no number here


def _entry_faults(entry: Any) -> Iterator[str]:
    """What is wrong with what a header says of one tensor by itself."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        yield "is not an object of dtype, shape and data_offsets"
        return
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    before = dtype if isinstance(dtype, str) else None
    if before not in _BITS:
        yield f"has dtype {dtype!r:.40}, which safetensors does not have"
    sound_shape = isinstance(shape, list) and all(map(_is_size, shape[: _MOST_AXES + 1]))
    if not sound_shape or len(shape) > _MOST_AXES:
        sound_shape = False
        yield f"has shape {shape!r:.80}, expected a list of at most {_MOST_AXES} sizes"
    sound_offsets = isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))
    if not sound_offsets or offsets[0] > offsets[1]:
        yield f"has data_offsets {offsets!r:.80}, expected a start and an end"
    if before not in _BITS or not sound_shape or not sound_offsets or offsets[0] > offsets[1]:
        return
    bits, held = math.prod(shape) * _BITS[before], offsets[1] - offsets[0]
    if math.prod(size or 1 for size in shape) * _BITS[before] >= _LARGEST:
        yield f"has shape {shape!r:.80}, which is too large for any file"
    elif bits != 8 * held:
        yield f"has {held:,} bytes, expected {-(-bits // 8):,} for {dtype}{shape!r:.80}"


def _gaps(spans: list[tuple[int, int, str]], data_size: int) -> Iterator[tuple[str, str]]:
    """Where tensors overlap, or bytes belong to none."""
    end, previous = 0, ""
    for start, stop, name in spans:
        if start < end:
            yield name, f"begins at byte {start:,}, within {previous}"
        elif start > end:
            yield name, f"begins at byte {start:,}, {start - end:,} after what is before it"
        end, previous = max(end, stop), name
    if end > data_size:
        yield "the data", f"has {data_size:,} bytes, expected {end:,}; is the file truncated?"
    elif end < data_size:
        yield previous or "the header", f"is followed by {data_size - end:,} bytes of no tensor"
