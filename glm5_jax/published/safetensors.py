"""Reading safetensors files slice by slice, without trusting them.

The safetensors library names one fault of a file and keeps the last of two tensors of one name, and
cannot hand float8 to numpy; so headers are read and checked here. What passes and the library
refuses is refused, too.
"""

import threading

from safetensors import SafetensorError, safe_open

from glm5_jax.errors import InputError
from glm5_jax.published.header import LONGEST, TensorInfo, tensors_of
from glm5_jax.published.storage import Data
from glm5_jax.published.tensor_file import TensorFile
from glm5_jax.strict_json import parse_json

FIRST_READ = 2**17  # bytes, which most headers fit in
_parsing = threading.Lock()  # of one header at a time, for the worst takes a GiB


class SafetensorsFile(TensorFile):
    """An open safetensors file."""

    def _read_header(self) -> dict[str, TensorInfo]:
        where = f"{self.path}: not a valid safetensors file"
        header = self._read_start(where)
        self.data_start = len(header)
        with _parsing:
            found = parse_json(memoryview(header)[8:], where)
            size = self.version.size - self.data_start
            tensors, faults = tensors_of(found, self.data_start, size)
            if faults:
                raise InputError(f"{where}: {'; '.join(faults)}")
            try:
                with (
                    self._storage.local_file(header) as local,
                    safe_open(local, framework="np"),
                ):
                    pass
            except SafetensorError as error:
                raise InputError(f"{where}: {error}") from None
            except OSError as error:
                raise InputError(f"{self.path}: {error.strerror or error}") from None
        return tensors

    def _read_start(self, where: str) -> Data:
        """What the file starts with: the length of its header, and the header."""
        first = self.read_bytes(0, min(FIRST_READ, self.version.size))
        length = int.from_bytes(first[:8], "little")
        stop = 8 + length
        if length > LONGEST or stop > self.version.size:
            raise InputError(
                f"{where}: its first bytes promise a header of {length:,} bytes, the file has "
                f"{self.version.size:,}; is it truncated?"
            )
        if stop <= len(first):
            return first[:stop]
        return first + self.read_bytes(len(first), stop - len(first))
