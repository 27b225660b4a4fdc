"""Records of JSON Lines and Parquet files, of which one field is a text."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from glm5_jax.errors import InputError
from glm5_jax.strict_json import parse_json

_ROWS_AT_ONCE = 1024  # of a Parquet file


class Record(NamedTuple):
    """One text of a file."""

    number: int  # of its line or row, from 1
    text: str
    size: int  # bytes of the file that it takes up


def holds_records(path: Path) -> bool:
    """Whether the name of a file says that it holds records."""
    return path.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))


def read_records(path: Path, field: str) -> Iterator[Record]:
    """Reads the records of a file one after the other; lines without anything are none.

    Raises:
      InputError: the file is damaged, or a record has no text under the name `field`.
    """
    return (_read_parquet if path.suffix == ".parquet" else _read_jsonl)(path, field)


def _read_jsonl(path: Path, field: str) -> Iterator[Record]:
    with path.open("rb") as raw:
        begins = 0
        for number, line in enumerate(_lines(raw, path), start=1):
            ends = raw.tell()
            if line.strip():
                where = f"{path}: line {number}"
                value = parse_json(line, where).get(field)
                yield Record(number, _text(value, field, where), ends - begins)
                begins = ends


def _lines(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    if path.suffix != ".gz":
        yield from raw
        return
    try:
        with gzip.GzipFile(fileobj=raw) as unpacked:
            yield from unpacked
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file: {error}") from None


def _read_parquet(path: Path, field: str) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{path}: needs the package pyarrow: pip install 'glm5-jax[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise InputError(f"{path}: has no column {field!r}, only {', '.join(names)}")
            bytes_per_row = path.stat().st_size / max(file.metadata.num_rows, 1)
            number = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    size = int(bytes_per_row * number) - int(bytes_per_row * (number - 1))
                    yield Record(number, _text(value, field, f"{path}: row {number}"), size)
    except (pyarrow.ArrowException, OSError) as error:  # a damaged page is an OSError
        raise InputError(f"{path}: not a whole Parquet file: {error!s:.200}") from None


def _text(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {field} is {value!r:.80}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can have halves of characters
        raise InputError(f"{where}: {field} is {value!r:.80}, expected valid Unicode") from None
    return value
