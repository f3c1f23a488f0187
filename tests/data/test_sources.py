"""Sources: prepared sets give the batches that their texts give, and several are mixed by weight."""

import io
import json
import pathlib

import numpy as np
import pytest
from rich.console import Console

from fp4jax.data import DataError, open_dataset
from fp4jax.data.prepare.inputs import find_units
from fp4jax.data.prepare.options import Options
from fp4jax.data.prepare.run import prepare
from fp4jax.data.shards import EMBEDDED_FOLDER
from fp4jax.data.sources import parse_sources

SEQ_LEN = 16


@pytest.fixture
def prepare_folder(tmp_path):
    def run(source: pathlib.Path, name: str, **changes) -> str:
        options = {"tokenizer": "embedded", "text_key": "text", "validation_fraction": 0.2, "record_tokens": 10}
        options |= {"min_characters": 1, "max_characters": 10**6, "max_mojibake": 0.1, "language": "any"}
        units, console = find_units(str(source), "train", None), Console(file=io.StringIO())
        options = Options(**(options | {"min_language_share": 0.5} | changes))
        prepare(units, tmp_path / name, options, workers=1, max_bad_fraction=0.01, console=console)
        return str(tmp_path / name)

    return run


@pytest.fixture
def two_sets(write_shard, texts, prepare_folder, tmp_path) -> tuple[str, str]:
    """A prepared set of 40 documents and a folder of text with 20 others."""
    write_shard(texts[:40], "first/0.jsonl.zst")
    write_shard(texts[40:], "second/0.jsonl.zst")
    return prepare_folder(tmp_path / "first", "prepared"), str(tmp_path / "second")


def batches_of(config, count: int, start=None, batch_size=4, seed=0, **options):
    dataset = open_dataset(config, seq_len=SEQ_LEN, batch_size=batch_size, seed=seed, **options)
    iterator = dataset.batches(start)
    return [next(iterator) for _ in range(count)], iterator.get_state(), dataset


def assert_same(first, second) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_prepared_set_gives_the_batches_of_its_texts(
    write_shard, texts, prepare_folder, data_config, tmp_path, split
):
    for index in range(3):
        write_shard(texts[20 * index : 20 * index + 20], f"corpus/{index}.jsonl.zst")
    folder = prepare_folder(tmp_path / "corpus", "prepared")
    count = 60 if split == "train" else 8
    expected, _, text = batches_of(data_config(), count, split=split)
    given, state, prepared = batches_of(data_config(source=folder), count, split=split)
    assert_same(given, expected)
    own = {"source": "", "shards": 0, "bad_lines_report": ""}
    assert vars(prepared.stats) | own == vars(text.stats) | own
    if split == "train":
        half, position, _ = batches_of(data_config(source=folder), 23)
        rest, end, _ = batches_of(data_config(source=folder), 37, json.loads(json.dumps(position)))
        assert_same(half + rest, given)
        assert end == state


def test_a_prepared_set_needs_its_own_tokenizer_and_split(two_sets, data_config, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((EMBEDDED_FOLDER / "tokenizer.json").read_bytes() + b" ")
    other = str(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"prepared with the tokenizer 'embedded', which is not data.tokenizer="):
        batches_of(data_config(source=two_sets[0], tokenizer=other), 1)
    with pytest.raises(DataError, match=r"validation_fraction=0.2, data.validation_fraction is 0.1; set it to 0.2"):
        batches_of(data_config(source=two_sets[0], validation_fraction=0.1), 1)
    (tmp_path / "prepared" / "index.json").rename(tmp_path / "prepared" / "partial")
    (tmp_path / "prepared" / "partial").unlink()
    (tmp_path / "prepared" / "partial").mkdir()
    with pytest.raises(DataError, match="is no finished prepared set"):
        batches_of(data_config(source=two_sets[0]), 1)


def rows_of(batches) -> list[tuple[int, ...]]:
    batches = list(batches)
    tokens = [row for batch in batches for row in batch["tokens"].tolist()]
    last = [row[-1] for batch in batches for row in batch["targets"].tolist()]
    return [(*row, end) for row, end in zip(tokens, last, strict=True)]


def test_a_mixture_takes_rows_by_weight_in_epochs_of_each_set(two_sets, data_config):
    first, second = two_sets
    alone = [batches_of(data_config(source=source), 1)[2].stats.rows for source in two_sets]
    config = data_config(source=f"{first}:3, {second}:1")
    batches, _, dataset = batches_of(config, 100)
    assert dataset.stats.rows == sum(alone) and dataset.stats.documents > 0
    rows = rows_of(batches)
    own = [set(rows_of(batches_of(data_config(source=source), 150)[0])) for source in two_sets]
    assert [len(rows) for rows in own] == alone and not own[0] & own[1]
    parts = [[row for row in rows if row in of] for of in own]
    assert list(map(len, parts)) == [300, 100]
    for window in range(0, 400, 40):  # evenly, all along
        assert sum(row in own[1] for row in rows[window : window + 40]) == 10
    for part, count in zip(parts, alone, strict=True):
        for epoch in range(len(part) // count):
            assert len(set(part[epoch * count : (epoch + 1) * count])) == count
    shares = [0.75 * 6400 / (alone[0] * SEQ_LEN), 0.25 * 6400 / (alone[1] * SEQ_LEN)]
    line = dataset.describe(6400)[1]
    assert f"{first} {shares[0]:.2f} times over, {second} {shares[1]:.2f} times over" in line


def test_a_mixture_resumes_and_is_shared_by_processes(two_sets, data_config):
    config = data_config(source=f"{two_sets[0]}:0.7,{two_sets[1]}:0.3")
    whole, _, _ = batches_of(config, 40)
    for position in (1, 17, 39):
        _, state, _ = batches_of(config, position)
        assert_same(batches_of(config, 40 - position, json.loads(json.dumps(state)))[0], whole[position:])
    parts = [batches_of(config, 10, process_index=i, process_count=2)[0] for i in range(2)]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
    assert_same(joined, whole[:10])
    _, state, _ = batches_of(config, 1)
    with pytest.raises(DataError, match="corpus"):
        batches_of(data_config(source=f"{two_sets[0]}:0.6,{two_sets[1]}:0.4"), 1, state)


def test_the_validation_data_of_a_mixture_are_all_of_theirs(two_sets, data_config):
    config = data_config(source=f"{two_sets[0]}:0.9,{two_sets[1]}:0.1")
    options = {"seq_len": SEQ_LEN, "batch_size": 1, "seed": 0, "split": "validation"}
    dataset = open_dataset(config, **options)
    own = [rows_of(open_dataset(data_config(source=source), **options).batches()) for source in two_sets]
    assert sorted(rows_of(dataset.batches())) == sorted(own[0] + own[1])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("embedded", {"embedded": 1.0}),
        ("/a,b", {"/a,b": 1.0}),
        ("/a:1,/b", {"/a:1,/b": 1.0}),
        ("/a:0.7,/b:0.3", {"/a": 0.7, "/b": 0.3}),
        ("/a:7, /b:3", {"/a": 7.0, "/b": 3.0}),
        ("s3:/a:1e-3,/b:1", {"s3:/a": 0.001, "/b": 1.0}),
    ],
)
def test_what_a_source_names(source, expected):
    assert parse_sources(source) == expected


@pytest.mark.parametrize("source", ["/a:0,/b:1", "/a:0.5,/a:0.5", "/a:1.2.3,/b:1"])
def test_weights_that_are_none(source):
    with pytest.raises(DataError, match="must be a number above 0|names '/a' twice") as raised:
        parse_sources(source)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("prepared", [True, False])
def test_documents_of_a_row(two_sets, data_config, prepared):
    config = data_config(source=two_sets[not prepared])
    plain, position, _ = batches_of(config, 30)
    config.document_mask = True
    masked, same_position, _ = batches_of(config, 30)
    assert position == same_position
    seen = 0
    for a, b in zip(plain, masked, strict=True):
        assert b.keys() == a.keys() | {"segment_ids", "positions"}
        assert all(np.array_equal(a[name], b[name]) for name in a)
        assert b["segment_ids"].dtype == b["positions"].dtype == np.int32
        starts = b["tokens"] == 0  # the embedded tokenizer's end-of-text
        starts[:, 0] = True
        np.testing.assert_array_equal(b["positions"] == 0, starts)
        np.testing.assert_array_equal(np.diff(b["segment_ids"], axis=1), starts[:, 1:])
        seen += int(b["segment_ids"].max())
    assert seen > 0
