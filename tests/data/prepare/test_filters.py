"""Filters: what counts as mojibake, and which language a text is in."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4jax.data import DataError
from fp4jax.data.prepare.filters import Filters, mojibake_share
from fp4jax.data.prepare.options import Options
from tests.data.prepare.conftest import OPTIONS

ENGLISH = "The committee shall report to the house what it has found, and the house shall vote on it."
GERMAN = "Der Ausschuss berichtet dem Haus, was er gefunden hat, und das Haus stimmt darüber ab."


def share(text: str) -> float:
    return mojibake_share(text, text.encode())


@pytest.mark.parametrize(
    "text", ["plain\ttext\r\n\f", "“quoted” — naïve café, Ångström", "ÂMES ÉTÉ", "日本語", "Привет", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 😀"]
)
def test_good_text_has_no_mojibake(text):
    assert share(text) == 0


@pytest.mark.parametrize("text", ["é", "ü", "ß", "–", "“", "’", "\u00a0"])
@pytest.mark.parametrize("wrong", ["latin-1", "cp1252"])
def test_utf8_read_as_another_encoding_is_found(text, wrong):
    try:
        broken = text.encode().decode(wrong)
    except UnicodeDecodeError:
        pytest.skip("this byte is none of Windows-1252")
    assert share(broken) == 1
    assert share("ab" + broken) == pytest.approx(len(broken) / (2 + len(broken)))


def test_replacement_and_control_characters_are_found():
    assert share("a\ufffd\x00\x1b\x7f\x85bcd") == 5 / 9


@given(st.text(min_size=1))
def test_a_share_is_one_whatever_the_text(text):
    text = text.encode("utf-8", "ignore").decode() or "a"
    assert 0 <= share(text) <= 1


def test_the_language_is_kept():
    pytest.importorskip("pycld2", reason="needs pip install pycld2==0.42")

    def reason(text: str, **changes) -> str | None:
        return Filters(Options(**{**vars(OPTIONS), "language": "en", **changes})).reason(text, text.encode())

    assert reason(ENGLISH) is None
    assert reason(GERMAN) == "not in language 'en'"
    assert reason(GERMAN, language="de") is None
    assert reason(GERMAN, language="any") is None
    assert reason(GERMAN * 20 + ENGLISH * 50 + GERMAN * 20) == "not in language 'en'"  # a sample of it is judged
    assert reason(f"{ENGLISH}\x00\x85\ufdd0", max_mojibake=1.0) is None  # CLD2 itself refuses such characters
    assert reason(f"{ENGLISH} {GERMAN}") == "not in language 'en'"
    assert reason(f"{ENGLISH} {GERMAN}", min_language_share=0.4) is None
    known = r"is unknown; it is any or one of \d+ codes such as "
    near = {"english": r"en \(English\)", "ger": r"de \(German\)", "eng": "en", "???": r"en \(English\), de"}
    for wrong, nearest in near.items():
        with pytest.raises(DataError, match=f"^--language={re.escape(wrong)} {known}{nearest}") as caught:
            reason(ENGLISH, language=wrong)
        assert len(str(caught.value)) < 200
