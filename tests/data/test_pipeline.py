"""The pipeline: the same batches however many processes read them and however often a run is resumed."""

import json

import numpy as np
import pytest

from fp4jax.data import DataError, Dataset, open_dataset

SEQ_LEN = 16


@pytest.fixture
def open_split(write_shard, texts, data_config):
    """Opens a corpus of 60 documents, some hundred rows."""
    write_shard(texts)

    def open_it(split: str = "train", batch_size: int = 4, seed: int = 0, **options) -> Dataset:
        config = data_config(**{key: options.pop(key) for key in list(options) if key in data_config()})
        return open_dataset(config, seq_len=SEQ_LEN, batch_size=batch_size, seed=seed, split=split, **options)

    return open_it


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return [next(iterator) for _ in range(count)]


def rows_of(batches: list[dict[str, np.ndarray]]) -> list[tuple[int, ...]]:
    """The rows of the stream that batches were made from, padding left out."""
    return [
        (*tokens.tolist(), int(targets[-1]))
        for batch in batches
        for tokens, targets, mask in zip(batch["tokens"], batch["targets"], batch["loss_mask"], strict=True)
        if mask.all()
    ]


def assert_same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_a_batch(open_split):
    batch = next(open_split().batches())
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "tokens": ((4, SEQ_LEN), "int32"),
        "targets": ((4, SEQ_LEN), "int32"),
        "loss_mask": ((4, SEQ_LEN), "float32"),
    }
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert batch["loss_mask"].all()


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_every_epoch_reads_every_row_once_in_another_order(open_split, batch_size):
    dataset = open_split(batch_size=batch_size)
    count = dataset.stats.rows
    assert count % 7 and count > 50
    rows = rows_of(take(dataset.batches(), -(-3 * count // batch_size)))
    epochs = [rows[i * count : (i + 1) * count] for i in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len(set(epochs[0])) == count
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


def test_seeds_give_unrelated_orders(open_split):
    count = open_split().stats.rows
    first, second = (rows_of(take(open_split(batch_size=1, seed=seed).batches(), 2 * count)) for seed in (0, 1))
    assert first[:count] != second[:count]
    assert first[count:] != second[:count]  # Grain's own seeds would be one epoch apart
    again = rows_of(take(open_split(batch_size=1).batches(), count))
    assert again == first[:count]


def test_a_corpus_smaller_than_a_batch_repeats_within_it(open_split):
    rows = open_split().stats.rows
    read = rows_of([next(open_split(batch_size=2 * rows).batches())])
    assert len(set(read[:rows])) == len(set(read[rows:])) == rows


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_same_global_batches(open_split, split, process_count):
    whole = open_split(split, batch_size=8)
    count = -(-whole.stats.rows // 8) + (3 if split == "train" else 0)  # over the end of an epoch
    parts = [
        take(open_split(split, batch_size=8, process_index=i, process_count=process_count).batches(), count)
        for i in range(process_count)
    ]
    together = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts, strict=True)
    ]
    assert_same(together, take(whole.batches(), count))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_resume_is_exact_anywhere(open_split, split):
    dataset = open_split(split)
    steps = -(-dataset.stats.rows // 4)
    total = 2 * steps + 3 if split == "train" else steps
    whole = take(dataset.batches(), total)
    end_of_epoch = dataset.stats.rows // 4
    random = np.random.default_rng(0).integers(0, total, 5).tolist()
    for position in {0, 1, end_of_epoch, end_of_epoch - 1, total - 1, total, *random}:
        iterator = dataset.batches()
        take(iterator, position)
        state = json.loads(json.dumps(iterator.get_state()))
        resumed = open_split(split).batches(state)
        assert resumed.get_state() == state
        assert_same(take(resumed, total - position), whole[position:])


def test_resume_on_another_number_of_processes(open_split):
    iterator = open_split(batch_size=8).batches()
    take(iterator, 5)
    states = []
    for i in range(2):
        part = open_split(batch_size=8, process_index=i, process_count=2).batches(iterator.get_state())
        states.append(part.get_state())
        np.testing.assert_array_equal(next(part)["tokens"], iterator_peek(iterator)["tokens"][4 * i : 4 * i + 4])
    assert states == [iterator.get_state()] * 2


def iterator_peek(iterator):
    state = iterator.get_state()
    batch = next(iterator)
    iterator.set_state(state)
    return batch


def test_going_back_with_batches_read_ahead(open_split):
    iterator = open_split(prefetch=8).batches()
    state = iterator.get_state()
    first = take(iterator, 5)
    iterator.set_state(state)
    assert_same(take(iterator, 5), first)


@pytest.mark.parametrize("prefetch", [0, 1, 16])
def test_reading_ahead_changes_nothing(open_split, prefetch):
    iterator = open_split(prefetch=prefetch).batches()
    assert_same(take(iterator, 10), take(open_split().batches(), 10))
    assert iterator.get_state()["next_batch"] == 10
    iterator.close()


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_validation_is_one_pass_whatever_the_seed(open_split, batch_size):
    dataset = open_split("validation", batch_size)
    batches = list(dataset.batches())
    assert len(batches) == -(-dataset.stats.rows // batch_size)
    assert all(batch["tokens"].shape == (batch_size, SEQ_LEN) for batch in batches)
    rows = rows_of(batches)
    assert len(rows) == len(set(rows)) == dataset.stats.rows
    assert sum(batch["loss_mask"].sum() for batch in batches) == dataset.stats.rows * SEQ_LEN
    assert_same(batches, list(open_split("validation", batch_size, seed=9).batches()))


def test_the_splits_share_no_document(open_split):
    train, validation = open_split(), open_split("validation")
    assert train.stats.documents + validation.stats.documents == 60
    steps = -(-train.stats.rows // 4)
    assert not set(rows_of(take(train.batches(), steps))) & set(rows_of(list(validation.batches())))


def test_stats_and_first_lines(open_split, write_shard, texts):
    write_shard([b"{"], "corpus/more/shard.jsonl.zst")
    dataset = open_split(max_bad_fraction=0.05)
    stats = dataset.stats
    assert (stats.shards, stats.bad_lines, stats.vocab_size, stats.end_of_text) == (2, 1, 4096, 0)
    assert stats.tokens == stats.rows * SEQ_LEN + 1 + stats.tokens_left_out
    assert 0 < stats.unigram_entropy < np.log(stats.vocab_size)
    lines = dataset.describe(3 * stats.rows * SEQ_LEN)
    assert f"{stats.documents} documents, {stats.tokens:,} tokens" in lines[0]
    assert "3.00 times over" in lines[1]
    assert f"{stats.unigram_entropy:.3f} nats" in lines[2]
    assert lines[3].startswith("skipped 1 of 61 lines (1 not JSON); the first is ")


def test_the_model_must_have_a_place_for_every_token(open_split):
    dataset = open_split()
    dataset.check_vocabulary(4096)
    with pytest.raises(
        DataError, match="model.vocab_size=4,095 is smaller than the 4,096 tokens of tokenizer 'embedded'"
    ):
        dataset.check_vocabulary(4095)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split is 'test'; it must be one of train, validation"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2 of 2"),
        ({"process_count": 0}, "of 0 processes"),
        ({"batch_size": 5, "process_count": 2}, "must be a multiple of the 2 processes"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"max_bad_fraction": -0.1}, "max_bad_fraction is -0.1"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"source": "/nowhere"}, "no such file or folder"),
        ({"tokenizer": "/nowhere"}, "cannot be read"),
        (
            {"validation_fraction": 0.0, "split": "validation"},
            "validation split .* 0 tokens in 0 documents.* raise data.valid",
        ),
    ],
)
def test_what_cannot_be_opened(open_split, options, message):
    with pytest.raises(DataError, match=message) as raised:
        open_split(**options)
    assert "\n" not in str(raised.value)


def test_a_corpus_too_small_for_one_row(write_shard, data_config):
    write_shard(["short"])
    with pytest.raises(
        DataError, match=r"train split .* in 1 documents, fewer than the 17 of one row; give more text or"
    ):
        open_dataset(data_config(validation_fraction=0.0), seq_len=16, batch_size=1, seed=0)
    with pytest.raises(DataError, match="seq_len is 0"):
        open_dataset(data_config(), seq_len=0, batch_size=1, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "other data or settings .seed 1 → 0"),
        ({"batch_size": 8, "seq_len": 32}, "seq_len 32 → 16, batch_size 8 → 4"),
        ({"corpus": "0"}, "corpus '0' → "),
        ({"tokenizer": "0"}, "tokenizer '0' → "),
        ({"next_batch": -1}, "position -1 is outside"),
        ({"next_batch": "1"}, "position '1' is outside"),
        ({"more": 1}, "was not made by this data pipeline"),
    ],
)
def test_a_position_elsewhere_is_refused(open_split, change, message):
    dataset = open_split()
    state = dataset.batches().get_state()
    with pytest.raises(DataError, match=message):
        dataset.batches(state | change)


def test_a_position_from_before_positions_named_their_tokenizer_is_taken(open_split):
    dataset = open_split()
    iterator = dataset.batches()
    next(iterator)
    former = {key: value for key, value in iterator.get_state().items() if key != "tokenizer"}
    assert dataset.batches(former).get_state() == iterator.get_state()


def test_a_position_after_the_last_validation_batch(open_split):
    dataset = open_split("validation")
    iterator = dataset.batches()
    list(iterator)
    assert list(dataset.batches(iterator.get_state())) == []
    with pytest.raises(DataError, match="is outside the"):
        dataset.batches(iterator.get_state() | {"next_batch": 10_000})


def test_the_cache_serves_every_sequence_length(open_split, data_config, cache):
    open_split()
    entries = sorted((cache / "tokens").iterdir())
    open_dataset(data_config(), seq_len=32, batch_size=1, seed=0)
    assert sorted((cache / "tokens").iterdir()) == entries
