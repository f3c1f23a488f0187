"""One unit: its documents, filtered and tokenized, become one shard of each split, in bounded memory."""

import collections
import pathlib
import time
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt32

from fp4jax.data.documents import HALF_A_PAIR, NOT_UTF8, SPLITS, BadLines, in_chunks, split_of_utf8
from fp4jax.data.packing import concatenate, token_dtype
from fp4jax.data.prepare.filters import Filters
from fp4jax.data.prepare.inputs import Unit, documents_of
from fp4jax.data.prepare.state import WRITING, State, UnitFacts, compress_counts, publish, write_whole
from fp4jax.data.prepared import ShardFacts, file_checksum
from fp4jax.data.tokenizers import CannotEncodeError, Tokenizer

FLUSHED_TOKENS = 1 << 16
"""Tokens of a split that are gathered before records are written: enough to make NumPy's calls cheap."""

CHUNK_CHARACTERS = 1 << 20
"""Text that is dealt with at once."""

NOT_UNICODE = frozenset({NOT_UTF8, HALF_A_PAIR})
"""Reasons that are a filter's, and not of a damaged input: crawls have such documents."""

TOO_MUCH, HOLDS_END = "too much for the tokenizer", "holds the end-of-text token"

Counted = Callable[[int, int, int], None]
"""Is told how many more documents, tokens and bytes of text were dealt with."""


def prepare_unit(
    unit: Unit, state: State, tokenizer: Tokenizer, filters: Filters, max_bad_fraction: float, counted: Counted
) -> None:
    """Writes a unit's shards into the output folder, and then the facts that make it done.

    Raises:
      DataError: the input cannot be read to its end, or more than `max_bad_fraction` of it are no documents.
      OSError: the output cannot be written, or the disk is full.
    """
    started = time.process_time()
    writers = {split: _ShardWriter(state, split, unit.index, tokenizer) for split in SPLITS}
    bad, drops, text_bytes = BadLines(max_bad_fraction, expected=NOT_UNICODE), collections.Counter(), 0
    try:
        for chunk in in_chunks(documents_of(unit, state.options.text_key, bad), CHUNK_CHARACTERS):
            texts = [document.text for document in chunk]
            utf8 = [text.encode("utf-8") for text in texts]
            tokens = 0
            for encoded, ids in zip(utf8, _tokenize(texts, utf8, tokenizer, filters, drops), strict=True):
                if ids is not None:
                    writers[split_of_utf8(encoded, state.options.validation_fraction)].append(ids)
                    tokens += len(ids) + 1
            chunk_bytes = sum(map(len, utf8))
            text_bytes += chunk_bytes
            counted(len(chunk), tokens, chunk_bytes)
        shards = {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()
    facts = UnitFacts(
        bytes=unit.bytes,
        changed=unit.changed,
        documents_read=bad.lines,
        text_bytes=text_bytes,
        drops=dict(sorted((drops + bad.reasons).items())),
        bad=bad.bad,
        first_bad=bad.first,
        cpu_seconds=time.process_time() - started,
        shards=shards,
        counts={split: compress_counts(writer.counts) for split, writer in writers.items()},
    )
    write_whole(state.facts_file(unit), facts.to_json())


def _tokenize(
    texts: Sequence[str],
    utf8: Sequence[bytes],
    tokenizer: Tokenizer,
    filters: Filters,
    drops: collections.Counter[str],
) -> list[UInt32[np.ndarray, " tokens"] | None]:
    """The tokens of each text; None for one that is dropped, which is counted in `drops`."""
    # One thing at a time: the tokenizer's tables are larger than a cache, and other work would push them out.
    reasons = [filters.reason(text, encoded) for text, encoded in zip(texts, utf8, strict=True)]
    tokens: list[UInt32[np.ndarray, " tokens"] | None] = []
    for text, reason in zip(texts, reasons, strict=True):
        ids, reason = (None, reason) if reason else _encode(text, tokenizer)
        if ids is None:
            drops[reason] += 1
        tokens.append(ids)
    return tokens


def _encode(text: str, tokenizer: Tokenizer) -> tuple[UInt32[np.ndarray, " tokens"] | None, str]:
    """A text's tokens, or None and why there are none."""
    try:
        ids = tokenizer.encode_array(text)
    except CannotEncodeError:
        return None, TOO_MUCH
    return (None, HOLDS_END) if (ids == tokenizer.end_of_text).any() else (ids, "")


class _ShardWriter:
    """Cuts the stream of a split's documents into records and writes them; the file is made with the first one."""

    def __init__(self, state: State, split: str, index: int, tokenizer: Tokenizer):
        self._path = state.output / f"{split}-{index:05d}.array_record"
        self._temporary = state.partial / (self._path.name + WRITING)
        self._record_tokens = state.options.record_tokens
        self._end_of_text, self._dtype = tokenizer.end_of_text, token_dtype(tokenizer.vocab_size)
        self.counts = np.zeros(tokenizer.vocab_size, np.int64)
        self._writer = None
        self._rest = np.empty(0, self._dtype)
        self._waiting: list[UInt32[np.ndarray, " tokens"]] = []
        self._waiting_tokens = self._documents = self._tokens = 0

    def append(self, ids: UInt32[np.ndarray, " tokens"]) -> None:
        self._waiting.append(ids)
        self._waiting_tokens += len(ids)
        if self._waiting_tokens >= FLUSHED_TOKENS:
            self._write(last=False)

    def finish(self) -> ShardFacts | None:
        """Writes the rest and gives the file its name; None if there was no document."""
        self._write(last=True)
        if self._writer is None:
            return None
        self.close()
        size, checksum = self._temporary.stat().st_size, file_checksum(self._temporary)
        publish(self._temporary, self._path)
        return ShardFacts(self._path.name, self._documents, self._tokens, size, checksum)

    def close(self) -> None:
        if self._writer is not None and self._writer.is_open():
            self._writer.close()

    def _write(self, last: bool) -> None:
        new = concatenate(self._waiting, self._end_of_text, self._dtype)
        self.counts += np.bincount(new, minlength=len(self.counts))
        self._documents += len(self._waiting)
        self._tokens += len(new)
        self._waiting, self._waiting_tokens = [], 0
        stream = np.concatenate([self._rest, new])
        whole = len(stream) if last else len(stream) // self._record_tokens * self._record_tokens
        self._rest = stream[whole:]
        if whole and self._writer is None:
            self._writer = _open_writer(self._temporary)
        for start in range(0, whole, self._record_tokens):
            self._writer.write(stream[start : min(start + self._record_tokens, whole)].tobytes())


def _open_writer(path: pathlib.Path):
    from array_record.python.array_record_module import ArrayRecordWriter

    # A group is what is read and decompressed at once; one thread, because there is a process for every core.
    return ArrayRecordWriter(str(path), "group_size:1,max_parallelism:1")
