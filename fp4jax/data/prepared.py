"""Prepared sets: a corpus that `python -m fp4jax.data.prepare` tokenized beforehand, read by random access.

    index.json                       everything about the set (`PreparedSet`)
    train-00000.array_record         the token stream of the first input's training documents
    validation-00000.array_record    and of its validation documents; an input without any has no file

A split's stream (`packing.py`) is that of its files one after the other. A record is `record_tokens` tokens of it in
little-endian uint16, or uint32 for a vocabulary over 65,536; the last of a file is shorter. Every document ends with
the end-of-text token, which stands nowhere else: those are the boundaries between documents.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from typing import Any

import numpy as np
from jaxtyping import UInt

from fp4jax.data.corpus import CHECKED_BYTES
from fp4jax.data.documents import SPLITS
from fp4jax.data.errors import DataError
from fp4jax.data.json_files import check_fields, from_fields, one_line, parse_json
from fp4jax.data.packing import TOKEN_DTYPES

INDEX = "index.json"
PARTIAL = "partial"
"""Folder with the state of a preparation that is not finished."""

FORMAT = "fp4jax prepared set, version 1"
_INDEX = {
    "tokenizer": dict[str, Any],
    "dtype": str,
    "record_tokens": int,
    "options": dict[str, Any],
    "inputs": list[dict[str, Any]],
    "documents_read": int,
    "drops": dict[str, int],
    "splits": dict[str, Any],
}
_LARGEST = 1 << 48
_SHARD_NAME = re.compile(r"(train|validation)-\d{5,12}\.array_record", re.ASCII)
_AGAIN = "fetch it again, or prepare the data again"
_TOKENIZER = {"name": str, "fingerprint": str, "vocab_size": int, "end_of_text": int}


@dataclasses.dataclass(frozen=True)
class ShardFacts:
    """One file: its name, documents, tokens, size, and BLAKE2b-256 checksum (`b2sum --length=256`)."""

    file: str
    documents: int
    tokens: int
    bytes: int
    blake2b: str


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """One split: its files in the order of their streams, and its unigram entropy in nats per token."""

    shards: tuple[ShardFacts, ...]
    unigram_entropy: float

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def digest(self) -> str:
        """A hash of the whole stream: of its files' checksums."""
        return hashlib.blake2b("\n".join(shard.blake2b for shard in self.shards).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """A finished set.

    Attributes:
      folder: where it is.
      tokenizer: its name, fingerprint, vocab_size and end_of_text.
      dtype: of the tokens in a record.
      record_tokens: tokens in a record.
      options: that decided the content, by name.
      inputs: name and size of every file or part of a data set that was read.
      documents_read: documents and other records of the inputs.
      drops: how many of those are in no split, by reason.
      splits: "train" and "validation".
    """

    folder: pathlib.Path
    tokenizer: dict[str, Any]
    dtype: np.dtype
    record_tokens: int
    options: dict[str, Any]
    inputs: tuple[dict[str, Any], ...]
    documents_read: int
    drops: dict[str, int]
    splits: dict[str, PreparedSplit]

    @classmethod
    def open(cls, folder: pathlib.Path) -> "PreparedSet":
        """Opens a finished set and checks that its files are whole (by checksum up to CHECKED_BYTES, else by size).

        Raises:
          DataError: it is not finished, was altered, or is of another version.
        """
        prepared = cls.read_index(folder)
        for split in prepared.splits.values():
            by_checksum = sum(shard.bytes for shard in split.shards) <= CHECKED_BYTES
            for shard in split.shards:
                _check_file(folder / shard.file, shard, by_checksum)
        return prepared

    @classmethod
    def read_index(cls, folder: pathlib.Path) -> "PreparedSet":
        """Reads the index alone; raises DataError if it is missing or of another kind."""
        path = folder / INDEX
        try:
            return cls._from_index(folder, parse_json(path.read_bytes()))
        except OSError as error:
            raise DataError(
                f"{folder} is no finished prepared set: {path} cannot be read ({error.strerror}); "
                "run `python -m fp4jax.data.prepare` again, it goes on where it was"
            ) from error
        except ValueError as error:
            raise DataError(
                f"{path} is not an index of {FORMAT!r} ({one_line(error)}); prepare the data again"
            ) from error

    @classmethod
    def _from_index(cls, folder: pathlib.Path, index: Any) -> "PreparedSet":
        """The set that an index describes; ValueError for what is none."""
        if check_fields(index, {"format": str})["format"] != FORMAT:
            raise ValueError(f"format {index['format']!r}")
        check_fields(index, _INDEX)
        check_fields(index["tokenizer"], _TOKENIZER)
        check_fields(index["options"], {"validation_fraction": float})
        if index["dtype"] not in TOKEN_DTYPES or not 1 <= index["record_tokens"] < _LARGEST:
            raise ValueError(f"records of {index['record_tokens']} tokens of type {index['dtype']!r}")
        return cls(
            folder=folder,
            tokenizer=index["tokenizer"],
            dtype=np.dtype(index["dtype"]),
            record_tokens=index["record_tokens"],
            options=index["options"],
            inputs=tuple(index["inputs"]),
            documents_read=index["documents_read"],
            drops=index["drops"],
            splits={name: _split_from_index(index["splits"].get(name)) for name in SPLITS},
        )

    def index_json(self) -> str:
        """The content of the index: a function of the inputs and the options alone."""
        splits = {
            name: {
                "documents": split.documents,
                "tokens": split.tokens,
                "unigram_entropy": split.unigram_entropy,
                "shards": [dataclasses.asdict(shard) for shard in split.shards],
            }
            for name, split in self.splits.items()
        }
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "folder"}
        return json.dumps({"format": FORMAT, **own, "dtype": self.dtype.str, "splits": splits}, indent=1) + "\n"

    def stream(self, split: str) -> "ShardedStream":
        """The token stream of a split."""
        return ShardedStream(self, split)


def _split_from_index(value: Any) -> PreparedSplit:
    check_fields(value, {"shards": list[Any], "unigram_entropy": float})
    shards = tuple(from_fields(ShardFacts, shard) for shard in value["shards"])
    for shard in shards:
        if not _SHARD_NAME.fullmatch(shard.file):
            raise ValueError(f"shard {shard.file[:50]!r} is no file of a set")
        if not all(0 <= size < _LARGEST for size in (shard.documents, shard.tokens, shard.bytes)):
            raise ValueError(f"shard {shard.file!r} has a size that no file can have")
    return PreparedSplit(shards, value["unigram_entropy"])


def is_prepared(folder: pathlib.Path) -> bool:
    """Whether a folder holds a prepared set, finished or not."""
    return (folder / INDEX).is_file() or (folder / PARTIAL).is_dir()


@dataclasses.dataclass(frozen=True)
class _Records:
    """All records of one file, as Grain's data source takes them: it need not open every file to count them."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class ShardedStream:
    """The tokens of a split by slices, read from the records that hold them. Threads may share it."""

    def __init__(self, prepared: PreparedSet, split: str):
        import grain  # it loads JAX, which a process that prepares does not need

        shards = prepared.splits[split].shards
        self._paths = [prepared.folder / shard.file for shard in shards]
        self._record_tokens, self._dtype = prepared.record_tokens, prepared.dtype
        counts = [-(-shard.tokens // self._record_tokens) for shard in shards]
        self._token_ends = list(itertools.accumulate(shard.tokens for shard in shards))
        self._record_ends = list(itertools.accumulate(counts))
        self._records = grain.sources.ArrayRecordDataSource(
            [
                _Records(str(path), 0, count, count)
                for path, count in zip(self._paths, counts, strict=True)
            ]
        ) if shards else ()  # fmt: skip

    def __len__(self) -> int:
        return self._token_ends[-1] if self._token_ends else 0

    def __getitem__(self, tokens: slice) -> UInt[np.ndarray, " tokens"]:
        start, stop, step = tokens.indices(len(self))
        if step != 1:
            raise ValueError(f"a token stream is read forwards, one token after the other; the step is {step}")
        parts = []
        while start < stop:
            shard = bisect.bisect_right(self._token_ends, start)
            shard_start = self._token_ends[shard - 1] if shard else 0
            record, offset = divmod(start - shard_start, self._record_tokens)
            record += self._record_ends[shard - 1] if shard else 0
            part = self._read(self._paths[shard], record)[offset : offset + stop - start]
            if not len(part):
                raise DataError(f"prepared set: {self._paths[shard]} is shorter than its index says; {_AGAIN}")
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, self._dtype)

    def _read(self, path: pathlib.Path, record: int) -> UInt[np.ndarray, " tokens"]:
        try:
            return np.frombuffer(self._records[record], self._dtype)
        except (
            RuntimeError,
            ValueError,
            IndexError,
            OSError,
        ) as error:  # RuntimeError: a wrong checksum
            what = f"is damaged ({one_line(error)[:200]})" if path.is_file() else "has vanished"
            raise DataError(f"prepared set: {path} {what}; {_AGAIN}") from error


def file_checksum(path: pathlib.Path) -> str:
    """BLAKE2b-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _check_file(path: pathlib.Path, shard: ShardFacts, by_checksum: bool) -> None:
    size = path.stat().st_size if path.is_file() else -1
    if size != shard.bytes:
        what = "is missing" if size < 0 else f"is of {size:,} bytes and not {shard.bytes:,}"
    elif by_checksum and file_checksum(path) != shard.blake2b:
        what = "has another content than when it was written"
    else:
        return
    raise DataError(f"prepared set {path.parent}: {path.name} {what}; {_AGAIN}")
