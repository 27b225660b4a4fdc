"""Reading the files of `torch.save` row by row, without loading them.

Such a file is a zip archive: a pickle says what tensors there are, and each storage is a member
whose bytes are those of its tensors. torch reads the pickle, restricted to tensors and onto the
`meta` device, and says where storages begin; the archive's own table says whether that can be true.
"""

import io
import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from glm5_jax.console import notice
from glm5_jax.errors import InputError
from glm5_jax.published.families import by_family
from glm5_jax.published.header import LONGEST, TensorInfo
from glm5_jax.published.storage import StorageReader
from glm5_jax.published.tensor_file import DTYPES, TensorFile

_LOCAL_HEADER_BYTES = 30  # before a member's name; its last four say how long that and the rest are
_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}  # torch's dtypes are called alike
# Where training scripts put a model's tensors, beside those of an optimizer.
_NESTED = ("state_dict", "model_state_dict", "model", "module")


class TorchFile(TensorFile):
    """An open file of `torch.save`; what it wants to run is not run, but an error."""

    def _read_header(self) -> dict[str, TensorInfo]:
        if self.read_bytes(0, min(4, self.version.size)) != b"PK\x03\x04":
            raise InputError(
                f"{self.path}: is not a zip archive, expected one as torch.save makes since torch "
                "1.6; torch.save(torch.load(file, weights_only=True), file) makes it one"
            )
        with io.BufferedReader(StorageReader(self._storage)) as file:
            members = self._members(file)
            entries = self._entries(file)
        tensors, faults = {}, []
        for name, value in entries.items():
            if fault := _fault(name, value, members):
                faults.append((str(name), fault))
            else:
                begin = value.untyped_storage()._checkpoint_offset
                start = begin + value.storage_offset() * value.element_size()
                tensors[name] = TensorInfo(_NAMES[_dtype_name(value)], tuple(value.shape), start)
        self._refuse(faults)
        return tensors

    def _refuse(self, faults: Iterable[tuple[str, str]]) -> None:
        """Raises `InputError` if there are any."""
        if said := "; ".join(f"{subject} {fault}" for subject, fault, _ in by_family(faults)):
            raise InputError(f"{self.path}: {said}")

    def _members(self, file: BinaryIO) -> dict[int, int]:
        """The members of the archive: where their bytes begin, and how many these are."""
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except Exception as error:  # zipfile raises of what is damaged whatever it runs into
            raise InputError(f"{self.path}: not a valid zip archive: {error}") from None
        members, faults = {}, []
        for entry in entries:
            start = self._start_of(entry)
            members[start] = entry.file_size
            if fault := self._member_fault(entry, start):
                faults.append((entry.filename, fault))
        self._refuse(faults)
        return members

    def _start_of(self, entry: zipfile.ZipInfo) -> int:
        """Where the bytes of a member begin, after a header of its own."""
        if entry.header_offset < 0:
            raise InputError(f"{self.path}: not a valid zip archive: members begin before the file")
        header = self.read_bytes(entry.header_offset, _LOCAL_HEADER_BYTES)
        return entry.header_offset + len(header) + sum(struct.unpack("<HH", header[-4:]))

    def _member_fault(self, entry: zipfile.ZipInfo, start: int) -> str | None:
        if entry.compress_type != zipfile.ZIP_STORED:
            return "is compressed, expected to be stored as torch.save does"
        if start + entry.file_size > self.version.size:
            return "ends after the file; is it truncated?"
        if entry.filename.endswith("/data.pkl") and entry.file_size > LONGEST:
            return f"has {entry.file_size:,} bytes, expected at most {LONGEST:,}"
        if entry.filename.endswith("/byteorder"):
            order = bytes(self.read_bytes(start, min(entry.file_size, 8)))
            if order != b"little":
                return f"is {order!r}, expected b'little'"
        return None

    def _entries(self, file: BinaryIO) -> Mapping[Any, Any]:
        """What the pickle holds under names, as tensors without data."""
        try:
            import torch
            from torch.serialization import get_unsafe_globals_in_checkpoint
        except ModuleNotFoundError:
            raise InputError(
                f"{self.path}: needs the package torch: pip install 'glm5-jax[torch]'"
            ) from None
        try:
            file.seek(0)
            unsafe = sorted(get_unsafe_globals_in_checkpoint(file))
            self._refuse((name, "is asked for, expected tensors alone") for name in unsafe)
            file.seek(0)
            found = torch.load(file, map_location="meta", weights_only=True)
        except InputError:
            raise
        except Exception as error:  # torch raises of what is damaged whatever it runs into
            raise InputError(
                f"{self.path}: its pickle cannot be read as tensors: {type(error).__name__}"
            ) from None
        if not isinstance(found, dict):
            raise InputError(f"{self.path}: is a {type(found).__name__}, expected named tensors")
        for key in _NESTED:
            if isinstance(nested := found.get(key), dict):
                notice(f"{self.path}: the tensors under {key!r} are read")
                return nested
        return found


def _dtype_name(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _fault(name: Any, value: Any, members: Mapping[int, int]) -> str | None:
    """Why an entry is not a tensor whose bytes lie together in a member of the archive."""
    import torch

    if not isinstance(name, str):
        return f"is a key of type {type(name).__name__}, expected a name"
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"is of type {type(value).__name__}, expected a tensor"
    if value.layout != torch.strided or value.is_quantized or value.is_neg():
        return "is sparse, quantized or stored negated, expected plain numbers"
    if _dtype_name(value) not in _NAMES:
        return f"has dtype {_dtype_name(value)}, expected one of {', '.join(_NAMES)}"
    if not value.is_contiguous():
        strides = f"strides {list(value.stride())} of shape {list(value.shape)}"
        return f"has {strides}, expected contiguous rows"
    held = members.get(value.untyped_storage()._checkpoint_offset)
    if held is None or (value.storage_offset() + value.numel()) * value.element_size() > held:
        return "has bytes that are not where torch.save puts them in the archive"
    return None
