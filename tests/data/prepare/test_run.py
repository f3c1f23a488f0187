"""A prepared set: the stream is the documents', whoever works on it and however often it is stopped."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from fp4jax.data import DataError, PreparedSet, load_tokenizer, split_of, unigram_entropy
from fp4jax.locking import InUseError, locked
from tests.data.prepare.conftest import command, contents, index_of


def stream_of(texts: list[str], split: str) -> list[int]:
    tokenizer = load_tokenizer("embedded")
    mine = [text for text in texts if split_of(text, 0.2) == split]
    return [id for text in mine for id in (*tokenizer.encode(text), tokenizer.end_of_text)]


def test_the_streams_are_the_documents(corpus_of_three, prepare_corpus, tmp_path):
    report = prepare_corpus()
    prepared = PreparedSet.open(tmp_path / "set")
    for split in ("train", "validation"):
        expected, facts = stream_of(corpus_of_three, split), prepared.splits[split]
        stream = prepared.stream(split)
        assert len(stream) == facts.tokens == report.tokens[split] == len(expected)
        assert stream[:].tolist() == expected
        assert facts.documents == report.documents[split] == expected.count(0)
        counts = np.bincount(expected, minlength=4096)
        assert facts.unigram_entropy == pytest.approx(unigram_entropy(counts), abs=1e-12)
    assert report.documents_read == 60 and report.drops == {}
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "index.json", "report.json", *(f"train-0000{i}.array_record" for i in range(3)),
        *(f"validation-0000{i}.array_record" for i in range(3)),
    ]  # fmt: skip


def test_every_slice_is_that_of_the_stream(corpus_of_three, prepare_corpus, tmp_path):
    prepare_corpus(record_tokens=7)
    stream, expected = PreparedSet.open(tmp_path / "set").stream("train"), stream_of(corpus_of_three, "train")
    random = np.random.default_rng(0)
    for start, stop in [
        (0, 0),
        (0, 1),
        (6, 8),
        (len(expected) - 1, len(expected)),
        *random.integers(0, len(expected), (50, 2)),
    ]:
        assert stream[start:stop].tolist() == expected[start:stop]
    with pytest.raises(ValueError, match="read forwards"):
        stream[::2]


def test_chunks_do_not_show(corpus_of_three, prepare_corpus, tmp_path, monkeypatch):
    prepare_corpus("whole")
    monkeypatch.setattr("fp4jax.data.prepare.unit.CHUNK_CHARACTERS", 1)
    monkeypatch.setattr("fp4jax.data.prepare.unit.FLUSHED_TOKENS", 40)
    prepare_corpus("pieces")
    assert contents(tmp_path / "whole") == contents(tmp_path / "pieces")


@pytest.mark.slow
def test_workers_do_not_show(corpus_of_three, prepare_corpus, tmp_path):
    prepare_corpus("one")
    prepare_corpus("two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_only_the_index_is_missing(corpus_of_three, prepare_corpus, tmp_path, monkeypatch):
    """Every unit was done when it was stopped; there is nothing left for workers."""

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fp4jax.data.prepare.run._finish", stopped)
        prepare_corpus()
    prepare_corpus(workers=2)
    prepare_corpus("expected")
    assert contents(tmp_path / "set") == contents(tmp_path / "expected")


def test_an_input_without_documents_has_no_shard(write_shard, texts, prepare_corpus, tmp_path):
    write_shard([], "corpus/0.jsonl.zst")
    write_shard(texts, "corpus/1.jsonl.zst")
    prepare_corpus(validation_fraction=0.0)
    index = index_of(tmp_path / "set")
    assert [shard["file"] for shard in index["splits"]["train"]["shards"]] == ["train-00001.array_record"]
    assert index["splits"]["validation"]["shards"] == []
    assert len(PreparedSet.open(tmp_path / "set").stream("validation")) == 0


def test_a_killed_run_goes_on(corpus_of_three, prepare_corpus, tmp_path):
    """The process ends at once, with nothing cleaned up, at the n-th file that would get its name."""
    assert command(tmp_path / "corpus", tmp_path / "expected").returncode == 0
    expected = contents(tmp_path / "expected")
    for nth in (2, 6, 12):  # between a unit's shards, within another, after the report and before the index
        kill = (
            f"import os\nreplace, left = os.replace, [{nth}]\n"
            "def killing(*names):\n left[0] -= 1\n os._exit(9) if not left[0] else replace(*names)\n"
            "os.replace = killing"
        )
        stopped = command(tmp_path / "corpus", tmp_path / "set", before=kill)
        assert stopped.returncode == 9, stopped.stderr
        with pytest.raises(DataError, match="is no finished prepared set"):
            PreparedSet.open(tmp_path / "set")
        done = {path: path.stat().st_mtime_ns for path in (tmp_path / "set" / "partial").glob("unit-*.json")}
        assert len(done) == {2: 0, 6: 1, 12: 3}[nth]
        shards = {path: path.stat().st_ino for path in (tmp_path / "set").glob("*.array_record")}
        again = command(tmp_path / "corpus", tmp_path / "set")
        assert again.returncode == 0, again.stderr
        assert contents(tmp_path / "set") == expected
        for index in range(len(done)):  # finished shards are not written again
            path = tmp_path / "set" / f"train-{index:05d}.array_record"
            assert path.stat().st_ino == shards[path]
        shutil.rmtree(tmp_path / "set")


@pytest.fixture
def long_run(write_shard, texts, tmp_path):
    """A preparation by two workers that are at their first shards, and what it prints as an error."""
    for index in range(4):
        write_shard([f"{number} {text}" for number in range(1000) for text in texts[:10]], f"corpus/{index}.jsonl.zst")
    arguments = [f"--source={tmp_path}/corpus", f"--output={tmp_path}/set", "--workers=2", "--language=any"]
    start = [sys.executable, "-m", "fp4jax.data.prepare", *arguments]
    process = psutil.Popen(start, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "set" / "partial").glob("train-*.writing")):
        assert process.poll() is None
        time.sleep(0.05)
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(long_run):
    workers = long_run.children()
    assert len(workers) >= 2
    long_run.kill()
    long_run.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run(long_run):
    next(child for child in long_run.children() if "spawn_main" in " ".join(child.cmdline())).kill()
    _, error = long_run.communicate(timeout=60)
    assert long_run.returncode == 1
    assert error.startswith("error: a worker process was killed") and error.count("\n") == 1


def test_a_finished_set_is_not_done_again(corpus_of_three, prepare_corpus, tmp_path):
    first = prepare_corpus()
    (tmp_path / "set" / "partial").mkdir()  # as after a kill at the very end
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*.*")}
    assert prepare_corpus() == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}


@pytest.mark.parametrize("finished", [True, False])
def test_another_set_in_the_folder_is_refused(corpus_of_three, prepare_corpus, write_shard, tmp_path, finished):
    if finished:
        prepare_corpus()
    else:
        (tmp_path / "corpus" / "2.jsonl.zst").write_bytes(b"no zstd")
        with pytest.raises(DataError, match="is not a compressed file"):
            prepare_corpus()
        assert len(list((tmp_path / "set" / "partial").glob("unit-*.json"))) == 2
    with pytest.raises(
        DataError, match=r"holds shards of other options .*\(min_characters 1 and not 2\); give the same"
    ):
        prepare_corpus(min_characters=2)
    write_shard(["another"], "corpus/3.jsonl.zst")
    with pytest.raises(DataError, match=r"other options or inputs \(inputs\)"):
        prepare_corpus()


def test_a_mended_input_is_taken_up_and_a_changed_one_refused(corpus_of_three, prepare_corpus, write_shard, tmp_path):
    prepare_corpus("expected")
    whole = (tmp_path / "corpus" / "2.jsonl.zst").read_bytes()
    (tmp_path / "corpus" / "2.jsonl.zst").write_bytes(whole[:-5])
    with pytest.raises(DataError, match="truncated"):
        prepare_corpus()
    assert not list((tmp_path / "set").glob("*00002*"))
    first = (tmp_path / "corpus" / "0.jsonl.zst").read_bytes()
    write_shard(["other text"], "corpus/0.jsonl.zst")
    (tmp_path / "corpus" / "2.jsonl.zst").write_bytes(whole)
    with pytest.raises(DataError, match="0.jsonl.zst has changed since its shard was written"):
        prepare_corpus()
    (tmp_path / "corpus" / "0.jsonl.zst").write_bytes(first)
    with pytest.raises(DataError, match="has changed"):  # by its time
        prepare_corpus()
    prepare_corpus("anew")
    assert contents(tmp_path / "anew") == contents(tmp_path / "expected")


def test_an_error_before_the_first_shard_leaves_nothing(write_shard, prepare_corpus, tmp_path):
    write_shard(["text"], "corpus/0.jsonl.zst").write_bytes(b"no zstd")
    with pytest.raises(DataError, match="not a compressed file"):
        prepare_corpus()
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(("content", "message"), [("file", "is a file; name a folder"), ("folder", "holds something")])
def test_something_else_in_the_way(corpus_of_three, prepare_corpus, tmp_path, content, message):
    if content == "file":
        (tmp_path / "set").write_text("mine")
    else:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "mine").write_text("mine")
    with pytest.raises(DataError, match=message):
        prepare_corpus()
    assert [path.read_text() for path in (tmp_path / "set", tmp_path / "set" / "mine") if path.is_file()] == ["mine"]


def test_two_at_the_same_output(corpus_of_three, prepare_corpus, tmp_path):
    (tmp_path / "set" / "partial").mkdir(parents=True)
    with locked(tmp_path / "set" / "partial" / "lock"):
        with pytest.raises(InUseError, match=r"^process \d+ on \S+ is preparing --output=.*; wait for it or stop it$"):
            prepare_corpus()


def test_bad_records_are_counted_over_all_inputs(write_shard, texts, prepare_corpus, tmp_path):
    write_shard(["one", b"{"], "corpus/0.jsonl.zst")  # half of this one
    write_shard(texts, "corpus/1.jsonl.zst")
    report = prepare_corpus(max_bad_fraction=0.02)
    assert (report.documents_read, report.drops) == (62, {"not JSON": 1})
    assert report.first_bad.endswith("0.jsonl.zst line 2: not JSON")
    with pytest.raises(DataError, match=r"1 of 62 records hold no document, more than --max_bad_fraction=0.01 allows"):
        prepare_corpus("other")


def test_nothing_left_to_train_on(corpus_of_three, prepare_corpus, tmp_path):
    with pytest.raises(DataError, match=r'of 60 documents none is left to train on \({"too short": 60}\)'):
        prepare_corpus(min_characters=90_000)
    assert not (tmp_path / "set").exists()
    assert prepare_corpus().documents_read == 60


def test_every_drop_is_counted(write_shard, prepare_corpus):
    write_shard(["abc", "abcdef", "abcdefghi" * 9, "Ã©tÃ© " * 2, "kept text", b'{"text": "caf\xe9"}'])
    report = prepare_corpus(min_characters=4, max_characters=50, validation_fraction=0.0)  # not Unicode: no bad record
    assert report.drops == {"mojibake": 1, "not UTF-8": 1, "too long": 1, "too short": 1}
    assert report.documents == {"train": 2, "validation": 0} and report.documents_read == 6


def test_a_text_too_much_for_the_tokenizer_is_dropped(write_shard, prepare_corpus, monkeypatch):
    from fp4jax.data import tokenizers

    encode = tokenizers.HuggingFaceTokenizer.encode_array

    def panics(self, text):
        if text == "too much":
            raise tokenizers.CannotEncodeError("no")
        return np.zeros(3, np.uint32) if text == "ends" else encode(self, text)

    monkeypatch.setattr(tokenizers.HuggingFaceTokenizer, "encode_array", panics)
    write_shard(["too much", "ends", "kept"])
    report = prepare_corpus(validation_fraction=0.0)
    assert report.drops == {"holds the end-of-text token": 1, "too much for the tokenizer": 1}
    assert report.documents["train"] == 1


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "index", "version"])
def test_a_damaged_set_is_refused(corpus_of_three, prepare_corpus, tmp_path, damage):
    prepare_corpus()
    shard, index = tmp_path / "set" / "train-00001.array_record", tmp_path / "set" / "index.json"
    content = shard.read_bytes()
    match damage:
        case "missing":
            shard.unlink()
        case "cut":
            shard.write_bytes(content[:-1])
        case "flipped":
            shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
        case "index":
            index.write_text(index.read_text()[:-20])
        case "version":
            index.write_text(index.read_text().replace("version 1", "version 0"))
    with pytest.raises(DataError, match="is missing|is of .* bytes|another content|is not an index") as raised:
        PreparedSet.open(tmp_path / "set")
    assert "\n" not in str(raised.value)


def test_the_index_says_what_was_done(corpus_of_three, prepare_corpus, tmp_path):
    prepare_corpus()
    index = index_of(tmp_path / "set")
    sizes = [(tmp_path / "corpus" / f"{i}.jsonl.zst").stat().st_size for i in range(3)]
    assert index["inputs"] == [{"name": f"{i}.jsonl.zst", "bytes": sizes[i]} for i in range(3)]
    assert index["options"]["record_tokens"] == 16
    assert index["tokenizer"]["fingerprint"] == load_tokenizer("embedded").fingerprint
    assert str(tmp_path) not in json.dumps(index)  # a set does not depend on where its inputs are
    for shard in index["splits"]["train"]["shards"]:
        path = pathlib.Path(tmp_path, "set", shard["file"])
        sums = subprocess.run(["b2sum", "--length=256", path], capture_output=True, text=True, check=True).stdout
        assert (shard["bytes"], shard["blake2b"]) == (path.stat().st_size, sums.split()[0])
