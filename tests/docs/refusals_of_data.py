"""The rows of docs/errors.md about data and its preparation."""

import contextlib
import gzip
import io
import pathlib
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from rich.console import Console

from fp4jax.data.prepare.inputs import find_units
from fp4jax.data.prepare.run import prepare
from fp4jax.data.shards import READ_BYTES, read_lines
from tests.docs.refusals import LINES, OPTIONS, Call, Place, refused
from tests.models import hf_folders


@refused("no such data")
def _(place: Place) -> Call:
    return partial(place.open, str(place.folder / "nowhere"))


@refused("a folder without shards")
def _(place: Place) -> Call:
    return partial(place.open, str(place.folder))


@refused("a truncated zstd shard")
def _(place: Place) -> Call:
    return partial(place.open, place.shard(zstandard.compress(LINES)[:-40], "a.jsonl.zst"))


@refused("a truncated gzip shard")
def _(place: Place) -> Call:
    return partial(place.open, place.shard(gzip.compress(LINES)[:-40], "a.jsonl.gz"))


@refused("a shard that is not compressed as its name says")
def _(place: Place) -> Call:
    return partial(place.open, place.shard(LINES, "a.jsonl.zst"))


@refused("a shard with damaged bytes")
def _(place: Place) -> Call:
    noise = np.random.default_rng(0).bytes(8 * READ_BYTES).replace(b"\n", b"n")
    content = bytearray(gzip.compress(LINES + noise))
    content[-100_000:-90_000] = bytes(10_000)
    return partial(place.open, place.shard(content, "a.jsonl.gz"))


@refused("lines that are not UTF-8")
def _(place: Place) -> Call:
    return partial(place.open, place.shard(b'{"text": "caf\xe9"}\n' + LINES))


@refused("lines that are no JSON objects")
def _(place: Place) -> Call:
    return partial(place.open, place.shard(b'["text"]\n' + LINES))


@refused("lines without the key of the text")
def _(place: Place) -> Call:
    return partial(place.open, place.shard(LINES), text_key="content")


@refused("a line of 100 MB")
def _(place: Place) -> Call:
    with gzip.open(place.shard(b"", "a.jsonl.gz"), "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"a" * 1_000_000)
        file.write(b'"}\n' + LINES)
    return partial(place.open, str(place.folder / "shards"))


@refused("a decompression bomb")
def _(place: Place) -> Call:
    return partial(place.open, place.shard(zstandard.compress(bytes(300 << 20)), "a.jsonl.zst"))


@refused("empty shards")
def _(place: Place) -> Call:
    place.shard(b"", "b.jsonl")
    return partial(place.open, place.shard(b""))


@refused("a shard that vanishes before it is read")
def _(place: Place) -> Call:
    shard = pathlib.Path(place.shard(LINES))
    lines = read_lines(shard)
    shard.unlink()
    return partial(list, lines)


@refused("a shard of a prepared set that vanishes in the middle of a run")
def _(place: Place) -> Call:
    source = place.prepared()
    # Files are opened when they are first read; one that is open goes on being readable.
    opened = place.open(source)
    for shard in pathlib.Path(source).glob("*.array_record"):
        shard.unlink()

    def read() -> None:
        with contextlib.closing(opened.batches()) as batches:
            for _ in range(100):
                next(batches)

    return read


@refused("a weight that is zero")
def _(place: Place) -> Call:
    return partial(place.open, "a:0,b:1")


@refused("a prepared set of another tokenizer")
def _(place: Place) -> Call:
    (place.folder / "tokenizer.json").write_text(hf_folders.tokenizer_json())
    return partial(place.open, place.prepared(), tokenizer=str(place.folder / "tokenizer.json"))


@refused("a prepared set of another split")
def _(place: Place) -> Call:
    return partial(place.open, place.prepared(), validation_fraction=0.1)


@refused("a prepared set with a damaged shard")
def _(place: Place) -> Call:
    source = place.prepared()
    shard = next(pathlib.Path(source).glob("train*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    return partial(place.open, source)


@refused("a prepared set that is not finished")
def _(place: Place) -> Call:
    source = place.prepared()
    (pathlib.Path(source) / "index.json").rename(pathlib.Path(source) / "partial")
    (pathlib.Path(source) / "partial").unlink()
    (pathlib.Path(source) / "partial").mkdir()
    return partial(place.open, source)


@refused("an index of another format")
def _(place: Place) -> Call:
    source = place.prepared()
    index = pathlib.Path(source) / "index.json"
    index.write_text(index.read_text().replace("version 1", "version 2"))
    return partial(place.open, source)


# Preparing


@refused("a Parquet file that is cut")
def _(place: Place) -> Call:
    path = place.folder / "a.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    path.write_bytes(path.read_bytes()[:-8])
    units = find_units(str(path), "train", None)
    return partial(
        prepare, units, place.out, OPTIONS, workers=1, max_bad_fraction=0.0, console=Console(file=io.StringIO())
    )


@refused("a Parquet file without the column")
def _(place: Place) -> Call:
    pq.write_table(pa.table({"content": ["a"], "url": ["b"]}), place.folder / "a.parquet")
    units = find_units(str(place.folder / "a.parquet"), "train", None)
    return partial(
        prepare, units, place.out, OPTIONS, workers=1, max_bad_fraction=0.0, console=Console(file=io.StringIO())
    )


@refused("an output that holds something else")
def _(place: Place) -> Call:
    (place.folder / "full").mkdir()
    (place.folder / "full" / "letter.txt").touch()
    place.shard(LINES)
    return partial(place.prepared, place.folder / "full")


@refused("an output of other options")
def _(place: Place) -> Call:
    place.prepared()
    return partial(place.prepared, record_tokens=32)


@refused("no worker")
def _(place: Place) -> Call:
    place.shard(LINES)
    return partial(place.prepared, place.out, workers=0)


@refused("filters that leave nothing")
def _(place: Place) -> Call:
    place.shard(LINES)
    return partial(place.prepared, place.out, min_characters=1000)
