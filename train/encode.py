"""Documents to tokens on disk, as they come: what `glm5-train prepare` does."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from glm5_jax.atomic import new_directory
from glm5_jax.console import Advance, progress
from glm5_jax.errors import InputError
from glm5_jax.inference.tokenizer import Tokenizer
from train.corpus import Document
from train.data import FORMAT, META_NAME, SPLITS, Data, Written
from train.shards import SHARD_TOKENS, ShardWriter, token_dtype
from train.tokenizer import save_tokenizer, train_tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Characters of text.
_SAMPLE = 2**26  # that a tokenizer is trained on, of all sources together
_PIECE = 2**20  # of a document, encoded by itself: what an encoding takes is 50 times the text
_AT_ONCE = 2**22  # encoded in parallel


def prepare(
    sources: Mapping[str, Iterator[Document]],
    destination: Path,
    vocab_size: int,
    tokenizer_from: Path | None,
    *,
    size: int = 0,
    shard_tokens: int = SHARD_TOKENS,
) -> Data:
    """Tokenizes the documents of named sources into a data directory.

    No more of a source is held in memory than its share of the text that a tokenizer is trained
    on. If all of that belongs to one split, one document goes to the other, so that most text is to
    be trained on.

    Args:
      vocab_size: of the tokenizer, which is trained on the first documents to be trained on.
      tokenizer_from: a model directory whose tokenizer is taken instead.
      size: of all documents in their files, for the progress bar.
      shard_tokens: in a file at most.

    Raises:
      InputError: `destination` exists or cannot be written, a source has fewer documents than
        splits, or the tokenizer cannot be used.
    """
    with new_directory(destination) as directory:
        heads = {
            name: _head(name, documents, _SAMPLE // len(sources))
            for name, documents in sources.items()
        }
        if tokenizer_from is None:
            texts = (
                document.text
                for head in heads.values()
                for document in head
                if not document.held_out
            )
            save_tokenizer(train_tokenizer(texts, vocab_size), directory)
        else:
            Tokenizer(tokenizer_from)  # says what is wrong with it, if anything is
            for name in _TOKENIZER_FILES:
                if (tokenizer_from / name).exists():
                    shutil.copyfile(tokenizer_from / name, directory / name)
        tokenizer = Tokenizer(directory)
        written = {}
        with progress("tokenize", size) as advance:
            for name, documents in sources.items():
                each = itertools.chain(_given_away(heads.pop(name)), documents)
                splits = _write_source(directory, name, each, tokenizer, shard_tokens, advance)
                written[name] = {split: values.to_json() for split, values in splits.items()}
        meta = {
            "format": FORMAT,
            "vocab_size": tokenizer.num_tokens,
            "end_id": tokenizer.end_id(),
            "sources": written,
        }
        (directory / META_NAME).write_text(json.dumps(meta, indent=2) + "\n")
    return Data(destination)


def _head(name: str, documents: Iterator[Document], size: int) -> list[Document]:
    """The first documents, of so many characters at most but for the last, in both splits."""
    head: list[Document] = []
    for document in documents:
        head.append(document)
        size -= len(document.text)
        if size <= 0 and len(head) > 1:
            break
    if len(head) < 2:
        raise InputError(
            f"source {name!r} has 1 document, expected at least 2: one to train on, one held out; "
            "documents are files, and lines of .jsonl"
        )
    if len({document.held_out for document in head}) == 1:  # chance gave all to one split
        choose = max if head[0].held_out else min  # most text is to train on
        moved = choose(range(len(head)), key=lambda number: len(head[number].text))
        head[moved] = head[moved]._replace(held_out=not head[moved].held_out)
    return head


def _given_away(documents: list[Document]) -> Iterator[Document]:
    """The documents of a list, which no longer holds those that were taken."""
    documents.reverse()
    while documents:
        yield documents.pop()


class _Piece(NamedTuple):
    document: Document
    text: str
    is_last: bool  # of its document


def _write_source(
    directory: Path,
    source: str,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    shard_tokens: int,
    advance: Advance,
) -> dict[str, Written]:
    dtype, end_id = token_dtype(tokenizer.num_tokens), tokenizer.end_id()
    num_documents: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    place = (directory, source)
    with (
        ShardWriter(*place, SPLITS[0], dtype, shard_tokens) as train,
        ShardWriter(*place, SPLITS[1], dtype, shard_tokens) as held_out,
    ):
        writers = dict(zip(SPLITS, (train, held_out), strict=True))
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([piece.text for piece in batch])
            for (document, text, is_last), tokens in zip(batch, encoded, strict=True):
                split = SPLITS[document.held_out]
                writers[split].write([*tokens, end_id] if is_last else tokens)
                num_bytes[split] += len(text.encode())
                num_documents[split] += is_last
                advance(document.size if is_last else 0)
    return {
        split: Written(num_documents[split], num_bytes[split], tuple(writers[split].shards))
        for split in SPLITS
    }


def _batches(documents: Iterable[Document]) -> Iterator[list[_Piece]]:
    """What is encoded at once."""
    batch, size = [], 0
    for document in documents:
        for piece in _pieces(document):
            batch.append(piece)
            size += len(piece.text)
            if size >= _AT_ONCE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _pieces(document: Document) -> Iterator[_Piece]:
    """A document, cut after ends of lines where it is long and has such."""
    text, start = document.text, 0
    while len(text) - start > _PIECE:
        stop = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield _Piece(document, text[start:stop], is_last=False)
        start = stop
    yield _Piece(document, text[start:], is_last=True)
