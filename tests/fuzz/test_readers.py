"""Random bytes and damaged files: a reader gives what it read, or its one error in one line. Nothing else comes out.

FP4JAX_FUZZ_EXAMPLES sets how many are tried of each reader: 10,000 for the long run in docs/faults.md.
"""

import gzip
import json
import os
import pathlib

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp4jax.data.documents import BadLines, read_documents
from fp4jax.data.errors import DataError
from fp4jax.data.gguf import GGUFFile
from fp4jax.data.shards import find_shards, read_lines
from fp4jax.data.tokenizers import load_tokenizer

fuzz = settings(
    max_examples=int(os.environ.get("FP4JAX_FUZZ_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = JSON.map(lambda value: json.dumps(value).encode())
LINES = st.lists(st.binary(max_size=60) | OBJECTS, max_size=6).map(b"\n".join)


def one_line(error):
    assert "\n" not in str(error.value if hasattr(error, "value") else error)


def damaged(data, whole):
    """The bytes, cut somewhere, or with one of them changed, or as they are."""
    how = data.draw(st.sampled_from(["whole", "cut", "changed", "longer"]))
    if how == "whole" or not whole:
        return whole
    position = data.draw(st.integers(0, len(whole) - 1))
    if how == "cut":
        return whole[:position]
    if how == "longer":
        return whole + data.draw(st.binary(max_size=20))
    return whole[:position] + bytes([data.draw(st.integers(0, 255))]) + whole[position + 1 :]


COMPRESS = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": lambda raw: zstandard.ZstdCompressor(write_checksum=True).compress(raw),
}


@fuzz
@given(st.sampled_from(list(COMPRESS)), LINES, st.data())
def test_shards_give_lines_or_one_error(tmp_path, suffix, content, data):
    path = tmp_path / f"shard{suffix}"
    stored = COMPRESS[suffix](content)
    path.write_bytes(changed := damaged(data, stored))
    try:
        lines = list(read_lines(path))
    except DataError as error:
        one_line(error)
        assert changed != stored
        return
    if changed == stored:
        assert b"\n".join(lines) == content.removesuffix(b"\n")


@fuzz
@given(LINES)
def test_documents_are_texts_and_every_other_line_is_counted(tmp_path, content):
    path = tmp_path / "shard.jsonl"
    path.write_bytes(content)
    bad = BadLines(1.0)
    documents = list(read_documents([path], "text", bad))
    assert all(isinstance(document.text, str) and document.text for document in documents)
    assert len(documents) + bad.bad == bad.lines


@fuzz
@given(st.binary(max_size=300) | OBJECTS)
def test_tokenizer_files_give_one_error(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(path))
    one_line(caught)


@fuzz
@given(st.binary(max_size=300).map(lambda rest: b"GGUF" + rest) | st.binary(max_size=50))
def test_gguf_files_give_one_error(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    try:
        GGUFFile(path)
    except DataError as error:
        one_line(error)


# Names from the root or the home folder would search the whole machine.
RELATIVE = st.text(alphabet="abc/*[]?{}~\0\n ", max_size=12).filter(lambda name: not name.startswith(("/", "~")))


@fuzz
@given(RELATIVE)
def test_source_names_give_shards_or_one_error(tmp_path, name):
    previous = pathlib.Path.cwd()
    os.chdir(tmp_path)
    try:
        find_shards(name)
    except DataError as error:
        one_line(error)
    finally:
        os.chdir(previous)
