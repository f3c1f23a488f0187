"""JSON that a file holds, checked: whatever the bytes are, a value of the kind that is expected or a ValueError.

A file of ours that was damaged or written by another program is met where it is read, in one line, and not where a
number in it is first used.
"""

import dataclasses
import json
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: it is none: also for bytes that are not UTF-8, and for brackets nested thousands deep.
    """
    try:
        return json.loads(content.decode("utf-8") if isinstance(content, bytes) else content)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_objects(path: pathlib.Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, oldest first; none without a file.

    A last line without its line feed is left out: a process that was killed left it unfinished.

    Args:
      fields: types of the fields that every object has; it may have others.

    Raises:
      ValueError: a line is no such object; names it.
      OSError: the file cannot be read.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            found.append(check_fields(parse_json(line), fields))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is damaged ({one_line(error)}); remove that line to go on without it"
            ) from error
    return found


def check_fields(value: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`value`, an object that has these fields with values of these types; ValueError if it is not."""
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    for name, kind in fields.items():
        if name not in value:
            raise ValueError(f"no field {name!r}")
        if not is_of(value[name], kind):
            raise ValueError(f"field {name!r} is of another type")
    return value


def from_fields[T](cls: type[T], value: Any) -> T:
    """The dataclass `cls` with the fields of an object that `dataclasses.asdict` made; ValueError if it is not one."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    unknown = sorted(check_fields(value, fields).keys() - fields.keys())
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}")
    try:
        return cls(**{name: _as(value[name], kind) for name, kind in fields.items()})
    except OverflowError:
        raise ValueError("a number beyond the range of float64") from None


def _as(value: Any, kind: Any) -> Any:
    """A value that `is_of` the type, its integers made floats where it wants floats: JSON writes 2.0 as it likes."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        fitting = [argument for argument in arguments if is_of(value, argument)]
        return value if int in fitting else _as(value, fitting[0])
    if origin is list:
        return [_as(element, arguments[0]) for element in value]
    if origin is dict:
        return {key: _as(element, arguments[1]) for key, element in value.items()}
    return float(value) if kind is float else value


def is_of(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type: also of a union, a list, a dict with such values; an int is a float too."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(is_of(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(is_of(element, arguments[0]) for element in value)
    if origin is dict:
        return isinstance(value, dict) and all(is_of(element, arguments[1]) for element in value.values())
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, types.NoneType if kind is None else kind)


def one_line(error: BaseException) -> str:
    """What an error says, without its line feeds."""
    return " ".join(str(error).split()) or type(error).__name__
