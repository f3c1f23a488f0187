"""Shards: which files a `source` names, and the lines inside a compressed one.

A shard is a file of JSON lines, as the DCLM corpus is published: `shard_00000000_processed.jsonl.zst`, one object a
line. Shards are read as a stream in pieces, so a shard of any size costs the same memory; a line over
`MAX_LINE_BYTES` is no document, and a shard that decompresses to over `MAX_RATIO` times its size is refused.

A truncated zstd frame is not an error to the usual stream readers: they stop early and the rest of the corpus is
missing without a word. Here every frame must reach its end.
"""

import glob
import gzip
import io
import os
import pathlib
import zlib
from collections.abc import Iterator

import zstandard

from fp4jax.data.errors import DataError

EMBEDDED_FOLDER = pathlib.Path(__file__).parent / "embedded"
"""The corpus and the tokenizer that the package ships; `embedded/README.md` tells where they come from."""

SUFFIXES = (".jsonl.zst", ".jsonl.zstd", ".jsonl.gz", ".jsonl")
READ_BYTES = 1 << 16
ZSTD_BYTES = 1 << 12
"""Compressed bytes that zstd is given at once. Four of them may stand for 128 KiB, so these for up to 128 MiB; text is
decompressed at 97 % of the speed that READ_BYTES at once would have."""

MAX_LINE_BYTES = 64 << 20
"""Longer lines are skipped, as other lines that hold no document."""

MAX_RATIO, RATIO_FROM_BYTES = 200, 256 << 20
"""A shard that gives over RATIO_FROM_BYTES, and over MAX_RATIO times the bytes that were read for them, is a
decompression bomb. Text gives 3 to 10 times; zstd can give 32,749 times, gzip 1,028 times."""

# zstd refuses windows over 128 MiB unless told otherwise; shards compressed with `zstd --long=31` need 2 GiB.
MAX_WINDOW_BYTES = 1 << 31


def find_shards(source: str | os.PathLike, suffixes: tuple[str, ...] = SUFFIXES) -> list[pathlib.Path]:
    """Lists the shards that `source` names, sorted by path.

    >>> find_shards("embedded")[0].name
    'shard_00000000_processed.jsonl.zst'

    Args:
      source: "embedded"; a folder, searched recursively; one shard; or a glob, in which `**` crosses folders.
      suffixes: what the names of shards end in.

    Raises:
      DataError: nothing is there, nothing there is a shard, or a file named explicitly is of another kind.
    """
    if str(source) == "embedded":
        return _shards_in(EMBEDDED_FOLDER, suffixes)
    if "\0" in str(source):
        raise DataError(f"data source {str(source)!r} holds a null byte, which no file's name can; give another")
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return _shards_in(path, suffixes)
    if path.is_file():
        matches = [path]
    else:
        matches = sorted(p for p in map(pathlib.Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not matches:
        raise DataError(
            f"data source {str(source)!r}: no such file or folder, and no file matches it as a glob; "
            f"give 'embedded', a folder, a glob of {'/'.join(suffixes)} files, or weighted ones: A:0.7,B:0.3"
        )
    for match in matches:
        if not match.name.endswith(suffixes):
            raise DataError(
                f"data source {str(source)!r}: {match} is not a shard; accepted are {'/'.join(suffixes)} files"
            )
    return matches


def _shards_in(folder: pathlib.Path, suffixes: tuple[str, ...]) -> list[pathlib.Path]:
    # glob, unlike Path.rglob, follows links to folders: large corpora are often linked into place.
    files = (pathlib.Path(name) for name in glob.glob(f"{glob.escape(str(folder))}/**/*", recursive=True))
    shards = sorted(file for file in files if file.name.endswith(suffixes) and file.is_file())
    if not shards:
        raise DataError(
            f"data source {str(folder)!r}: the folder holds no shard; "
            f"put {'/'.join(suffixes)} files in it, or in folders below"
        )
    return shards


def read_lines(shard: pathlib.Path) -> Iterator[bytes]:
    """Yields the lines of a shard as bytes, without the line feed, in order and in bounded memory.

    Of a line over MAX_LINE_BYTES the first MAX_LINE_BYTES + 1 are given, by which it is known.

    Raises:
      DataError: the file cannot be read, is not of the kind its name says, is damaged, ends before its compressed data
        does, or is a decompression bomb.
    """
    line_count = 0
    unfinished = bytearray()
    try:
        for piece in _pieces(shard):
            *lines, rest = piece.split(b"\n")
            if lines:
                lines[0] = bytes(unfinished) + lines[0]
                unfinished.clear()
                line_count += len(lines)
                yield from (line[: MAX_LINE_BYTES + 1] for line in lines)
            unfinished += rest[: MAX_LINE_BYTES + 1 - len(unfinished)]
        if unfinished:
            yield bytes(unfinished)
    except (zstandard.ZstdError, gzip.BadGzipFile, zlib.error) as error:
        what = (
            "is not a compressed file of the kind its name says"
            if line_count == 0
            else f"is damaged after line {line_count}"
        )
        raise DataError(f"shard {shard} {what} ({_one_line(error)}); download it again or remove it") from error
    except EOFError as error:
        raise DataError(
            f"shard {shard} is truncated: its compressed data ends early, after line {line_count}; "
            "download it again or remove it"
        ) from error
    except OSError as error:
        raise DataError(f"shard {shard} cannot be read ({error.strerror or _one_line(error)})") from error


def _pieces(shard: pathlib.Path) -> Iterator[bytes]:
    """Yields the decompressed bytes, at most READ_BYTES at once; raises EOFError where compressed data stops early."""
    with open(shard, "rb") as file:
        if shard.suffix == ".gz":
            if not os.fstat(file.fileno()).st_size:
                raise EOFError  # the gzip module takes an empty file for a whole one
            decompressed = _read(gzip.open(file))
        else:
            decompressed = _zstd_frames(file) if shard.suffix in (".zst", ".zstd") else _read(file)
        given = 0
        for long in decompressed:
            given += len(long)
            check_ratio(f"shard {shard}", file.tell(), given)
            for start in range(0, len(long), READ_BYTES):
                yield long[start : start + READ_BYTES]


def check_ratio(what: str, read: int, given: int) -> None:
    """Raises DataError if `given` bytes are too many for `read` compressed ones."""
    if given > RATIO_FROM_BYTES and given > MAX_RATIO * read:
        raise DataError(
            f"{what} is a decompression bomb: {read:,} bytes give over {given:,}, and {MAX_RATIO} times is accepted; "
            "remove it, or store it decompressed if it is what you want"
        )


def _read(file: io.BufferedIOBase) -> Iterator[bytes]:
    while piece := file.read(READ_BYTES):
        yield piece


def _zstd_frames(file: io.BufferedIOBase) -> Iterator[bytes]:
    """A file may be several frames, one after the other: that is how parallel compressors write."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    frame = decompressor.decompressobj()
    while compressed := file.read(ZSTD_BYTES):
        while compressed:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(compressed)
            compressed = frame.unused_data
    if not frame.eof:
        raise EOFError


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
