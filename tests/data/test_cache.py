"""The token cache: used again, told apart, mended, shared, and never half written."""

import concurrent.futures
import errno
import os
import pathlib
import shutil
import threading

import numpy as np
import pytest

from fp4jax.data import DataError, TokenizedCorpus, cache_folder, corpus, load_tokenizer, split_of
from fp4jax.data import cache as cache_module
from fp4jax.data.cache import tokenized_corpus


def open_corpus(shards: list[pathlib.Path], tokenizer: str = "embedded", **changes) -> TokenizedCorpus:
    settings = {"text_key": "text", "validation_fraction": 0.2, "max_bad_fraction": 0.01}
    return tokenized_corpus(shards, load_tokenizer(tokenizer), **(settings | changes))


@pytest.fixture
def no_writing(monkeypatch):
    """From now on a corpus must come from the cache."""

    def forbid():
        def refuse(*args, **kwargs):
            raise AssertionError("the corpus was tokenized again")

        monkeypatch.setattr(cache_module, "write_corpus", refuse)

    return forbid


def test_the_streams_are_the_documents(write_shard, texts, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK_CHARACTERS", 500)  # many chunks
    shards = [write_shard(texts[:25], "a.jsonl.zst"), write_shard(texts[25:], "b.jsonl.zst")]
    opened, tokenizer = open_corpus(shards), load_tokenizer("embedded")
    for split in ("train", "validation"):
        mine = [text for text in texts if split_of(text, 0.2) == split]
        expected = [id for text in mine for id in (*tokenizer.encode(text), tokenizer.end_of_text)]
        assert opened.stream(split).tolist() == expected
        assert (opened.splits[split].documents, opened.splits[split].tokens) == (len(mine), len(expected))
        p = np.unique(expected, return_counts=True)[1] / len(expected)
        assert opened.splits[split].unigram_entropy == pytest.approx(-np.sum(p * np.log(p)), abs=1e-12)
    train, validation = opened.splits["train"], opened.splits["validation"]
    assert train.documents + validation.documents == len(texts)
    assert validation.documents > 0


def test_the_chunks_do_not_show(write_shard, texts, monkeypatch):
    shards = [write_shard(texts)]
    whole = open_corpus(shards).splits
    monkeypatch.setattr(corpus, "CHUNK_CHARACTERS", 1)
    shutil.rmtree(cache_folder())
    assert open_corpus(shards).splits == whole


def test_a_second_start_reads_the_cache(write_shard, texts, no_writing):
    shards = [write_shard(texts)]
    first = open_corpus(shards)
    no_writing()
    second = open_corpus(shards)
    assert second == first
    assert second.stream("train").tolist() == first.stream("train").tolist()
    assert not second.stream("train").flags.writeable


def test_the_same_texts_elsewhere_are_the_same_entry(write_shard, texts, no_writing):
    open_corpus([write_shard(texts, "here/a.jsonl.zst")])
    no_writing()
    open_corpus([write_shard(texts, "there/b.jsonl.zst")])


@pytest.mark.parametrize("change", ["shard", "order", "text_key", "validation_fraction", "tokenizer"])
def test_what_decides_the_content_is_in_the_key(write_shard, texts, tmp_path, change):
    shards = [write_shard(texts[:30], "a.jsonl.zst"), write_shard(texts[30:], "b.jsonl.zst")]
    settings = {"max_bad_fraction": 1.0}
    first = open_corpus(shards, **settings)
    if change == "shard":
        write_shard(["another text", *texts[31:]], "b.jsonl.zst")
    elif change == "order":
        shards.reverse()
    elif change == "tokenizer":
        content = (pathlib.Path(corpus.__file__).parent / "embedded" / "tokenizer.json").read_bytes()
        (tmp_path / "tokenizer.json").write_bytes(content + b" ")
        settings["tokenizer"] = str(tmp_path)
    else:
        settings[change] = {"text_key": "url", "validation_fraction": 0.3}[change]
    assert open_corpus(shards, **settings).folder != first.folder


@pytest.mark.parametrize("change", ["size", "time", "start", "end"])
def test_a_large_shard_is_known_without_reading_it_all(tmp_path, monkeypatch, change):
    monkeypatch.setattr(cache_module, "HASHED_BYTES", 64)
    monkeypatch.setattr(cache_module, "END_BYTES", 16)
    shard = tmp_path / "a.jsonl"
    content = b'{"text": "' + b"a" * 1000 + b'"}\n'
    shard.write_bytes(content)
    os.utime(shard, ns=(0, 1_000))
    first = open_corpus([shard]).folder
    changed = {
        "size": content + b" ",
        "time": content,
        "start": content.replace(b"a", b"b", 1),
        "end": content.replace(b'a"', b'b"'),
    }[change]
    shard.write_bytes(changed)
    os.utime(shard, ns=(0, 2_000 if change == "time" else 1_000))
    assert open_corpus([shard]).folder != first


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "missing", "no facts", "bad facts", "facts of a list", "empty folder"]
)
def test_a_damaged_entry_is_written_anew(write_shard, texts, caplog, damage):
    shards = [write_shard(texts)]
    opened = open_corpus(shards)
    expected, splits = opened.stream("train").tolist(), opened.splits
    tokens, facts = opened.folder / "train.tokens", opened.folder / "corpus.json"
    content = tokens.read_bytes()
    if damage == "cut":
        tokens.write_bytes(content[:-2])
    elif damage == "flipped":
        tokens.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "missing":
        tokens.unlink()
    elif damage == "no facts":
        facts.unlink()
    elif damage == "bad facts":
        facts.write_text(facts.read_text().replace('"splits"', '"plits"'))
    elif damage == "facts of a list":
        facts.write_text("[]")
    else:
        shutil.rmtree(opened.folder)
        opened.folder.mkdir()
    again = open_corpus(shards)
    assert "is damaged" in caplog.text
    assert again.splits == splits
    assert again.stream("train").tolist() == expected


def test_a_long_stream_is_checked_by_its_length(write_shard, texts, monkeypatch, caplog):
    monkeypatch.setattr(corpus, "CHECKED_BYTES", 0)
    shards = [write_shard(texts)]
    tokens = open_corpus(shards).folder / "train.tokens"
    tokens.write_bytes(tokens.read_bytes() + b"\0\0")
    open_corpus(shards)
    assert "train.tokens is" in caplog.text


def test_a_failed_start_leaves_nothing(write_shard, texts, cache):
    good, bad = write_shard(texts, "a.jsonl.zst"), write_shard(texts, "b.jsonl.zst")
    bad.write_bytes(bad.read_bytes()[:-5])
    with pytest.raises(DataError, match="truncated"):
        open_corpus([good, bad])
    assert [path.suffix for path in (cache / "tokens").iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_removed(write_shard, texts):
    shards = [write_shard(texts)]
    folder = open_corpus(shards).folder
    partial = folder.rename(folder.with_name(f"{folder.name}.partial-0123"))
    open_corpus(shards)
    assert not partial.exists()


def test_the_limit_of_bad_lines_holds_for_a_cached_corpus(write_shard, texts, no_writing):
    shards = [write_shard([*texts, b"{", b"[]"])]
    assert open_corpus(shards, max_bad_fraction=0.1).bad_lines.bad == 2
    no_writing()
    again = open_corpus(shards, max_bad_fraction=0.1).bad_lines
    assert (again.lines, dict(again.reasons)) == (62, {"not JSON": 1, "not a JSON object": 1})
    with pytest.raises(DataError, match="2 of 62 lines hold no document"):
        open_corpus(shards, max_bad_fraction=0.01)


def test_a_cache_that_cannot_be_made(write_shard, texts, cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"token cache .* cannot be written .*FP4JAX_CACHE") as raised:
        open_corpus([write_shard(texts)])
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_permission(write_shard, texts, cache):
    cache.mkdir(mode=0o500)
    with pytest.raises(DataError, match=r"token cache .* cannot be written \(Permission denied\)"):
        open_corpus([write_shard(texts)])


def test_a_full_disk(write_shard, texts, cache, monkeypatch):
    def full(self, documents):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(corpus._SplitWriter, "append", full)
    with pytest.raises(DataError, match="No space left on device.* free some space"):
        open_corpus([write_shard(texts)])
    assert [path.suffix for path in (cache / "tokens").iterdir()] == [".lock"]


def test_an_unwritable_cache_that_holds_the_entry_is_enough(write_shard, texts, cache, monkeypatch):
    shards = [write_shard(texts)]
    first = open_corpus(shards)

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache_module, "_locked", refuse)
    assert open_corpus(shards) == first


def test_the_default_folder(monkeypatch):
    monkeypatch.delenv("FP4JAX_CACHE")
    assert cache_folder() == pathlib.Path.home() / ".cache" / "fp4jax"


def test_starts_at_the_same_time_share_one_entry(write_shard, texts, cache, monkeypatch):
    # Threads stand for processes: the lock belongs to the opened file, not to the process.
    shards, written, together = [write_shard(texts)], [], threading.Barrier(4)
    original_open, original_write = cache_module._open, cache_module.write_corpus

    def write(*args, **kwargs):
        written.append(threading.get_ident())
        original_write(*args, **kwargs)

    def first_open(folder, max_bad_fraction):
        found = original_open(folder, max_bad_fraction)
        if threading.get_ident() not in waited:
            waited.add(threading.get_ident())
            together.wait()  # nobody writes before everybody has seen that the entry is missing
        return found

    waited: set[int] = set()
    monkeypatch.setattr(cache_module, "write_corpus", write)
    monkeypatch.setattr(cache_module, "_open", first_open)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_corpus(shards), range(4)))
    assert len(written) == 1
    assert all(corpus == opened[0] for corpus in opened)
    assert sorted(path.suffix for path in (cache / "tokens").iterdir()) == ["", ".lock"]
