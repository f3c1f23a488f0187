"""The report at the end: what was kept, what was dropped and why, how fast."""

import collections
import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from fp4jax.data.json_files import from_fields, parse_json
from fp4jax.data.prepare.state import UnitFacts
from fp4jax.data.prepared import PreparedSet


@dataclasses.dataclass(frozen=True)
class Report:
    """Attributes:
    inputs: units.
    documents_read: documents, and records that hold none.
    documents, tokens: of each split; every document ends with one end-of-text token, which counts.
    drops: documents in no split, by reason.
    first_bad: where the first record without a document is; empty without one.
    text_bytes: of all documents read, in UTF-8.
    shard_bytes: of all shards.
    cpu_seconds: of the processes for the units, all runs together, starts not counted.
    text_mb_per_cpu_second, tokens_per_cpu_second: by these, for one core.
    seconds: of the run that finished the set, start to end.
    workers: processes of that run.
    """

    inputs: int
    documents_read: int
    documents: dict[str, int]
    tokens: dict[str, int]
    drops: dict[str, int]
    first_bad: str
    text_bytes: int
    shard_bytes: int
    cpu_seconds: float
    text_mb_per_cpu_second: float
    tokens_per_cpu_second: int
    seconds: float
    workers: int

    @classmethod
    def of(cls, prepared: PreparedSet, facts: Iterable[UnitFacts], seconds: float, workers: int) -> "Report":
        """Adds up the facts about all units."""
        facts = list(facts)
        text_bytes, cpu_seconds = sum(unit.text_bytes for unit in facts), sum(unit.cpu_seconds for unit in facts)
        splits = prepared.splits
        tokens = {name: split.tokens for name, split in splits.items()}
        per_second = 1 / max(cpu_seconds, 1e-6)
        return cls(
            inputs=len(facts),
            documents_read=prepared.documents_read,
            documents={name: split.documents for name, split in splits.items()},
            tokens=tokens,
            drops=prepared.drops,
            first_bad=next((unit.first_bad for unit in facts if unit.first_bad), ""),
            text_bytes=text_bytes,
            shard_bytes=sum(shard.bytes for split in splits.values() for shard in split.shards),
            cpu_seconds=round(cpu_seconds, 3),
            text_mb_per_cpu_second=round(text_bytes / 1e6 * per_second, 2),
            tokens_per_cpu_second=round(sum(tokens.values()) * per_second),
            seconds=round(seconds, 3),
            workers=workers,
        )

    def to_json(self) -> str:
        """The content of `report.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, content: bytes) -> "Report":
        """Reads what `to_json` gave; ValueError for anything else."""
        return from_fields(cls, parse_json(content))

    def lines(self) -> list[str]:
        """For a person to read."""
        dropped = sum(self.drops.values())
        kept = [
            f"{self.documents[name]:,} documents, {self.tokens[name]:,} tokens in {name}" for name in self.documents
        ]
        megabytes = self.text_bytes / 1e6
        lines = [
            f"{self.documents_read:,} documents read from {self.inputs:,} inputs, {megabytes:,.1f} MB of text",
            *kept,
            f"{dropped:,} documents dropped" + _by_reason(self.drops),
        ]
        if self.first_bad:
            lines.append(f"the first record without a document is {self.first_bad}")
        return [
            *lines,
            f"{self.shard_bytes / 1e6:,.1f} MB of shards; {self.seconds:,.1f} s with {self.workers} workers; for one "
            f"core {self.tokens_per_cpu_second:,.0f} tokens/s, {self.text_mb_per_cpu_second:.1f} MB/s of text",
        ]


def add_drops(facts: Iterable[UnitFacts]) -> dict[str, int]:
    """Drops by reason, of all units."""
    total: collections.Counter[str] = collections.Counter()
    for unit in facts:
        total.update(unit.drops)
    return dict(sorted(total.items()))


def _by_reason(drops: dict[str, Any]) -> str:
    ordered = sorted(drops.items(), key=lambda item: (-item[1], item[0]))
    return ": " + ", ".join(f"{count:,} {reason}" for reason, count in ordered) if ordered else ""
