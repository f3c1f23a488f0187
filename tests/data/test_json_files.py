"""JSON of files: the types of fields, and lines that are damaged."""

import dataclasses
import json
from typing import Any

import pytest

from fp4jax.data.json_files import check_fields, from_fields, is_of, parse_json, read_objects


@dataclasses.dataclass(frozen=True)
class Facts:
    name: str
    counts: dict[str, int]
    loss: float | None


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1, int, True),
        (1, float, True),
        (1.0, int, False),
        (True, int, False),
        (True, bool, True),
        (None, float | None, True),
        ("1", float | None, False),
        ([1, 2], list[int], True),
        ([1, "2"], list[int], False),
        ({"a": [1.5]}, dict[str, list[float]], True),
        ({"a": 1.5}, dict[str, list[float]], False),
        ({"a": object()}, dict[str, Any], True),
        ([], dict[str, int], False),
    ],
)
def test_types(value, kind, expected):
    assert is_of(value, kind) is expected


def test_a_dataclass_comes_back_and_nothing_else_becomes_one():
    facts = Facts("a", {"b": 1}, None)
    whole = dataclasses.asdict(facts)
    assert from_fields(Facts, whole) == facts
    for damage, message in (
        ({"name": 1}, "field 'name' is of another type"),
        ({"counts": {"b": "1"}}, "field 'counts' is of another type"),
        ({"more": 1}, "unknown field 'more'"),
    ):
        with pytest.raises(ValueError, match=message):
            from_fields(Facts, whole | damage)
    with pytest.raises(ValueError, match="no field 'loss'"):
        from_fields(Facts, {"name": "a", "counts": {}})
    with pytest.raises(ValueError, match="no JSON object"):
        check_fields([], {})


@dataclasses.dataclass(frozen=True)
class Numbers:
    whole: int
    losses: list[float]
    speed: float | None
    health: dict[str, float | None]


def test_whole_numbers_become_floats_where_floats_are_meant():
    read = from_fields(Numbers, {"whole": 2, "losses": [1, 0.5], "speed": 3, "health": {"a": 4, "b": None}})
    assert read == Numbers(2, [1.0, 0.5], 3.0, {"a": 4.0, "b": None})
    assert [type(value) for value in (read.whole, read.losses[0], read.speed, read.health["a"])] == [int, *[float] * 3]
    with pytest.raises(ValueError, match="beyond the range"):
        from_fields(Numbers, {"whole": 2, "losses": [10**400], "speed": None, "health": {}})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_what_is_no_json_is_a_value_error(content):
    with pytest.raises(ValueError):
        parse_json(content)


def test_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_objects(path, {"step": int}) == []
    lines = [{"step": 1}, {"step": 2, "loss": 0.5}]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(whole + '{"step": 3')  # a process was killed as it wrote
    assert read_objects(path, {"step": int}) == lines
    for damaged in ('{"step": "1"}', "[]", '{"step": ', ""):
        path.write_text(f"{whole}{damaged}\n{whole}")
        with pytest.raises(ValueError, match=r"a\.jsonl, line 3 is damaged \(.+\); remove that line"):
            read_objects(path, {"step": int})
