"""Documents, bad lines and the split by document."""

import json

import pytest

from fp4jax.data import BadLines, DataError, read_documents, split_of
from fp4jax.data.documents import EARLY_STOP_BAD_LINES

BAD_LINES = {
    b"{": "not JSON",
    b"plain text": "not JSON",
    b"[" * 100_000: "not JSON",
    b'{"text": 1' + b"0" * 5000 + b"}": "not JSON",  # an integer too long for Python
    b'["text"]': "not a JSON object",
    b"null": "not a JSON object",
    b'{"url": "https://example.com/"}': "no string 'text'",
    b'{"text": null}': "no string 'text'",
    b'{"text": ["a"]}': "no string 'text'",
    b'{"text": ""}': "empty 'text'",
    b'{"text": "caf\xe9"}': "not UTF-8",
    b'{"text": "\\ud83d"}': "half a surrogate pair",
}


def test_documents_come_in_order_with_their_place(write_shard, texts):
    first = write_shard(texts[:20], "a.jsonl.zst")
    second = write_shard(texts[20:], "b.jsonl.zst")
    bad = BadLines(0.0)
    documents = list(read_documents([first, second], "text", bad))
    assert [document.text for document in documents] == texts
    assert [(document.shard, document.line) for document in documents[19:21]] == [(first, 20), (second, 1)]
    assert (bad.lines, bad.bad, bad.describe()) == (60, 0, "no bad line in 60")


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=[str(i) for i in range(len(BAD_LINES))])
def test_a_bad_line_is_skipped_counted_and_reported(write_shard, line, reason):
    shard = write_shard(["one", b"", line, b"  ", "two"])
    bad = BadLines(0.5)
    assert [document.text for document in read_documents([shard], "text", bad)] == ["one", "two"]
    assert (bad.lines, dict(bad.reasons)) == (3, {reason: 1})
    assert bad.describe() == f"skipped 1 of 3 lines (1 {reason}); the first is {shard} line 3: {reason}"


def test_an_escaped_surrogate_pair_is_a_character(write_shard):
    shard = write_shard([b'{"text": "\\ud83d\\ude00"}'])
    assert [document.text for document in read_documents([shard], "text", BadLines(0.0))] == ["\U0001f600"]


@pytest.mark.parametrize(("bad_count", "stops"), [(1, False), (2, True)])
def test_more_than_the_fraction_stops(write_shard, bad_count, stops):
    # The first lines are the bad ones: the fraction is of the whole corpus, not of what was read so far.
    first = write_shard([b"{"] * bad_count + ["text"] * (50 - bad_count), "a.jsonl.zst")
    second = write_shard(["text"] * 50, "b.jsonl.zst")
    bad = BadLines(0.01)
    if not stops:
        assert len(list(read_documents([first, second], "text", bad))) == 99
        return
    with pytest.raises(DataError, match=r"2 of 100 lines .* the first is .*a\.jsonl\.zst line 1: not JSON") as raised:
        list(read_documents([first, second], "text", bad))
    assert "\n" not in str(raised.value)


def test_a_wrong_text_key_stops_early(write_shard):
    shard = write_shard(["text"] * (EARLY_STOP_BAD_LINES + 500))
    bad = BadLines(0.01)
    with pytest.raises(DataError, match="no string 'content'"):
        list(read_documents([shard], "content", bad))
    assert bad.lines == EARLY_STOP_BAD_LINES


def test_another_text_key(write_shard):
    shard = write_shard([json.dumps({"content": "a"}).encode()])
    assert [document.text for document in read_documents([shard], "content", BadLines(0.0))] == ["a"]


def test_split_takes_the_fraction_and_depends_on_the_text_alone():
    sides = [split_of(f"document {i}", 0.02) for i in range(20_000)]
    # 400 expected, standard deviation 20
    assert 320 <= sides.count("validation") <= 480
    assert {split_of("same", 0.5) for _ in range(3)} == {split_of("same", 0.5)}
    assert {split_of(f"document {i}", 0.0) for i in range(1000)} == {"train"}


def test_split_grows_with_the_fraction():
    small = {i for i in range(2000) if split_of(str(i), 0.1) == "validation"}
    large = {i for i in range(2000) if split_of(str(i), 0.3) == "validation"}
    assert small < large


def test_split_is_frozen():
    # A change here moves validation documents of every user into training.
    validation = [i for i in range(100) if split_of(f"document {i}", 0.1) == "validation"]
    assert validation == [17, 18, 20, 24, 40, 44, 54, 84, 92, 98]
