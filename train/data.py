"""Prepared data: the tokens of every source, and rows of them with their documents numbered."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glm5_jax.errors import InputError
from glm5_jax.strict_json import read_json
from train.shards import Shard, Tokens, check_shard, shard_path, token_dtype

SPLITS = ("train", "held_out")
META_NAME = "data.json"
FORMAT = "glm5-jax data 2"
SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # a part of the names of files
_READ_WHOLE = 2**30  # bytes of shards that are compared with their digests in a second or two


class Batch(NamedTuple):
    """Rows of packed documents."""

    tokens_BT: np.ndarray  # int32
    segment_BT: np.ndarray  # int32, numbers the documents of a row from 1


class Split:
    """Tokens cut into rows of one length; what is left over at the end is in none."""

    def __init__(self, tokens: Tokens, length: int, end_id: int):
        """Takes the tokens of documents one after the other, each ended by `end_id`."""
        self.num_rows = len(tokens) // length
        self._tokens = tokens
        self._length = length
        self._end_id = end_id

    def row(self, number: int) -> np.ndarray:
        """The tokens of a row."""
        return self._tokens.read(number * self._length, (number + 1) * self._length)

    def rows(self, numbers: Sequence[int]) -> Batch:
        """The rows of the given numbers."""
        return pack([self.row(number) for number in numbers], self._end_id)


def pack(rows: Sequence[np.ndarray], end_id: int) -> Batch:
    """A batch of rows of tokens, in which a document starts after each `end_id`."""
    tokens_BT = np.stack(rows)
    ends_BT = tokens_BT == end_id
    starts_BT = np.pad(ends_BT[:, :-1], ((0, 0), (1, 0)))
    return Batch(tokens_BT, 1 + np.cumsum(starts_BT, axis=1, dtype=np.int32))


class Written(NamedTuple):
    """What is written down of a split of a source."""

    documents: int
    bytes: int  # of the text, in UTF-8
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        """Of all shards."""
        return sum(shard.tokens for shard in self.shards)

    def to_json(self) -> dict[str, object]:
        """What `_read_split` reads."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "shards": [shard._asdict() for shard in self.shards],
        }


class Data:
    """A prepared data directory."""

    def __init__(self, directory: Path):
        """Opens a directory.

        All of its tokens are compared with what was written, if they are at most a GiB. Of more,
        only the lengths of the files are.

        Raises:
          InputError: it is not one, or its files are not those that were written.
        """
        self.directory = directory
        if not (directory / META_NAME).is_file():
            raise InputError(f"{directory}: has no {META_NAME}, expected what prepare made")
        meta = read_json(directory / META_NAME)
        where = f"{directory / META_NAME}: "
        if meta.get("format") != FORMAT:
            raise InputError(
                f"{where}format is {meta.get('format')!r:.80}, expected {FORMAT!r}: prepare it "
                "again with this version"
            )
        self.vocab_size = _integer(meta, "vocab_size", 1, where)
        self.end_id = _integer(meta, "end_id", 0, where)
        self._written = _read_sources(meta, where)
        self.sources = tuple(self._written)
        dtype = token_dtype(self.vocab_size)
        shards = [
            each
            for source in self.sources
            for split in SPLITS
            for each in self._shards(split, source)
        ]
        whole = dtype.itemsize * sum(shard.tokens for _, shard in shards) <= _READ_WHOLE
        for path, shard in shards:
            check_shard(path, shard, dtype, whole=whole)

    def _shards(self, split: str, source: str) -> Iterator[tuple[Path, Shard]]:
        for number, shard in enumerate(self._written[source][split].shards):
            yield shard_path(self.directory, source, split, number), shard

    def _of(self, split: str, source: str | None) -> list[Written]:
        sources = self.sources if source is None else (source,)
        return [self._written[each][split] for each in sources]

    def num_documents(self, split: str, source: str | None = None) -> int:
        """Documents of a split, of one source or of all."""
        return sum(written.documents for written in self._of(split, source))

    def num_tokens(self, split: str, source: str | None = None) -> int:
        """Tokens of a split, of one source or of all."""
        return sum(written.tokens for written in self._of(split, source))

    @property
    def digest(self) -> str:
        """Of the tokens of all splits of all sources, and of their files."""
        written = {
            source: {split: written.shards for split, written in splits.items()}
            for source, splits in self._written.items()
        }
        return hashlib.sha256(json.dumps(written).encode()).hexdigest()[:24]

    def bytes_per_token(self, split: str, source: str | None = None) -> float:
        """Length of the text that a token stands for, in bytes of UTF-8, on average."""
        num_bytes = sum(written.bytes for written in self._of(split, source))
        return num_bytes / self.num_tokens(split, source)

    def tokens(self, split: str, source: str | None = None) -> Tokens:
        """The tokens of a split, of one source or of all, one after the other."""
        sources = self.sources if source is None else (source,)
        return Tokens(
            [(path, shard.tokens) for each in sources for path, shard in self._shards(split, each)],
            token_dtype(self.vocab_size),
        )

    def split(self, name: str, length: int, at_least: int = 1, source: str | None = None) -> Split:
        """A split in rows of one length; raises `InputError` if there are too few of them."""
        rows = Split(self.tokens(name, source), length, self.end_id)
        if rows.num_rows < at_least:
            which = "" if source is None else f"source {source!r} "
            raise InputError(
                f"{self.directory}: {which}has {self.num_tokens(name, source)} tokens in the split "
                f"{name!r}, expected at least {at_least} x {length} of them"
            )
        return rows


def _read_sources(meta: Mapping[str, Any], where: str) -> dict[str, dict[str, Written]]:
    sources = _object(meta, "sources", where)
    if not sources or not all(SOURCE_NAME.fullmatch(name) for name in sources):
        raise InputError(f"{where}sources are {', '.join(sources)!r:.80}, expected names")
    return {
        source: {
            split: _read_split(_object(sources, source, where), split, f"{where}{source}.")
            for split in SPLITS
        }
        for source in sources
    }


def _read_split(splits: Mapping[str, Any], split: str, where: str) -> Written:
    values, where = _object(splits, split, where), f"{where}{split}."
    shards = values.get("shards")
    if not isinstance(shards, list) or not shards:
        raise InputError(f"{where}shards is {shards!r:.80}, expected a list of shards")
    return Written(
        _integer(values, "documents", 1, where),
        _integer(values, "bytes", 1, where),
        tuple(_read_shard(shard, f"{where}shards[{n}]") for n, shard in enumerate(shards)),
    )


def _read_shard(values: object, where: str) -> Shard:
    if not isinstance(values, dict):
        raise InputError(f"{where} is {values!r:.80}, expected an object")
    digest = values.get("sha256")
    if not isinstance(digest, str):
        raise InputError(f"{where}.sha256 is {digest!r:.80}, expected a text")
    return Shard(_integer(values, "tokens", 1, where + "."), digest)


def _object(values: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = values.get(key)
    if not isinstance(value, dict):
        raise InputError(f"{where}{key} is {value!r:.80}, expected an object")
    return value


def _integer(values: Mapping[str, Any], key: str, low: int, where: str) -> int:
    value = values.get(key)
    if type(value) is not int or value < low:
        raise InputError(f"{where}{key} is {value!r:.80}, expected an integer of at least {low}")
    return value
