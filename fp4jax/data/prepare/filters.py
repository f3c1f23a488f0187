"""Filters: why a document is left out, if it is.

The paper (arXiv 2603.10444) drops documents that are not Unicode or not English, and gives no thresholds. Bytes that
are no UTF-8 are no document already (`documents.py`). What is decoded all the same may be mojibake: text that was
decoded as another encoding than it was written in, and whose traces are replacement characters, control characters and
pairs such as "Ã©" and "â€™".

The language is found by CLD2, whose model is inside its package. On 2,171 English and 919 other texts in 90 languages,
each some hundred characters long, it kept all the English and none of the others, at 24 MB/s; fastText's lid.176.ftz
dropped 16 % of the English at the same threshold, at 5 MB/s.
"""

import difflib
import re
from types import ModuleType

from fp4jax.data.errors import DataError
from fp4jax.data.prepare.options import ANY_LANGUAGE, Options

LANGUAGE_PACKAGE = "pycld2==0.42"
SAMPLE_CHARACTERS = 1024
"""The language of a document longer than three times this is found from so many at its start, middle and end."""

TOO_SHORT, TOO_LONG, MOJIBAKE = "too short", "too long", "mojibake"

_CONTROLS = bytes({*range(32)} - {*b"\t\n\f\r"}) + b"\x7f"
# U+FFFD, C1 controls, and two or three characters that were one in UTF-8, read as Windows-1252 or Latin-1.
_CONTINUATION = "[\x80-\xbf" + bytes(range(0x80, 0xC0)).decode("cp1252", "ignore") + "]"
_TRACES = re.compile(f"[\ufffd\x80-\x9f]|[\xc2\xc3]{_CONTINUATION}|\xe2[\x80-\x9f\u20ac]{_CONTINUATION}?")
# A text with a trace has a C1 control or one of U+FFFD, Â, Ã, â in it: those are found much faster than _TRACES.
_C1 = re.compile(b"\xc2[\x80-\x9f]")
# What CLD2 takes for invalid UTF-8: control characters and noncharacters.
_LAST_OF_PLANES = "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
_REFUSED = re.compile(f"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef{_LAST_OF_PLANES}]")


class Filters:
    """The filters of `options`, ready to use."""

    def __init__(self, options: Options):
        """Raises DataError if the language cannot be told, or is none that can."""
        self._options = options
        self._cld2 = None if options.language == ANY_LANGUAGE else _cld2(options.language)

    def reason(self, text: str, utf8: bytes) -> str | None:
        """Returns why a document is left out, the first reason that holds; None if it is kept.

        Args:
          text: the document, not empty.
          utf8: the same in UTF-8.
        """
        options = self._options
        if len(text) < options.min_characters:
            return TOO_SHORT
        if len(text) > options.max_characters:
            return TOO_LONG
        if mojibake_share(text, utf8) > options.max_mojibake:
            return MOJIBAKE
        if self._cld2 and language_share(text, utf8, options.language, self._cld2) < options.min_language_share:
            return f"not in language {options.language!r}"
        return None


def mojibake_share(text: str, utf8: bytes) -> float:
    """The share of a text's characters that are traces of a wrong encoding, or control characters that lay out none."""
    found = len(utf8) - len(utf8.translate(None, _CONTROLS))
    if not text.isascii() and (
        (b"\xc3" in utf8 and (b"\xc3\x82" in utf8 or b"\xc3\x83" in utf8 or b"\xc3\xa2" in utf8))
        or b"\xef\xbf\xbd" in utf8
        or _C1.search(utf8)
    ):
        found += sum(map(len, _TRACES.findall(text)))
    return found / len(text)


def language_share(text: str, utf8: bytes, language: str, cld2: ModuleType) -> float:
    """The share of a text's bytes that CLD2 finds to be in a language; of a long text a sample is judged."""
    if len(text) > 3 * SAMPLE_CHARACTERS:
        middle = (len(text) - SAMPLE_CHARACTERS) // 2
        pieces = (text[:SAMPLE_CHARACTERS], text[middle : middle + SAMPLE_CHARACTERS], text[-SAMPLE_CHARACTERS:])
        text = "\n".join(pieces)
        utf8 = text.encode("utf-8")
    try:
        found = cld2.detect(utf8, isPlainText=True)[2]
    except cld2.error:
        found = cld2.detect(_REFUSED.sub(" ", text).encode("utf-8"), isPlainText=True)[2]
    return sum(percent for _, code, percent, _ in found if code == language) / 100


def _cld2(language: str) -> ModuleType:
    try:
        import pycld2
    except ModuleNotFoundError:
        raise DataError(
            f"--language={language} needs a package that is not installed: pip install {LANGUAGE_PACKAGE}; "
            f"or keep documents in all languages with --language={ANY_LANGUAGE}"
        ) from None
    names = {code: name.capitalize() for name, code in pycld2.LANGUAGES}
    if language not in names:
        raise DataError(
            f"--language={language} is unknown; it is {ANY_LANGUAGE} or one of {len(names)} codes such as "
            f"{', '.join(f'{code} ({names[code]})' for code in _nearest(language, names))}"
        )
    return pycld2


def _nearest(language: str, names: dict[str, str]) -> list[str]:
    """A few codes, if there are such then those that are written like `language` or have a name that is."""
    language = language.lower()
    codes = {name.lower(): code for code, name in names.items() if not code.startswith("xx")}  # which are scripts
    named = [name for name in codes if name.startswith(language)] or difflib.get_close_matches(language, codes, 2)
    coded = difflib.get_close_matches(language, codes.values(), 2)
    return list(dict.fromkeys([*(codes[name] for name in named[:3]), *coded])) or ["en", "de", "zh"]
