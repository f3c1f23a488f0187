"""A corpus on disk: for each split one file of token ids, and one of facts about it.

    train.tokens         the split's token stream (`packing.py`), little-endian uint16, or uint32 for a vocabulary over
                         65,536
    validation.tokens    the same of the other split
    corpus.json          documents, tokens, digest and unigram entropy of each split; counts of bad lines

`write_corpus` tokenizes in one pass and bounded memory; `TokenizedCorpus.open` maps the result into memory and checks
that it is whole.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt

from fp4jax.data.documents import SPLITS, BadLines, in_chunks, read_documents, split_of
from fp4jax.data.json_files import check_fields, from_fields, parse_json
from fp4jax.data.packing import TOKEN_DTYPES, concatenate, token_dtype
from fp4jax.data.statistics import unigram_entropy
from fp4jax.data.tokenizers import Tokenizer

CHUNK_CHARACTERS = 2 << 20
"""Text that is tokenized at once: enough documents to keep every core busy, few enough for memory (the tokenizer's
bookkeeping takes about 100 bytes a token)."""

CHECKED_BYTES = 1 << 30
"""Streams up to this size are hashed again when opened (about a second); of longer ones only the length is checked."""

LOG_SECONDS = 10.0
FACTS = "corpus.json"
_FACTS = {
    "splits": dict[str, Any],
    "dtype": str,
    "lines": int,
    "bad_lines": dict[str, int],
    "first_bad_line": str,
}


class DamagedCorpusError(Exception):
    """A corpus folder that is not what `write_corpus` left there."""


@dataclasses.dataclass(frozen=True)
class SplitFacts:
    """One split's documents, tokens, BLAKE2b hash of its token file, and unigram entropy in nats per token."""

    documents: int
    tokens: int
    digest: str
    unigram_entropy: float


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """A tokenized corpus in a folder: facts by split, the type of its token files, the bad lines met in writing it."""

    folder: pathlib.Path
    splits: dict[str, SplitFacts]
    dtype: np.dtype
    bad_lines: BadLines

    @classmethod
    def open(cls, folder: pathlib.Path, max_bad_fraction: float) -> "TokenizedCorpus":
        """Opens what `write_corpus` wrote; raises DamagedCorpusError if something is missing or altered."""
        try:
            facts = check_fields(parse_json((folder / FACTS).read_bytes()), _FACTS)
            bad_lines = BadLines(
                max_bad_fraction, facts["lines"], collections.Counter(facts["bad_lines"]), facts["first_bad_line"]
            )
            splits = {name: from_fields(SplitFacts, facts["splits"].get(name)) for name in SPLITS}
            if facts["dtype"] not in TOKEN_DTYPES:
                raise ValueError(f"tokens of type {facts['dtype']!r}")
            corpus = cls(folder, splits, np.dtype(facts["dtype"]), bad_lines)
            for name in SPLITS:
                corpus._check(name)
        except (OSError, ValueError) as error:
            raise DamagedCorpusError(f"{type(error).__name__}: {error}") from error
        return corpus

    def stream(self, split: str) -> UInt[np.ndarray, " tokens"]:
        """The token stream of a split, mapped into memory read-only."""
        if not self.splits[split].tokens:
            return np.empty(0, self.dtype)  # an empty file cannot be mapped
        return np.memmap(_token_file(self.folder, split), self.dtype, mode="r")

    def _check(self, split: str) -> None:
        file, facts = _token_file(self.folder, split), self.splits[split]
        size = file.stat().st_size if file.is_file() else -1
        if size != facts.tokens * self.dtype.itemsize:
            raise DamagedCorpusError(f"{file.name} is {size} bytes, not {facts.tokens * self.dtype.itemsize}")
        if size <= CHECKED_BYTES:
            with open(file, "rb") as opened:
                if hashlib.file_digest(opened, hashlib.blake2b).hexdigest() != facts.digest:
                    raise DamagedCorpusError(f"{file.name} has another content than when it was written")


class _SplitWriter:
    """Appends chunks of documents to one token file and keeps its statistics."""

    def __init__(self, file: pathlib.Path, tokenizer: Tokenizer):
        self._file = open(file, "wb")
        self._end_of_text = tokenizer.end_of_text
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._digest = hashlib.blake2b()
        self._counts = np.zeros(tokenizer.vocab_size, np.int64)
        self._documents = 0

    def append(self, documents: Sequence[Sequence[int]]) -> None:
        tokens = concatenate(documents, self._end_of_text, self._dtype)
        self._file.write(tokens.data)
        self._digest.update(tokens.data)
        self._counts += np.bincount(tokens, minlength=len(self._counts))
        self._documents += len(documents)

    @property
    def tokens(self) -> int:
        return int(self._counts.sum())

    def close(self) -> SplitFacts:
        self._file.close()
        return SplitFacts(self._documents, self.tokens, self._digest.hexdigest(), unigram_entropy(self._counts))


def write_corpus(
    folder: pathlib.Path,
    shards: Sequence[pathlib.Path],
    tokenizer: Tokenizer,
    *,
    text_key: str,
    validation_fraction: float,
    max_bad_fraction: float,
) -> None:
    """Tokenizes shards into `folder`, an existing empty one, in the form that `TokenizedCorpus.open` reads.

    Raises:
      DataError: a shard cannot be read to its end, or more than `max_bad_fraction` of the lines hold no document.
      OSError: the folder cannot be written to, or the disk is full.
    """
    bad_lines = BadLines(max_bad_fraction)
    writers = {split: _SplitWriter(_token_file(folder, split), tokenizer) for split in SPLITS}
    try:
        progress = _Progress(len(shards))
        for chunk in in_chunks(read_documents(shards, text_key, bad_lines), CHUNK_CHARACTERS):
            encoded = tokenizer.encode_batch([document.text for document in chunk])
            sides = [split_of(document.text, validation_fraction) for document in chunk]
            for split, writer in writers.items():
                writer.append([ids for ids, side in zip(encoded, sides, strict=True) if side == split])
            progress.log(chunk[-1].shard, sum(writer.tokens for writer in writers.values()))
    finally:
        splits = {split: dataclasses.asdict(writer.close()) for split, writer in writers.items()}
    facts = {
        "splits": splits,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "lines": bad_lines.lines,
        "bad_lines": dict(bad_lines.reasons),
        "first_bad_line": bad_lines.first,
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


class _Progress:
    """Logs how far tokenization has come, every LOG_SECONDS: a first start on a large corpus is not silent."""

    def __init__(self, shard_count: int):
        self._shard_count = shard_count
        self._seen: set[pathlib.Path] = set()
        self._started = self._logged = time.monotonic()

    def log(self, shard: pathlib.Path, tokens: int) -> None:
        self._seen.add(shard)
        now = time.monotonic()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            rate = tokens / (now - self._started)
            logging.info(
                "tokenizing: shard %d of %d, %s tokens, %.2g a second",
                len(self._seen),
                self._shard_count,
                f"{tokens:,}",
                rate,
            )


def _token_file(folder: pathlib.Path, split: str) -> pathlib.Path:
    return folder / f"{split}.tokens"
