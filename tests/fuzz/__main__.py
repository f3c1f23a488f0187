"""Fuzzes the readers for long: `python -m tests.fuzz --output=results/faults/fuzz.json [--examples=10000] [--seed=0]`.

The JSON is written after every reader; those that it has from the same commit are not repeated. Unlike the tests it
runs the code as users do, without type checks at run time. Exit code 1 if anything but a reader's own error came out.
"""

import collections
import json
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence

import hypothesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp4jax.cli import Parser, check_output_file, positive, run
from tests.fuzz.damage import changes
from tests.fuzz.fuzzing import Stage
from tests.fuzz.readers import READERS


def fuzzed(name: str, examples: int, seed: int) -> dict:
    """What came out of a reader: how many examples were read, how many refused, and what was not caught."""
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(READERS[name], pathlib.Path(folder))

        @hypothesis.seed(seed)
        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.integers(0, 9), changes(READERS[name].is_json))
        def read(number, made):
            counts["examples"] += 1
            counts["refused" if stage.read_damaged(number, made) else "read"] += 1

        started, uncaught = time.process_time(), []
        try:
            read()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            traceback.print_exception(error)
            failures = error.exceptions if isinstance(error, BaseExceptionGroup) else [error]
            uncaught = [f"{type(failure).__name__}: {failure}" for failure in failures]
    seconds = round(time.process_time() - started, 1)
    return {**counts, "uncaught": len(uncaught), "errors": uncaught, "seed": seed, "cpu_seconds": seconds}


def main(arguments: Sequence[str]) -> None:
    """Fuzzes what the flags name.

    Raises:
      ValueError: a flag that cannot be used.
      SystemExit: something was not caught.
    """
    parser = Parser("tests.fuzz", __doc__.splitlines()[0])
    parser.add_argument("--examples", type=positive, default=10_000, help="of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, action="append", help="only this one; may be given several times")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    flags = parser.parse_args(arguments)
    if flags.output:
        check_output_file(flags.output, "--output")
    described = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True)
    commit, found = described.stdout.strip(), {}
    if flags.output and flags.output.exists():
        found = json.loads(flags.output.read_text())["readers"]
    for name in flags.reader or READERS:
        if found.get(name, {}).get("commit") == commit and found[name]["examples"] >= flags.examples:
            continue
        found[name] = fuzzed(name, flags.examples, flags.seed) | {"commit": commit}
        print(f"{name}: {found[name]}", flush=True)
        if flags.output:
            value = {"command": f"python -m tests.fuzz --examples={flags.examples}", "readers": found}
            flags.output.write_text(json.dumps(value, indent=1) + "\n")
    if any(result["uncaught"] for result in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
