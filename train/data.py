"""Prepared data: tokens on disk, and the batch of every step as a function of its number."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glm5_jax.atomic import new_directory
from glm5_jax.console import Advance, progress
from glm5_jax.errors import InputError
from glm5_jax.inference.tokenizer import Tokenizer
from glm5_jax.strict_json import read_json
from train.corpus import Document
from train.tokenizer import save_tokenizer, train_tokenizer

_SPLITS = ("train", "held_out")
_META_NAME = "data.json"
_FORMAT = "glm5-jax data 1"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_ENCODE_AT_ONCE = 64  # documents


class Batch(NamedTuple):
    """Rows of packed documents."""

    tokens_BT: np.ndarray  # int32
    segment_BT: np.ndarray  # int32, numbers the documents of a row from 1


class Split:
    """The tokens of a split, cut into rows of one length."""

    def __init__(self, tokens: np.ndarray, length: int, end_id: int):
        """Takes the tokens of documents one after the other, each ended by `end_id`."""
        self.num_rows = len(tokens) // length
        self._end_id = end_id
        self._rows = tokens[: self.num_rows * length].reshape(self.num_rows, length)

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The rows of a step: every row once per epoch, in an order of its own in each epoch."""
        numbers = range(step * batch_size, (step + 1) * batch_size)
        orders = {
            epoch: np.random.default_rng([seed, epoch]).permutation(self.num_rows)
            for epoch in {number // self.num_rows for number in numbers}
        }
        return self.rows([orders[n // self.num_rows][n % self.num_rows] for n in numbers])

    def rows(self, numbers: Sequence[int]) -> Batch:
        """The rows of the given numbers."""
        tokens_BT = self._rows[np.asarray(numbers)].astype(np.int32)
        ends_BT = tokens_BT == self._end_id
        starts_BT = np.pad(ends_BT[:, :-1], ((0, 0), (1, 0)))  # a document starts after an end
        return Batch(tokens_BT, 1 + np.cumsum(starts_BT, axis=1, dtype=np.int32))


class _Written(NamedTuple):
    """What is written down of a split."""

    tokens: int
    bytes: int  # of the text, in UTF-8
    sha256: str


class Data:
    """A prepared data directory."""

    def __init__(self, directory: Path):
        """Opens a directory.

        Raises:
          InputError: it is not one, or its files are not those that were written.
        """
        self.directory = directory
        meta = read_json(directory / _META_NAME)
        where = f"{directory / _META_NAME}: "
        if meta.get("format") != _FORMAT:
            raise InputError(f"{where}format is {meta.get('format')!r:.80}, expected {_FORMAT!r}")
        self.vocab_size = _integer(meta, "vocab_size", 1, where)
        self.end_id = _integer(meta, "end_id", 0, where)
        self._written = {split: _read_split(meta, split, where) for split in _SPLITS}
        for split, written in self._written.items():
            path = self._path(split)
            if not path.exists() or _digest(path) != written.sha256:
                raise InputError(f"{path}: missing or damaged, expected it as it was prepared")

    def _path(self, split: str) -> Path:
        return self.directory / f"{split}.npy"

    def num_tokens(self, split: str) -> int:
        """Tokens of a split."""
        return self._written[split].tokens

    @property
    def digest(self) -> str:
        """Of the tokens of all splits."""
        return " ".join(self._written[split].sha256[:12] for split in _SPLITS)

    def bytes_per_token(self, split: str) -> float:
        """Length of the text that a token stands for, in bytes of UTF-8, on average."""
        return self._written[split].bytes / self._written[split].tokens

    def split(self, name: str, length: int, at_least: int) -> Split:
        """A split in rows of one length; raises `InputError` if there are too few of them."""
        rows = Split(np.load(self._path(name), mmap_mode="r"), length, self.end_id)
        if rows.num_rows < at_least:
            raise InputError(
                f"{self._path(name)}: has {self.num_tokens(name)} tokens, expected at least "
                f"{at_least} x {length} of them"
            )
        return rows


def prepare(
    documents: Sequence[Document], destination: Path, vocab_size: int, tokenizer_from: Path | None
) -> Data:
    """Tokenizes documents into a data directory.

    Args:
      vocab_size: of the tokenizer, which is trained on the documents to be trained on.
      tokenizer_from: a model directory whose tokenizer is taken instead.

    Raises:
      InputError: `destination` exists, a split is empty, or the tokenizer cannot be used.
    """
    by_split = {
        "train": [document for document in documents if not document.held_out],
        "held_out": [document for document in documents if document.held_out],
    }
    if len(documents) < 2:
        raise InputError(
            f"{len(documents)} documents leave none for the split {_SPLITS[-1]!r}, expected at "
            "least 2"
        )
    for split, other in (_SPLITS, _SPLITS[::-1]):
        if not by_split[split]:  # chance gave all of few documents to the other
            by_split[split].append(by_split[other].pop(0))
    with new_directory(destination) as directory:
        if tokenizer_from is None:
            texts = (document.text for document in by_split["train"])
            save_tokenizer(train_tokenizer(texts, vocab_size), directory)
        else:
            Tokenizer(tokenizer_from)  # says what is wrong with it, if anything is
            for name in _TOKENIZER_FILES:
                if (tokenizer_from / name).exists():
                    shutil.copyfile(tokenizer_from / name, directory / name)
        tokenizer = Tokenizer(directory)
        meta: dict[str, object] = {
            "format": _FORMAT,
            "vocab_size": tokenizer.num_tokens,
            "end_id": tokenizer.end_id(),
        }
        with progress("tokenize", len(documents)) as advance:
            for split, members in by_split.items():
                tokens = _encode([document.text for document in members], tokenizer, advance)
                path = directory / f"{split}.npy"
                np.save(path, tokens)
                meta[split] = {
                    "documents": len(members),
                    "tokens": len(tokens),
                    "bytes": sum(len(document.text.encode()) for document in members),
                    "sha256": _digest(path),
                }
        (directory / _META_NAME).write_text(json.dumps(meta, indent=2) + "\n")
    return Data(destination)


def _read_split(meta: Mapping[str, Any], split: str, where: str) -> _Written:
    values = meta.get(split)
    if not isinstance(values, dict):
        raise InputError(f"{where}{split} is {values!r:.80}, expected an object")
    where = f"{where}{split}."
    digest = values.get("sha256")
    if not isinstance(digest, str):
        raise InputError(f"{where}sha256 is {digest!r:.80}, expected a string")
    return _Written(
        _integer(values, "tokens", 1, where), _integer(values, "bytes", 1, where), digest
    )


def _integer(values: Mapping[str, Any], key: str, low: int, where: str) -> int:
    value = values.get(key)
    if type(value) is not int or value < low:
        raise InputError(f"{where}{key} is {value!r:.80}, expected an integer of at least {low}")
    return value


def _encode(texts: Sequence[str], tokenizer: Tokenizer, advance: Advance) -> np.ndarray:
    dtype = np.uint16 if tokenizer.num_tokens <= 2**16 else np.uint32
    parts = []
    for start in range(0, len(texts), _ENCODE_AT_ONCE):
        at_once = texts[start : start + _ENCODE_AT_ONCE]
        parts += [np.array(tokens, dtype) for tokens in tokenizer.encode_documents(at_once)]
        advance(len(at_once))
    return np.concatenate(parts)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
