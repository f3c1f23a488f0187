"""The corpus and tokenizer that the package ships: pinned, whole, and read like any DCLM shards."""

import hashlib
import json
import pathlib
import re

import pytest

from fp4jax.config import default_config
from fp4jax.data import BadLines, DatasetStats, find_shards, open_dataset, read_documents
from fp4jax.data.shards import EMBEDDED_FOLDER, read_lines


def test_the_readme_states_the_checksums_of_the_files():
    rows = re.findall(r"^\| (\S+) \| ([\d,]+) \| ([0-9a-f]{64}) \|$", (EMBEDDED_FOLDER / "README.md").read_text(), re.M)
    assert {name for name, _, _ in rows} == {path.name for path in EMBEDDED_FOLDER.iterdir()} - {"README.md"}
    for name, size, sha256 in rows:
        content = (EMBEDDED_FOLDER / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (int(size.replace(",", "")), sha256)


def test_the_shards_are_dclm_lines():
    shards = find_shards("embedded")
    assert [shard.name for shard in shards] == [f"shard_{i:08d}_processed.jsonl.zst" for i in range(4)]
    for shard in shards:
        records = [json.loads(line) for line in read_lines(shard)]
        for record in records:
            assert set(record) == {"text", "url", "metadata", "language_id_whole_page_fasttext"}
            assert record["url"].startswith("https://www.presidency.ucsb.edu/")
        # Mixed in time: every shard reaches from Washington to this century.
        years = [int(record["metadata"]["date"][:4]) for record in records]
        assert min(years) < 1797 and max(years) > 2000


def test_every_document_is_there_once():
    bad = BadLines(0.0)
    texts = [document.text for document in read_documents(find_shards("embedded"), "text", bad)]
    assert (len(texts), len(set(texts)), bad.bad) == (249, 249, 0)
    assert sum(len(text) for text in texts) == 12_181_093


@pytest.mark.parametrize(
    ("split", "documents", "tokens", "rows", "entropy"),
    [("train", 244, 2_806_872, 10_964, 6.6190), ("validation", 5, 58_852, 229, 6.5972)],
)
def test_statistics_of_the_default_data(session_cache, split, documents, tokens, rows, entropy):
    dataset = open_dataset(default_config().data, seq_len=256, batch_size=8, seed=0, split=split)
    stats = dataset.stats
    assert isinstance(stats, DatasetStats)
    assert (stats.source, stats.tokenizer, stats.shards) == ("embedded", "embedded", 4)
    assert (stats.documents, stats.tokens, stats.rows) == (documents, tokens, rows)
    assert stats.unigram_entropy == pytest.approx(entropy, abs=1e-4)
    dataset.check_vocabulary(default_config().model.vocab_size)


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def session_cache(cache, module_cache, monkeypatch):
    """One cache for the tests of this file: the corpus is tokenized once."""
    monkeypatch.setenv("FP4JAX_CACHE", str(module_cache))
