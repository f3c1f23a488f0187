"""The command: what it prints, and one line and exit code 1 for what a user can mend."""

import pytest

from fp4jax.cli import run
from fp4jax.data.prepare import filters
from fp4jax.data.prepare.command import main


@pytest.fixture
def call(tmp_path, capsys):
    def call_it(*flags: str) -> tuple[int, str, str]:
        given = {flag.partition("=")[0] for flag in flags}
        usual = {"--source": tmp_path / "corpus", "--output": tmp_path / "set", "--workers": 1, "--language": "any"}
        code = run(main, [*flags, *(f"{name}={value}" for name, value in usual.items() if name not in given)])
        return code, *capsys.readouterr()

    return call_it


def test_the_report_and_how_to_train_on_it(corpus_of_three, call, tmp_path):
    code, out, err = call()
    assert (code, err) == (0, "")
    assert "60 documents read from 3 inputs" in out and "0 documents dropped" in out and "tokens/s" in out
    assert f"--config.data.source={tmp_path / 'set'} --config.data.tokenizer=embedded" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source=/nowhere/*.jsonl"], "no file matches it as a glob"),
        (["--tokenizer=/nowhere.json"], "cannot be read"),
        (["--min_characters=0"], "--min_characters=0: must be at least 1"),
        (["--max_characters=x"], "invalid int value: 'x'"),
        (["--max_mojibake=2"], "must be from 0 to 1"),
        (["--workers=0"], "--workers=0: must be at least 1"),
        (["--max_bad_fraction=7"], "must be from 0 to 1"),
        (["--colour=blue"], "unrecognized arguments: --colour=blue"),
        (["--source=tfds:no_such_set"], "'tfds:no_such_set', split 'train', cannot be opened"),
        (["--text_key=content"], "60 of 60 records hold no document"),
    ],
)
def test_one_line_and_code_1(corpus_of_three, call, tmp_path, flags, message):
    code, out, err = call(*flags)
    assert (code, out) == (1, "")
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "set" / "index.json").exists()


def test_a_filter_that_cannot_work_is_no_silent_one(corpus_of_three, call, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "pycld2", None)
    code, _, err = call("--language=en")
    assert code == 1 and f"pip install {filters.LANGUAGE_PACKAGE}; or keep" in err and "--language=any" in err
    assert not (tmp_path / "set").exists()
