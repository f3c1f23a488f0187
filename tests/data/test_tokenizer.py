"""`python -m fp4jax.data.tokenizer train`: the same text gives the same bytes, and errors leave nothing."""

import pathlib

import pytest

from fp4jax.cli import run
from fp4jax.data import load_tokenizer, split_of
from fp4jax.data.shards import EMBEDDED_FOLDER
from fp4jax.data.tokenizer import main, train_bpe


@pytest.fixture
def train(tmp_path, capsys):
    def call(*flags: str, output: str = "tokenizer.json") -> tuple[int, str, str]:
        (tmp_path / "out").mkdir(exist_ok=True)
        usual = {"--source": tmp_path / "corpus", "--output": tmp_path / "out" / output, "--vocab_size": 300}
        given = {flag.partition("=")[0] for flag in flags}
        code = run(main, ["train", *flags, *(f"{n}={v}" for n, v in usual.items() if n not in given)])
        return code, *capsys.readouterr()

    return call


def test_it_learns_from_the_training_split_and_gives_every_text_back(write_shard, texts, train, tmp_path):
    write_shard(texts)
    code, out, err = train("--validation_fraction=0.2")
    path = tmp_path / "out" / "tokenizer.json"
    mine = [text for text in texts if split_of(text, 0.2) == "train"]
    assert (code, err) == (0, "")
    assert f"300 entries, learned from {sum(map(len, mine)):,} characters in {len(mine)} documents" in out
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (300, 0)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in [*texts, "日本 \x00 <|endoftext|>"])
    assert path.read_text() == train_bpe(mine, 300).to_str() + "\n"
    assert train("--validation_fraction=0.2", output="again.json")[0] == 0
    assert (tmp_path / "out" / "again.json").read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_the_shipped_tokenizer_is_what_it_gives(train, tmp_path):
    assert train("--source=embedded", "--vocab_size=4096")[0] == 0
    made = pathlib.Path(tmp_path / "out" / "tokenizer.json").read_bytes()
    assert made == (EMBEDDED_FOLDER / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab_size=256"], "--vocab_size=256: must be at least 257"),
        (["--source=/nowhere"], "no such file or folder"),
        (["--text_key=content"], "hold no document"),
        (["--output=/nowhere/tokenizer.json"], "give a folder that exists"),
        (["--source=cut"], "is truncated"),
    ],
)
def test_errors_leave_nothing(write_shard, texts, train, tmp_path, monkeypatch, flags, message):
    shard = write_shard(texts)
    if flags == ["--source=cut"]:
        shard.write_bytes(shard.read_bytes()[:-5])
        flags = []
    code, out, err = train(*flags)
    assert (code, out) == (1, "") and message in err and err.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tokenizer_is_not_overwritten(write_shard, texts, train, tmp_path):
    write_shard(texts)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("mine")
    code, _, err = train()
    assert code == 1 and "is there already" in err
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "mine"
