"""Inputs: DCLM's files, Parquet and TFDS give the same documents."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fp4jax.data import BadLines, DataError
from fp4jax.data.prepare import inputs
from fp4jax.data.prepare.inputs import documents_of, find_units


def texts_of(source: object, bad: BadLines | None = None, key: str = "text", **tfds) -> list[str]:
    units = find_units(str(source), tfds.get("split", "train"), tfds.get("folder"))
    return [document.text for unit in units for document in documents_of(unit, key, bad or BadLines(0.0))]


def test_files_are_units_in_the_order_of_their_paths(write_shard, tmp_path):
    write_shard(["c"], "corpus/b/1.jsonl.zst")
    write_shard(["b"], "corpus/a/2.jsonl.zst")
    (tmp_path / "corpus" / "0.jsonl").write_text('{"text": "a"}\n')
    units = find_units(str(tmp_path / "corpus"), "train", None)
    assert [(unit.index, unit.name) for unit in units] == [(0, "0.jsonl"), (1, "a/2.jsonl.zst"), (2, "b/1.jsonl.zst")]
    assert texts_of(tmp_path / "corpus") == ["a", "b", "c"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(texts, tmp_path, kind):
    table = pa.table({"url": ["u"] * 60, "content": pa.array(texts, pa.string()).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=25)
    assert texts_of(tmp_path, key="content") == texts


@pytest.mark.parametrize("rows_of_a_group", [500, 10**6])
def test_a_large_parquet_file_is_never_held_whole(tmp_path, rows_of_a_group):
    """Whatever its row groups (some files have one), but for pages of 1,024 rows, as Arrow writes them."""
    random = np.random.default_rng(0)
    texts = ["".join(map(chr, random.integers(97, 123, 2_000))) for _ in range(5_000)]
    pq.write_table(
        pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=rows_of_a_group, use_dictionary=False
    )
    before, peak = pa.total_allocated_bytes(), 0
    for document in documents_of(find_units(str(tmp_path), "train", None)[0], "text", BadLines(0.0)):
        peak = max(peak, pa.total_allocated_bytes() - before)
        assert len(document.text) == 2_000
    assert 0 < peak < 5_000_000 < 2_000 * 5_000


def test_rows_of_parquet_without_a_text(tmp_path):
    values = pa.array([b"one", None, b"caf\xe9", b"", b"two"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 5, values.buffers())  # a writer that did not check
    pq.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    bad = BadLines(1.0)
    assert texts_of(tmp_path / "a.parquet", bad) == ["one", "two"]
    assert (bad.lines, dict(bad.reasons)) == (5, {"no string 'text'": 1, "not UTF-8": 1, "empty 'text'": 1})


def test_what_is_no_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a" * 1000], "n": [1]}), path)
    with pytest.raises(DataError, match=r"has no column 'content'; it has text, n: choose a --text_key"):
        texts_of(path, key="content")
    bad = BadLines(1.0)
    assert texts_of(path, bad, key="n") == [] and dict(bad.reasons) == {"no string 'n'": 1}
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="is no whole Parquet file") as raised:
        texts_of(path)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of TFDS and what it imports, as it writes a data set
def test_a_tfds_data_set(texts, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class Speeches(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = code_path = tmp_path

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": ((index, {"text": text}) for index, text in enumerate(texts))}

        def _generate_examples(self):
            raise NotImplementedError

    Speeches(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setattr(inputs, "TFDS_EXAMPLES", 25)
    units = find_units("tfds:speeches", "train", str(tmp_path))
    assert [unit.name for unit in units] == [f"tfds:speeches train[{a}:{b}]" for a, b in ((0, 25), (25, 50), (50, 60))]
    assert sorted(texts_of("tfds:speeches", folder=str(tmp_path))) == sorted(texts)  # TFDS shuffles as it writes
    assert len(texts_of("tfds:speeches", folder=str(tmp_path), split="train[:10]")) == 10
    with pytest.raises(DataError, match="has no feature 'content'; it has text"):
        texts_of("tfds:speeches", folder=str(tmp_path), key="content")
