"""Inputs: the units that a `source` names, and the documents in one.

    FOLDER, GLOB, FILE    DCLM's shards (.jsonl.zst, .jsonl.zstd, .jsonl.gz, .jsonl) and .parquet: a unit is a file
    embedded              the State of the Union addresses that ship with the project
    tfds:NAME             a data set of TFDS, by its name there ("tfds:wikipedia/20230601.en"): a unit is a range of it

Files are taken in the order of their paths.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from fp4jax.data.documents import BadLines, Document, check_text, documents_in
from fp4jax.data.errors import DataError
from fp4jax.data.shards import SUFFIXES, check_ratio, find_shards

TFDS = "tfds:"
PARQUET = ".parquet"
TFDS_EXAMPLES = 100_000
"""Examples of a TFDS data set in a unit."""

PARQUET_ROWS = 128
PARQUET_BUFFER = 1 << 20
"""Bytes of a column that are read at a time."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of the inputs that one process works on.

    Attributes:
      index: its place among the units, which orders the set's shards.
      name: of the file below the source, or the range of the data set.
      source: path of the file, or name of the TFDS data set.
      bytes: size of the file; 0 for a range.
      changed: time of the file's last change, in nanoseconds; 0 for a range.
      tfds: split and folder of the data set, first and last + 1 of the examples; None for a file.
    """

    index: int
    name: str
    source: str
    bytes: int = 0
    changed: int = 0
    tfds: tuple[str, str | None, int, int] | None = None


def find_units(source: str, tfds_split: str, tfds_dir: str | None) -> list[Unit]:
    """Lists the units of a source.

    Args:
      source: see the module.
      tfds_split: the split of a TFDS data set, with a slice if you like ("train[:10%]").
      tfds_dir: where TFDS keeps its data sets; None for its default.

    Raises:
      DataError: there is nothing, or nothing that can be read.
    """
    if source.startswith(TFDS):
        name = source.removeprefix(TFDS)
        count = len(_data_source(name, tfds_split, tfds_dir))
        if not count:
            raise DataError(f"source {source!r}: split {tfds_split!r} holds no example")
        ranges = [(start, min(start + TFDS_EXAMPLES, count)) for start in range(0, count, TFDS_EXAMPLES)]
        return [
            Unit(index, f"{source} {tfds_split}[{start}:{stop}]", name, tfds=(tfds_split, tfds_dir, start, stop))
            for index, (start, stop) in enumerate(ranges)
        ]
    files = find_shards(source, (*SUFFIXES, PARQUET))
    root = pathlib.Path(os.path.commonpath([file.parent for file in files]))
    units = []
    for index, file in enumerate(files):
        status = file.stat()
        units.append(Unit(index, str(file.relative_to(root)), str(file.absolute()), status.st_size, status.st_mtime_ns))
    return units


def documents_of(unit: Unit, text_key: str, bad: BadLines) -> Iterator[Document]:
    """Yields a unit's documents in order; records without one are counted in `bad`.

    Raises:
      DataError: the unit cannot be read to its end, or bad records abound.
    """
    if unit.tfds is not None:
        texts = _tfds_texts(unit, text_key)
    elif unit.source.endswith(PARQUET):
        texts = _parquet_texts(unit.source, text_key)
    else:
        yield from documents_in(pathlib.Path(unit.source), text_key, bad)
        return
    for number, value in enumerate(texts, start=1):
        bad.lines += 1
        text, reason = check_text(value, text_key)
        if text is None:
            bad.add(pathlib.Path(unit.source), number, reason)
        else:
            yield Document(text, pathlib.Path(unit.source), number)


def _parquet_texts(path: str, column: str) -> Iterator[Any]:
    """The values of a column: as bytes, which may be no UTF-8, where they are strings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    bytes_of = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    try:
        # Read ahead, a whole file would be held: some are larger than the memory.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER) as file:
            if column not in file.schema_arrow.names:
                raise DataError(
                    f"{path} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}: choose a --text_key"
                )
            _check_parquet_ratio(path, file.metadata, column)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                values = batch.column(0)
                yield from values.cast(bytes_of.get(values.type, values.type)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"shard {path} is no whole Parquet file ({' '.join(str(error).split())}); download it again or remove it"
        ) from error


def _check_parquet_ratio(path: str, metadata: Any, column: str) -> None:
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for part in map(group.column, range(group.num_columns)):
            if part.path_in_schema.partition(".")[0] == column:
                check_ratio(f"shard {path}", part.total_compressed_size, part.total_uncompressed_size)


def _tfds_texts(unit: Unit, feature: str) -> Iterator[Any]:
    split, folder, start, stop = unit.tfds
    source = _data_source(unit.source, split, folder)
    for index in range(start, stop):
        example = source[index]
        if feature not in example:
            raise DataError(
                f"TFDS data set {unit.source!r} has no feature {feature!r}; it has {', '.join(example)}: "
                "choose a --text_key"
            )
        yield example[feature]


@functools.cache
def _data_source(name: str, split: str, folder: str | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.data_source(name, split=split, data_dir=folder)
    except Exception as error:  # of many kinds: an unknown name or split, no network, a format without random access
        why = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise DataError(
            f"source 'tfds:{name}', split {split!r}, cannot be opened ({why}); "
            "give the name and --tfds_dir of a data set that TFDS can read by index (file format array_record)"
        ) from error
