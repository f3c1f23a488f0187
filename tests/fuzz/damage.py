"""Damage to files: bytes that are cut, changed, repeated, put in or replaced, and JSON of another shape.

Damage is drawn before it is known what it is done to, so that hypothesis can make it smaller: a place is a fraction of
the file's length, or a number of the JSON's node.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

FRACTION = 1 << 16
Change = tuple[str, int, Any]
"""What is done, where, and with what."""

NASTY_VALUES = [
    *(None, True, False, 0, 1, -1, 7, 1 << 31, 1 << 64, -(1 << 70), 0.5, 1e308, float("inf"), float("nan")),
    *("", "a", "\0", "../x", "/", "é\ud800", "x" * 1000, "[", "%s", "<u2", "embedded"),
    *([], {}, [[]], [0], [None], {"": {}}, {"a": []}),
]
NASTY_FILES = [b"", b"\n", b"\0", b"null", b"0", b'""', b"[]", b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe"]
NASTY_FILES += [b"9" * 5000, b'{"a": 1e999}', b"\x80\x04K\x01.", b"{}\n" * 5, b"GGUF", b"PAR1", b"\x1f\x8b"]

PLACES = st.integers(0, FRACTION - 1)
_BYTE_CHANGES = st.one_of(
    st.tuples(st.sampled_from(["cut", "repeat", "remove"]), PLACES, st.integers(1, 64)),
    st.tuples(st.sampled_from(["set", "insert"]), PLACES, st.binary(min_size=1, max_size=8)),
)
_JSON_CHANGES = st.one_of(
    st.tuples(st.just("value"), PLACES, st.sampled_from(NASTY_VALUES)),
    st.tuples(st.sampled_from(["delete", "twice", "rename"]), PLACES, st.none()),
)
_NEW = st.tuples(st.just("file"), st.just(0), st.sampled_from(NASTY_FILES) | st.binary(max_size=100))


def changes(with_json: bool) -> st.SearchStrategy[list[Change]]:
    """Up to three changes to one file."""
    few = st.lists(_BYTE_CHANGES, min_size=1, max_size=3) | _NEW.map(lambda change: [change])
    return few | st.lists(_JSON_CHANGES, min_size=1, max_size=3) if with_json else few


def damaged(content: bytes, made: Sequence[Change]) -> bytes:
    """`content` after the changes. Changes of JSON leave what is not JSON as it is."""
    if made[0][0] in ("value", "delete", "twice", "rename"):
        return _json_damaged(content, made)
    for kind, place, what in made:
        at = place * len(content) // FRACTION
        if kind == "cut":
            content = content[:at]
        elif kind == "repeat":
            content = content[:at] + content[at : at + what] * 2 + content[at + what :]
        elif kind == "remove":
            content = content[:at] + content[at + what :]
        elif kind == "insert":
            content = content[:at] + what + content[at:]
        elif kind == "set":
            content = content[:at] + what + content[at + len(what) :]
        else:
            content = what
    return content


def _json_damaged(content: bytes, made: Sequence[Change]) -> bytes:
    """Of JSON lines the line is drawn, too."""
    text = content.decode("utf-8")
    lines = text.splitlines() if "\n{" in text else [text]
    number = made[0][1] % len(lines)
    root = [json.loads(lines[number])]
    for kind, place, what in made:
        nodes = list(_nodes(root))
        parent, key = nodes[place % len(nodes)]
        if kind == "value":
            parent[key] = copy.deepcopy(what)
        elif kind == "twice" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == "rename" and isinstance(parent, dict):
            parent[f"{key}?"] = parent.pop(key)
        elif parent is not root:
            del parent[key]
    lines[number] = json.dumps(root[0])
    return "\n".join([*lines, ""] if len(lines) > 1 else lines).encode()


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """(parent, key) of everything in a list or a dict."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], list | dict):
            yield from _nodes(value[key])
