"""What is done: the files of a preparation, each of them written whole or not at all.

    OUTPUT/partial/plan.json           options, tokenizer and inputs; another plan is refused
    OUTPUT/partial/unit-00000.json     the facts about a unit that is done (`UnitFacts`)
    OUTPUT/partial/*.writing           what a process is at; left over only by one that was killed
    OUTPUT/*.array_record              finished shards
    OUTPUT/report.json, index.json     at the end; then `partial` is removed

The report has times in it; every other file that remains is a function of the inputs and the options.
"""

import base64
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import zstandard
from jaxtyping import Int64

from fp4jax.data.documents import SPLITS
from fp4jax.data.errors import DataError
from fp4jax.data.json_files import check_fields, from_fields, one_line, parse_json
from fp4jax.data.prepare.inputs import Unit
from fp4jax.data.prepare.options import Options
from fp4jax.data.prepared import INDEX, PARTIAL, PreparedSet, ShardFacts
from fp4jax.data.tokenizers import Tokenizer
from fp4jax.locking import locked

WRITING = ".writing"
PLAN = "plan.json"
REPORT = "report.json"


@dataclasses.dataclass(frozen=True)
class UnitFacts:
    """A unit that is done.

    Attributes:
      bytes, changed: of its input, as in `Unit`.
      documents_read: documents, and records that hold none.
      text_bytes: of the documents, in UTF-8.
      drops: how many were left out, by reason.
      bad: how many of those hold no document.
      first_bad: where the first of those is; empty without one.
      cpu_seconds: that the process took for it.
      shards: of each split; None for one without a document.
      counts: of every token in each split, compressed.
    """

    bytes: int
    changed: int
    documents_read: int
    text_bytes: int
    drops: dict[str, int]
    bad: int
    first_bad: str
    cpu_seconds: float
    shards: dict[str, ShardFacts | None]
    counts: dict[str, str]

    def to_json(self) -> str:
        """The content of the unit's file."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_json(cls, content: bytes) -> "UnitFacts":
        """Reads what `to_json` gave; ValueError for anything else."""
        facts = check_fields(parse_json(content), {"shards": dict[str, Any]})
        written = facts["shards"]
        shards = {split: from_fields(ShardFacts, written[split]) if written.get(split) else None for split in SPLITS}
        own = {field.name for field in dataclasses.fields(cls)} - {"shards", "counts"}
        hints = typing.get_type_hints(cls)
        check_fields(facts, {name: hints[name] for name in own})
        check_fields(facts.get("counts"), dict.fromkeys(SPLITS, str))
        return cls(shards=shards, counts=facts["counts"], **{name: facts[name] for name in own})


def compress_counts(counts: Int64[np.ndarray, " vocab"]) -> str:
    """Token counts as text."""
    return base64.b64encode(zstandard.compress(counts.astype("<i8").tobytes())).decode("ascii")


def decompress_counts(text: str) -> Int64[np.ndarray, " vocab"]:
    """What `compress_counts` was given."""
    return np.frombuffer(zstandard.decompress(base64.b64decode(text)), "<i8").astype(np.int64)


def write_whole(path: pathlib.Path, content: str) -> None:
    """Writes a file that is there whole, on the disk, or not at all."""
    temporary = path.with_name(path.name + WRITING)
    temporary.write_text(content, encoding="utf-8")
    publish(temporary, path)


def publish(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a closed file its name, after its content is on the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclasses.dataclass(frozen=True)
class State:
    """A preparation in its output folder."""

    output: pathlib.Path
    options: Options
    tokenizer: dict[str, Any]
    units: Sequence[Unit]

    @classmethod
    def of(cls, output: pathlib.Path, options: Options, tokenizer: Tokenizer, units: Sequence[Unit]) -> "State":
        """The state of these inputs with these options, whatever there is of it."""
        return cls(output, options, tokenizer_facts(tokenizer), units)

    @property
    def partial(self) -> pathlib.Path:
        """The folder of what is not finished."""
        return self.output / PARTIAL

    @property
    def plan(self) -> dict[str, Any]:
        """What must be the same when the work goes on."""
        return {**self.identity, "inputs": [unit.name for unit in self.units]}

    @property
    def identity(self) -> dict[str, Any]:
        """The options, and the tokenizer that one of them names."""
        return {**dataclasses.asdict(self.options), "fingerprint of the tokenizer": self.tokenizer["fingerprint"]}

    def facts_file(self, unit: Unit) -> pathlib.Path:
        """The file that says that a unit is done."""
        return self.partial / f"unit-{unit.index:05d}.json"

    def facts(self, unit: Unit) -> UnitFacts | None:
        """The facts about a unit; None if it is not done.

        Raises:
          DataError: its input has changed since, or the file of facts is damaged.
        """
        path = self.facts_file(unit)
        try:
            facts = UnitFacts.from_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DataError(f"{path} is damaged ({one_line(error)}); remove it, and that part is done again") from error
        if (facts.bytes, facts.changed) != (unit.bytes, unit.changed):
            raise DataError(
                f"{unit.source} has changed since its shard was written; restore it, or give a new --output"
            )
        return facts

    def forget_units(self) -> None:
        """Makes all units ones that are not done; `started` then leaves nothing of them."""
        for unit in self.units:
            self.facts_file(unit).unlink(missing_ok=True)

    def is_finished(self) -> bool:
        """Whether the whole set is there.

        Raises:
          DataError: the output folder holds a set of other options or inputs, or something else.
        """
        if (self.output / INDEX).exists():
            prepared = PreparedSet.read_index(self.output)
            identity = {**prepared.options, "fingerprint of the tokenizer": prepared.tokenizer["fingerprint"]}
            inputs = [{"name": unit.name, "bytes": unit.bytes} for unit in self.units]
            self._check_same({**identity, "inputs": list(prepared.inputs)}, {**self.identity, "inputs": inputs})
            return True
        if self._any_unit_done():
            try:
                plan = check_fields(parse_json((self.partial / PLAN).read_bytes()), {})
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{self.partial / PLAN} is damaged ({one_line(error)}); give another --output, or remove this one"
                ) from error
            self._check_same(plan, self.plan)
        elif self.partial.is_dir():
            return False
        elif self.output.exists() and not self.output.is_dir():
            raise DataError(f"--output={self.output} is a file; name a folder")
        elif self.output.exists() and any(path.name != PARTIAL for path in self.output.iterdir()):
            raise DataError(
                f"--output={self.output} holds something else; name a folder that is empty or does not exist"
            )
        return False

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """Makes the folders and the plan where they are missing, and keeps other processes out.

        After an error before the first unit was done nothing remains.

        Raises:
          InUseError: another process is preparing this set.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        with locked(self.partial / "lock", f"is preparing --output={self.output}; wait for it or stop it"):
            for left_by_a_killed_process in self.partial.glob(f"*{WRITING}"):
                left_by_a_killed_process.unlink()
            if not self._any_unit_done():
                self._remove_shards()
                write_whole(self.partial / PLAN, json.dumps(self.plan, indent=1) + "\n")
            try:
                yield
            finally:
                if not self._any_unit_done():
                    self._remove_shards()
                    shutil.rmtree(self.partial)
                    self.output.rmdir()

    def _any_unit_done(self) -> bool:
        return any(self.partial.glob("unit-*.json"))

    def _remove_shards(self) -> None:
        """Removes shards of units that are not done: nothing says that they are of these options."""
        for shard in self.output.glob("*.array_record"):
            shard.unlink()

    def _check_same(self, there: dict[str, Any], wanted: dict[str, Any]) -> None:
        different = [name for name in wanted if there.get(name) != wanted[name]]
        shown = [
            name if name == "inputs" else f"{name} {there.get(name)!r} and not {wanted[name]!r}" for name in different
        ]
        if different:
            raise DataError(
                f"--output={self.output} holds shards of other options or inputs ({', '.join(shown)}); "
                "give the same ones to go on, or another --output"
            )


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What an index says of its tokenizer."""
    return {name: getattr(tokenizer, name) for name in ("name", "fingerprint", "vocab_size", "end_of_text")}
