"""Finding shards, and reading their lines whole or not at all."""

import gzip
import io
import os
import pathlib
import subprocess
import sys

import pytest
import zstandard

from fp4jax.data import DataError, find_shards
from fp4jax.data.shards import READ_BYTES, read_lines

LINES = [b'{"text": "%d %s"}' % (i, b"x" * (i % 97)) for i in range(5000)]
CONTENT = b"\n".join(LINES)


def compress(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("a.jsonl", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", compress),
        ("a.jsonl.zstd", compress),
        # Parallel compressors write several frames, some of them skippable, one after the other.
        (
            "frames.jsonl.zst",
            lambda content: b"".join(compress(content[i : i + 70_001]) for i in range(0, len(content), 70_001)),
        ),
        ("skippable.jsonl.zst", lambda content: b"\x50\x2a\x4d\x18\x04\x00\x00\x00meta" + compress(content)),
    ],
)
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_every_kind_of_shard_gives_the_same_lines(tmp_path, name, encode, end):
    shard = tmp_path / name
    shard.write_bytes(encode(CONTENT + end))
    assert list(read_lines(shard)) == LINES


def test_lines_longer_than_a_piece_and_empty_lines(tmp_path):
    lines = [b"a" * (3 * READ_BYTES), b"", b"b", b"c" * READ_BYTES]
    shard = tmp_path / "a.jsonl"
    shard.write_bytes(b"\n".join(lines))
    assert list(read_lines(shard)) == lines


def test_streams_with_a_window_of_2_gib(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    shard, buffer = tmp_path / "long.jsonl.zst", io.BytesIO()
    # Without the content size in its header the frame announces the whole window.
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(buffer, closefd=False) as writer:
        writer.write(CONTENT)
    shard.write_bytes(buffer.getvalue())
    assert list(read_lines(shard)) == LINES


@pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.5, 0.9999])
@pytest.mark.parametrize(("name", "encode"), [("cut.jsonl.zst", compress), ("cut.jsonl.gz", gzip.compress)])
def test_truncated(tmp_path, name, encode, fraction):
    encoded = encode(CONTENT)
    shard = tmp_path / name
    shard.write_bytes(encoded[: int(len(encoded) * fraction)])
    with pytest.raises(DataError, match=r"cut\.jsonl.* is truncated"):
        list(read_lines(shard))


def test_truncated_between_the_frames_of_a_shard_is_whole(tmp_path):
    shard = tmp_path / "a.jsonl.zst"
    shard.write_bytes(compress(b"one\n") + compress(b"two\n"))
    assert list(read_lines(shard)) == [b"one", b"two"]


@pytest.mark.parametrize("name", ["text.jsonl.zst", "text.jsonl.gz"])
def test_not_compressed_at_all(tmp_path, name):
    shard = tmp_path / name
    shard.write_bytes(CONTENT)
    with pytest.raises(DataError, match="is not a compressed file of the kind its name says") as raised:
        list(read_lines(shard))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "encode"), [("a.jsonl.zst", compress), ("a.jsonl.gz", gzip.compress)])
def test_damaged_in_the_middle(tmp_path, name, encode):
    content = os.urandom(1 << 20).hex().encode().replace(b"0", b"\n")
    encoded = bytearray(encode(content))
    for i in range(100):
        encoded[len(encoded) * 3 // 4 + i] ^= 0xFF
    shard = tmp_path / name
    shard.write_bytes(encoded)
    with pytest.raises(DataError, match=r"is damaged after line \d+"):
        list(read_lines(shard))


def test_unreadable(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        list(read_lines(tmp_path / "missing.jsonl"))


@pytest.fixture
def tree(tmp_path) -> pathlib.Path:
    for name in ("b/2.jsonl.zst", "b/1.jsonl.zstd", "a/3.jsonl.gz", "4.jsonl", "b/readme.md", ".hidden.jsonl"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "tree"


def test_a_folder_is_searched_through_and_sorted(tree):
    names = ["4.jsonl", "a/3.jsonl.gz", "b/1.jsonl.zstd", "b/2.jsonl.zst"]
    assert find_shards(str(tree)) == [tree / name for name in names]


def test_a_linked_folder_is_searched_too(tree, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "tree").symlink_to(tree)
    assert len(find_shards(tmp_path / "links")) == 4


def test_a_glob_and_a_single_file(tree):
    assert find_shards(f"{tree}/**/*.jsonl.zst*") == [tree / "b/1.jsonl.zstd", tree / "b/2.jsonl.zst"]
    assert find_shards(tree / "4.jsonl") == [tree / "4.jsonl"]


def test_a_folder_whose_name_looks_like_a_glob(tmp_path):
    folder = tmp_path / "part[1]"
    folder.mkdir()
    (folder / "a.jsonl").touch()
    assert find_shards(folder) == [folder / "a.jsonl"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing", "no such file or folder"),
        ("tree/*.parquet", "no file matches"),
        ("tree/b/readme.md", "is not a shard; accepted are .jsonl.zst/"),
        ("tree/b/*", "is not a shard"),
        ("empty", "the folder holds no shard"),
    ],
)
def test_nothing_to_read(tree, tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as raised:
        find_shards(str(tmp_path / source))
    assert "\n" not in str(raised.value)


def test_a_line_over_the_limit_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("fp4jax.data.shards.MAX_LINE_BYTES", 3 * READ_BYTES)
    shard = tmp_path / "a.jsonl.gz"
    shard.write_bytes(gzip.compress(b"a\n" + b"b" * (10 * READ_BYTES) + b"\n" + b"c" * (3 * READ_BYTES) + b"\nd"))
    lines = list(read_lines(shard))
    assert [len(line) for line in lines] == [1, 3 * READ_BYTES + 1, 3 * READ_BYTES, 1]
    shard.write_bytes(gzip.compress(b"b" * (10 * READ_BYTES)))
    assert [len(line) for line in read_lines(shard)] == [3 * READ_BYTES + 1]


@pytest.mark.parametrize(("name", "encode"), [("bomb.jsonl.zst", compress), ("bomb.jsonl.gz", gzip.compress)])
def test_a_decompression_bomb(tmp_path, monkeypatch, name, encode):
    monkeypatch.setattr("fp4jax.data.shards.RATIO_FROM_BYTES", 1 << 20)
    shard = tmp_path / name
    shard.write_bytes(encode(bytes(1 << 20)))
    assert sum(map(len, read_lines(shard))) == 1 << 20  # small enough to be let through
    shard.write_bytes(encode(b"\n" * (4 << 20)))
    with pytest.raises(
        DataError, match=r"bomb\.jsonl.* is a decompression bomb: [\d,]+ bytes give over [\d,]+, and 200"
    ):
        list(read_lines(shard))


PEAK = """
import pathlib, sys
from fp4jax.data.shards import read_lines
try:
    list(read_lines(pathlib.Path(sys.argv[1])))
except ValueError as error:
    print(error)
# Not getrusage: what it counts includes the memory of the process that started this one.
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024)
"""


@pytest.mark.slow
def test_memory_stays_bounded_whatever_a_shard_holds(tmp_path):
    """4 GiB in one line, which zstd stores in 131 kB."""
    compressor, shard = zstandard.ZstdCompressor(), tmp_path / "a.jsonl.zst"
    shard.write_bytes(b"".join([compressor.compress(bytes(1 << 28))] * 16))
    run = subprocess.run([sys.executable, "-c", PEAK, shard], capture_output=True, text=True, check=True)
    message, megabytes = run.stdout.splitlines()
    assert "is a decompression bomb" in message
    assert int(megabytes) < 700
