"""Flags that list names."""

from collections.abc import Mapping

from fp4jax.cli import Parser


def choose[Value](parser: Parser, what: str, listed: str, known: Mapping[str, Value]) -> dict[str, Value]:
    """Those of a list separated by commas, in its order.

    Raises:
      ValueError: one that is not known.
    """
    names = listed.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown {what} {unknown[0]!r}; known: {', '.join(known)}")
    return {name: known[name] for name in names}
