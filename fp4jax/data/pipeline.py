"""The pipeline: from `config.data` to batches.

    sources → token streams → rows → Grain: permute every epoch, mix, take this process's rows, batch, read ahead

Global batch b holds the rows b*B to (b+1)*B - 1 of one endless sequence of permuted epochs; process p of P reads the
p-th of P equal blocks of them. So the sequence of global batches depends on the corpus, the tokenizer, seq_len,
batch_size and the seed, never on how many processes read it, and one integer is the whole position: a run resumes bit
for bit on any number of processes. Of several sources every one has epochs of its own, and the sequence takes rows
from them by their weights, evenly spread.
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import grain
import ml_collections
import numpy as np
from jaxtyping import Float32, Int32

from fp4jax.data.documents import SPLITS
from fp4jax.data.errors import DataError
from fp4jax.data.packing import PackedRows, document_segments
from fp4jax.data.provenance import NumberedRows, describe_rows
from fp4jax.data.sources import Source, open_sources
from fp4jax.data.statistics import DatasetStats
from fp4jax.data.tokenizers import Tokenizer, load_tokenizer

Batch = dict[str, Int32[np.ndarray, "B T"] | Float32[np.ndarray, "B T"]]

TOKENIZER_KEY = "tokenizer"
"""Of a saved position: the fingerprint of the tokenizer whose ids the model was trained on."""

ENDLESS = 1 << 40
"""Batches of training data: more than any run reads, and few enough that an index of a row fits 64 bits."""


def open_dataset(
    data_config: ml_collections.ConfigDict,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    split: str = "train",
    process_index: int = 0,
    process_count: int = 1,
) -> "Dataset":
    """Opens one split of a corpus or of several; tokenizes text that the cache does not hold yet.

    Args:
      data_config: `config.data`.
      seq_len: tokens in a row, T.
      batch_size: rows in a global batch, B, over all processes.
      seed: decides the order of the training rows; the validation rows have one order whatever it is.
      split: "train" or "validation".
      process_index: which of the processes this is, from 0 (`jax.process_index()`).
      process_count: processes that share every global batch.

    Raises:
      DataError: the settings, the shards, the tokenizer or the cache cannot be used; one line says which, why, and
        what to do.
    """
    _check_settings(data_config, seq_len, batch_size, seed, split, process_index, process_count)
    tokenizer = load_tokenizer(data_config.tokenizer)
    sources = open_sources(data_config, tokenizer, split)
    rows = tuple(PackedRows(source.split.stream, seq_len) for source in sources)
    for source, own_rows in zip(sources, rows, strict=True):
        if not len(own_rows):
            raise _too_small(data_config, split, source, seq_len)
    stats = _stats(str(data_config.source), split, tokenizer, sources, rows)
    # What decides the sequence of global batches: a saved position means nothing in another sequence.
    sequence = {"split": split, "corpus": _digest(sources), "seq_len": seq_len, "batch_size": batch_size, "seed": seed}
    sequence[TOKENIZER_KEY] = tokenizer.fingerprint
    return Dataset(rows, sources, stats, sequence, (process_index, process_count), data_config)


def _stats(
    name: str, split: str, tokenizer: Tokenizer, sources: tuple[Source, ...], rows: tuple[PackedRows, ...]
) -> DatasetStats:
    bad = [source.bad_lines for source in sources]
    count = sum(map(len, rows))
    shares = [
        source.weight if split == "train" else len(own) / count for source, own in zip(sources, rows, strict=True)
    ]
    entropies = [source.split.unigram_entropy for source in sources]
    return DatasetStats(
        source=name,
        split=split,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        shards=sum(source.shards for source in sources),
        documents=sum(source.split.documents for source in sources),
        tokens=sum(source.split.tokens for source in sources),
        rows=count,
        tokens_left_out=sum(own.tokens_left_out for own in rows),
        bad_lines=sum(own.bad for own in bad),
        bad_lines_report="; ".join(own.describe() for own in bad if own.bad) or bad[0].describe(),
        unigram_entropy=sum(share * entropy for share, entropy in zip(shares, entropies, strict=True)),
    )


def _digest(sources: tuple[Source, ...]) -> str:
    if len(sources) == 1:
        return sources[0].split.digest[:32]
    mixture = [(source.split.digest, source.weight) for source in sources]
    return hashlib.blake2b(repr(mixture).encode(), digest_size=16).hexdigest()


class Dataset:
    """One split of a tokenized corpus, read in batches; made by `open_dataset`.

    Attributes:
      stats: what the split holds.
    """

    def __init__(
        self,
        rows: tuple[PackedRows, ...],
        sources: tuple[Source, ...],
        stats: DatasetStats,
        sequence: dict[str, Any],
        process: tuple[int, int],
        data_config: ml_collections.ConfigDict,
    ):
        self.stats = stats
        self._rows, self._sources = rows, sources
        self._sequence = sequence
        self._process_index, self._process_count = process
        self._prefetch, self._document_mask = data_config.prefetch, data_config.document_mask

    def batches(self, start_position: dict[str, Any] | None = None) -> "BatchIterator":
        """Iterates over this process's part of the global batches.

        A batch is a dict of arrays of B / process_count rows: `tokens` and `targets` int32 [B, T], and `loss_mask`
        float32 [B, T], 1 where the target is real; with `data.document_mask` also `segment_ids` and `positions` int32
        [B, T], see `packing.document_segments`. Training never ends: each epoch is a new permutation of all rows,
        and a batch may span two epochs, so every row is read once in each. Validation is one pass in a fixed shuffled
        order, so that a few batches are a fair sample of it; its last batch is filled up with rows of token 0 whose
        mask is 0. The validation data of several sources are all of theirs, whatever the weights.

        Args:
          start_position: an iterator's `get_state()`, to go on where it was.

        Raises:
          DataError: `start_position` belongs to another sequence of batches.
        """
        iterator = BatchIterator(self._grain_dataset(), self._sequence, self._prefetch)
        if start_position is not None:
            iterator.set_state(start_position)
        return iterator

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError if a model with `vocab_size` embeddings cannot take every token of this tokenizer."""
        if vocab_size < self.stats.vocab_size:
            raise DataError(
                f"model.vocab_size={vocab_size:,} is smaller than the {self.stats.vocab_size:,} tokens of tokenizer "
                f"{self.stats.tokenizer!r}; set model.vocab_size to at least that, or choose another data.tokenizer"
            )

    def describe(self, total_tokens_of_run: int) -> list[str]:
        """Lines for the top of a log: what is read, and how often a run of `total_tokens_of_run` tokens repeats it."""
        stats, seq_len = self.stats, self._sequence["seq_len"]
        shares = [source.weight * total_tokens_of_run / (len(rows) * seq_len) for source, rows in self._sets()]
        times = ", ".join(
            f"{source.name} {times:.2f} times over" for (source, _), times in zip(self._sets(), shares, strict=True)
        )
        lines = [
            f"{stats.split} data: {stats.source}, {stats.shards:,} shards, {stats.documents:,} documents, "
            f"{stats.tokens:,} tokens (tokenizer {stats.tokenizer}, {stats.vocab_size:,} entries), "
            f"{stats.rows:,} rows of {seq_len:,}",
            f"the run reads {total_tokens_of_run:,} tokens: "
            f"{times if len(shares) > 1 else f'this data {shares[0]:.2f} times over'}",
            f"unigram entropy {stats.unigram_entropy:.3f} nats a token: a loss below it was learned from context",
        ]
        return [*lines, stats.bad_lines_report] if stats.bad_lines else lines

    def documents_in_batch(self, batch: int) -> str:
        """Names the documents that global batch `batch` (from 0) of the training data reads, see `provenance.py`."""
        rows = self._endless_rows([NumberedRows(index, len(rows)) for index, rows in enumerate(self._rows)])
        size, seq_len = self._sequence["batch_size"], self._sequence["seq_len"]
        read = [rows[index] for index in range(batch * size, (batch + 1) * size)]
        names = [source.name for source in self._sources]
        streams = {index: source.split.stream for index, source in enumerate(self._sources)}
        return describe_rows(read, names, streams, seq_len, self.stats.end_of_text)

    def _grain_dataset(self) -> grain.MapDataset:
        batch_size, train = self._sequence["batch_size"], self.stats.split == "train"
        local_batch_size = batch_size // self._process_count
        offset = self._process_index * local_batch_size
        rows = self._endless_rows(self._rows) if train else self._validation_rows()
        batch_count = ENDLESS if train else -(-len(rows) // batch_size)
        padding = np.zeros(self._sequence["seq_len"] + 1, np.int32)

        def example(local_index: int) -> dict[str, np.ndarray]:
            batch, index_in_batch = divmod(local_index, local_batch_size)
            index = batch * batch_size + offset + index_in_batch
            real = index < len(rows)
            row = rows[index] if real else padding
            arrays = {"tokens": row[:-1], "targets": row[1:], "loss_mask": np.full(len(row) - 1, real, np.float32)}
            if self._document_mask:
                arrays["segment_ids"], arrays["positions"] = document_segments(row[:-1], self.stats.end_of_text)
            return arrays

        return grain.MapDataset.range(batch_count * local_batch_size).map(example).batch(local_batch_size)

    def _sets(self) -> list[tuple[Source, PackedRows]]:
        return list(zip(self._sources, self._rows, strict=True))

    def _endless_rows(self, sources: Sequence[PackedRows | NumberedRows]) -> grain.MapDataset:
        # Grain adds the epoch's number to its seed; hashed, seed 1 does not begin with the second epoch of seed 0.
        seeds = np.random.SeedSequence(self._sequence["seed"]).generate_state(len(sources))
        sets = [
            grain.MapDataset.source(rows).shuffle(seed=int(seed)).repeat()
            for rows, seed in zip(sources, seeds, strict=True)
        ]
        return sets[0] if len(sets) == 1 else grain.MapDataset.mix(sets, [source.weight for source in self._sources])

    def _validation_rows(self) -> grain.MapDataset:
        seed = np.random.SeedSequence(0).generate_state(1)[0]
        return grain.MapDataset.concatenate([grain.MapDataset.source(rows) for rows in self._rows]).shuffle(
            seed=int(seed)
        )


class BatchIterator:
    """Batches in order, with an exact position: batches that threads have read ahead do not count."""

    def __init__(self, dataset: grain.MapDataset, sequence: dict[str, Any], prefetch: int):
        self._sequence = sequence
        self._length = len(dataset)
        options = grain.ReadOptions(num_threads=min(prefetch, os.cpu_count() or 1), prefetch_buffer_size=prefetch)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns the position: a few numbers and strings, for JSON. It is the same on every process."""
        return {"next_batch": self._iterator.get_state()["next_index"], **self._sequence}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave, here or in another process.

        Raises:
          DataError: it is a position in another sequence of batches, or beyond the end of this one.
        """
        if isinstance(state, dict) and TOKENIZER_KEY not in state:  # saved before positions named it
            state = state | {TOKENIZER_KEY: self._sequence[TOKENIZER_KEY]}
        if not isinstance(state, dict) or set(state) != {"next_batch", *self._sequence}:
            raise DataError(
                f"data position {state!r} was not made by this data pipeline; start anew in an empty workdir"
            )
        differences = [
            f"{name} {state[name]!r} → {value!r}" for name, value in self._sequence.items() if state[name] != value
        ]
        if differences:
            raise DataError(
                f"the data position was saved with other data or settings ({', '.join(differences)}); "
                "restore them, or start anew in an empty workdir"
            )
        if not isinstance(state["next_batch"], int) or not 0 <= state["next_batch"] <= self._length:
            raise DataError(
                f"data position {state['next_batch']!r} is outside the {self._length:,} batches of this data"
            )
        self._iterator.set_state({"next_index": state["next_batch"]})

    def close(self) -> None:
        """Stops reading ahead."""
        self._iterator.close()


def _too_small(data_config: ml_collections.ConfigDict, split: str, source: Source, seq_len: int) -> DataError:
    remedy = "give more text or a smaller seq_len"
    if split == "validation":
        remedy = f"raise data.validation_fraction={data_config.validation_fraction:g}, {remedy}"
    return DataError(
        f"the {split} split of {source.name!r} holds {source.split.tokens:,} tokens "
        f"in {source.split.documents:,} documents, fewer than the {seq_len + 1:,} of one row; {remedy}"
    )


def _check_settings(
    data_config: ml_collections.ConfigDict,
    seq_len: int,
    batch_size: int,
    seed: int,
    split: str,
    process_index: int,
    process_count: int,
) -> None:
    """Raises DataError for the first setting that is out of range."""
    requirements = [
        (split in SPLITS, f"split is {split!r}; it must be one of {', '.join(SPLITS)}"),
        (seq_len >= 1, f"seq_len is {seq_len}; it must be at least 1"),
        (batch_size >= 1, f"batch_size is {batch_size}; it must be at least 1"),
        (seed >= 0, f"seed is {seed}; it must not be negative"),
        (
            process_count >= 1 and 0 <= process_index < process_count,
            f"process_index is {process_index} of {process_count} processes; it must be from 0 to process_count - 1",
        ),
        (
            process_count < 1 or batch_size % process_count == 0,
            f"batch_size is {batch_size}; it must be a multiple of the {process_count} processes",
        ),
        (
            0 <= data_config.validation_fraction < 1,
            f"data.validation_fraction is {data_config.validation_fraction}; it must be from 0 to below 1",
        ),
        (
            0 <= data_config.max_bad_fraction <= 1,
            f"data.max_bad_fraction is {data_config.max_bad_fraction}; it must be from 0 to 1",
        ),
        (data_config.prefetch >= 0, f"data.prefetch is {data_config.prefetch} batches; it must not be negative"),
    ]
    for met, message in requirements:
        if not met:
            raise DataError(message)
