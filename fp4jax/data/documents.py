"""Documents: the texts in the shards, the lines that hold none, and which documents validate.

DCLM's lines are JSON objects with `text`, `url`, `metadata` and more; only the text is read. Web corpora hold a few
broken lines: they are skipped, counted and reported, and a run stops when they are more than a stated fraction of all
lines.
"""

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from fp4jax.data.errors import DataError
from fp4jax.data.json_files import parse_json
from fp4jax.data.shards import MAX_LINE_BYTES, read_lines

SPLITS = ("train", "validation")

EARLY_STOP_BAD_LINES = 1000
"""The bad fraction is judged at the end of the corpus, and from this many bad lines on, so that a wrong
`text_key` does not read a terabyte first."""

NOT_UTF8, HALF_A_PAIR = "not UTF-8", "half a surrogate pair"
TOO_LONG = f"longer than {MAX_LINE_BYTES >> 20} MiB"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, the shard it came from and its line there (from 1)."""

    text: str
    shard: pathlib.Path
    line: int


@dataclasses.dataclass
class BadLines:
    """Counts the lines of a corpus and the lines among them that hold no document.

    Attributes:
      max_fraction: the fraction of bad lines up to which a corpus is accepted.
      lines: lines read, blank ones not counted.
      reasons: for every kind of bad line, how many there were.
      first: shard, line and reason of the first bad line; empty while there is none.
      expected: reasons that are counted and not judged, as of a filter.
    """

    max_fraction: float
    lines: int = 0
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first: str = ""
    expected: frozenset[str] = frozenset()

    @property
    def bad(self) -> int:
        return sum(count for reason, count in self.reasons.items() if reason not in self.expected)

    def add(self, shard: pathlib.Path, line: int, reason: str) -> None:
        self.reasons[reason] += 1
        if reason in self.expected:
            return
        self.first = self.first or f"{shard} line {line}: {reason}"
        if self.bad >= EARLY_STOP_BAD_LINES:
            self.check()

    def check(self) -> None:
        """Raises DataError if the bad lines are more than `max_fraction` of the lines read."""
        if self.bad > self.max_fraction * self.lines:
            raise DataError(
                f"{self.bad:,} of {self.lines:,} lines hold no document, more than "
                f"max_bad_fraction={self.max_fraction:g} allows; "
                f"the first is {self.first}; mend the shards, set text_key, or raise max_bad_fraction"
            )

    def describe(self) -> str:
        """One line for the log."""
        if not self.bad:
            return f"no bad line in {self.lines:,}"
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())
        return f"skipped {self.bad:,} of {self.lines:,} lines ({reasons}); the first is {self.first}"


def read_documents(shards: Sequence[pathlib.Path], text_key: str, bad: BadLines) -> Iterator[Document]:
    """Yields the documents of all shards in order; lines without one are skipped and counted in `bad`.

    Args:
      shards: files of JSON lines, see `find_shards`.
      text_key: the key of the text in each line's object; "text" in DCLM.
      bad: the count that is kept; its `max_fraction` is enforced here.

    Raises:
      DataError: a shard cannot be read to its end, or too many lines are bad.
    """
    for shard in shards:
        yield from documents_in(shard, text_key, bad)
    bad.check()


def documents_in(shard: pathlib.Path, text_key: str, bad: BadLines) -> Iterator[Document]:
    """Yields the documents of one shard, as `read_documents`; the few bad lines of a short shard are not judged."""
    for number, line in enumerate(read_lines(shard), start=1):
        if not line.strip():
            continue
        bad.lines += 1
        text, reason = _parse(line, text_key)
        if text is None:
            bad.add(shard, number, reason)
        else:
            yield Document(text, shard, number)


def in_chunks(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Groups documents until a group holds so many characters of text."""
    chunk, gathered = [], 0
    for document in documents:
        chunk.append(document)
        gathered += len(document.text)
        if gathered >= characters:
            yield chunk
            chunk, gathered = [], 0
    if chunk:
        yield chunk


def _parse(line: bytes, text_key: str) -> tuple[str | None, str]:
    """Returns the text, or None and what is wrong with the line."""
    if len(line) > MAX_LINE_BYTES:
        return None, TOO_LONG
    try:
        parsed = parse_json(line)
    except UnicodeDecodeError:
        return None, NOT_UTF8
    except ValueError:
        return None, "not JSON"
    if not isinstance(parsed, dict):
        return None, "not a JSON object"
    return check_text(parsed.get(text_key), text_key)


def check_text(text: object, text_key: str) -> tuple[str | None, str]:
    """Returns a record's text, or None and why it is none; bytes are taken for UTF-8."""
    if isinstance(text, bytes | str) and len(text) > MAX_LINE_BYTES:
        return None, TOO_LONG
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError:
            return None, NOT_UTF8
    if not isinstance(text, str):
        return None, f"no string {text_key!r}"
    if not text:
        return None, f"empty {text_key!r}"
    try:
        # JSON can escape one half of a surrogate pair, which is no character and which no tokenizer takes.
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None, HALF_A_PAIR
    return text, ""


def split_of(text: str, validation_fraction: float) -> str:
    """Returns "train" or "validation" for a document.

    A document's side depends on its text alone, so it stays where it is when shards are added, removed or reordered,
    and copies of one text are never on both sides. The text's 64-bit BLAKE2b hash (RFC 7693) is a uniform draw that
    is compared with the fraction.

    >>> [split_of("Fellow citizens", fraction) for fraction in (0.1, 0.5)]
    ['train', 'validation']
    """
    return split_of_utf8(text.encode("utf-8"), validation_fraction)


def split_of_utf8(utf8: bytes, validation_fraction: float) -> str:
    """`split_of` for a text that is in UTF-8 already."""
    digest = hashlib.blake2b(utf8, digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "little") < validation_fraction * 2.0**64 else "train"
