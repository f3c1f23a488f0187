"""One run of a comparison in a process of its own: `python -m fp4jax.comparison.run FOLDER` trains FOLDER/config.json.

Its peak memory is the process's, nothing that a run before it left behind slows it, and a crash ends one run.
"""

import json
import os
import platform
import resource
import sys
import time
from pathlib import Path

import jax
from rich.console import Console

from fp4jax.comparison.plan import read_json
from fp4jax.config import config_from
from fp4jax.training import train
from fp4jax.training.loop import NonFiniteLossError
from fp4jax.training.preemption import Preempted

CONFIG, SUMMARY, LOG = "config.json", "summary.json", "log.txt"
SUMMARIZED = {"diverged": str | None, "peak_memory_bytes": int, "peak_memory_of": str, "device": str, "jax": str}


def main(folder: Path) -> int:
    """Trains, and writes summary.json; a loss that is not finite is a result. Returns the exit code."""
    start, diverged = time.perf_counter(), None
    try:
        train(config_from(read_json(folder / CONFIG, {})), folder, Console(width=120))
    except NonFiniteLossError as error:
        diverged = str(error)
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    write_atomically(folder / SUMMARY, {"diverged": diverged, "seconds": round(seconds, 1)} | _environment())
    return 0


def write_atomically(path: Path, value: dict | bytes) -> None:
    """Writes a file that is there whole or not at all: bytes, or an object as JSON."""
    content = value if isinstance(value, bytes) else (json.dumps(value, indent=1) + "\n").encode()
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _environment() -> dict:
    device = jax.devices()[0]
    statistics = device.memory_stats() or {}
    on_device = "peak_bytes_in_use" in statistics
    kilobyte = 1024 if sys.platform == "linux" else 1  # the unit of ru_maxrss
    in_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return {
        "peak_memory_bytes": statistics["peak_bytes_in_use"] if on_device else in_process,
        "peak_memory_of": "device" if on_device else "process",
        "device": f"{jax.device_count()} x {device.device_kind}, {platform.machine()}{cores}",
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
