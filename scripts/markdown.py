"""Tables of Markdown, and where the JSON that they are made from lies."""

import json
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def read(path: str | Path) -> dict:
    """The JSON of a file; a relative path is the repository's."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def ratio(found: dict | None) -> str:
    """A ratio with its interval; nothing where there is none."""
    return "" if found is None else f"{found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table."""
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
