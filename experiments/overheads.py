"""What a run pays for being safe: time for saves, time waiting for data, and memory over many steps.

    PYTHONPATH=. python experiments/overheads.py time   --workdir=runs/overheads --out=results/faults/overheads.json
    PYTHONPATH=. python experiments/overheads.py memory --workdir=runs/memory    --out=results/faults/memory.json

`time`: configs/averis_tiny.py, saving asynchronously in every other stretch of EVERY steps, in the order save, none,
none, save, ... of one process. A stretch begins before the step that is saved: the loop's standing still, what the
writing takes from the steps after it, and the step that cannot be read ahead over a save are all in it. The cost of
saving is the ratio of neighbours. Data waiting is `data_wait` of the same run. `memory`: a model of 0.8 million
parameters, 2,000 steps with a save and a validation every EVERY steps; the process's memory after each step.

The same command goes on with a run that was interrupted; stretches that an interruption fell into do not count.
"""

import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import ml_collections

from configs import averis_tiny
from fp4jax import provenance
from fp4jax.cli import Parser, check_output_file, positive, run
from fp4jax.training import train
from fp4jax.training.loop import _Loop
from fp4jax.training.metrics import read_metrics

EVERY = 50
"""Steps from one save to the next."""

NEVER = 10**9
MARKS = "marks.jsonl"
WARM_UP = 200
"""Steps before memory is compared: allocators and Orbax's threads come to rest."""

WINDOW = 200


def saving(step: int) -> bool:
    """Whether the stretch that `step` is in begins with a save: ABBA, so that a drift of speed cancels."""
    return (step // EVERY) % 4 in (1, 0)


def time_config(pairs: int) -> ml_collections.ConfigDict:
    """A stretch of warm-up, and two for each pair."""
    config = averis_tiny.get_config()
    config.steps = EVERY * (2 * pairs + 1)
    config.evaluation.every = NEVER
    return config


def memory_config(steps: int) -> ml_collections.ConfigDict:
    """Two layers of width 128, rows of 64 tokens: 0.8 million parameters, most of them embeddings."""
    config = averis_tiny.get_config()
    config.steps, config.batch_size, config.seq_len = steps, 4, 64
    config.model.num_layers, config.model.hidden_size, config.model.intermediate_size = 2, 128, 256
    config.model.num_heads, config.model.num_kv_heads, config.model.head_dim = 2, 1, 64
    config.checkpoint.every = config.evaluation.every = EVERY
    config.evaluation.batches = 2
    return config


def trained(
    config: ml_collections.ConfigDict, workdir: Path, before_step: Callable[[ml_collections.ConfigDict, int], None]
) -> list[dict]:
    """Trains, and returns a mark for each step: when its result had arrived, processor time so far, memory.

    before_step: is given the running configuration and the number of the step that was finished last.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path, report, process = workdir / MARKS, _Loop._report, time.time_ns()

    def marking(self: _Loop, running, *arguments, **named) -> None:
        report(self, running, *arguments, **named)
        mark = {"process": process, "step": running.step, "wall": time.perf_counter(), "cpu": time.process_time()}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(mark | memory()) + "\n")
        before_step(self.static.config, running.step)

    _Loop._report = marking
    try:
        train(config, workdir)
    finally:
        _Loop._report = report
    # A step that was taken again after an interruption has its last mark.
    marks = {mark["step"]: mark for mark in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    return [marks[step] for step in sorted(marks)]


class Mallinfo2(ctypes.Structure):
    """glibc's mallinfo2: bytes in its arenas and in mappings of their own, in use and not."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def memory() -> dict[str, int]:
    """Bytes of this process: `own`, its anonymous pages, swapped ones too, and `in_use`, what was allocated of them.

    Pages of files, such as those of libraries, come and go with what else the machine does; they are not counted. What
    is own and not in use are the gaps that glibc's allocator keeps for later.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap"))
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    info = mallinfo2()
    return {"own": 1024 * kilobytes, "in_use": info.uordblks + info.hblkhd}


def save_only_where_due(config: ml_collections.ConfigDict, step: int) -> None:
    """Called after each step: what the loop asks next is whether the step after it is saved."""
    config.checkpoint.every = EVERY if saving(step + 1) else NEVER


def measure_time(workdir: Path, pairs: int) -> dict:
    """Compares stretches with a save and without."""
    marks = {mark["step"]: mark for mark in trained(time_config(pairs), workdir, save_only_where_due)}
    stretches = {}
    for start in range(EVERY, EVERY * (2 * pairs + 1), EVERY):
        # The mark of the step before is set when the next one is on its way, with a save and without.
        first, last = marks[start - 1], marks[start + EVERY - 1]
        if first["process"] == last["process"]:
            stretches[start] = {kind: last[kind] - first[kind] for kind in ("wall", "cpu")}
    compared = []
    for number in range(pairs):
        starts = [EVERY * (2 * number + 1), EVERY * (2 * number + 2)]
        if all(start in stretches for start in starts):
            with_save, without = sorted(starts, key=saving, reverse=True)
            compared.append((stretches[with_save], stretches[without]))
    result = {"every": EVERY, "steps": EVERY * (2 * pairs + 1), "pairs": len(compared)}
    for kind in ("wall", "cpu"):
        ratios = [one[kind] / other[kind] - 1 for one, other in compared]
        totals = [sum(side[kind] for side in sides) for sides in zip(*compared, strict=True)]
        result[kind] = {
            "cost_of_saving_median": statistics.median(ratios),
            "cost_of_saving_total": totals[0] / totals[1] - 1,
            "cost_of_each_pair": ratios,
            "seconds_with_saves": totals[0],
            "seconds_without": totals[1],
        }
    return result | {"data_wait": data_wait(workdir, marks)}


def data_wait(workdir: Path, marks: dict[int, dict]) -> dict:
    """The share of time in which the loop waited for a batch, without the line that compilation is in."""
    lines = [line for line in read_metrics(workdir) if line["step"] in marks]
    parts = []
    for before, line in zip(lines, lines[1:], strict=False):
        first, last = marks[before["step"]], marks[line["step"]]
        if first["process"] == last["process"]:
            parts.append((line["data_wait"], last["wall"] - first["wall"]))
    return {
        "share": sum(share * seconds for share, seconds in parts) / sum(seconds for _, seconds in parts),
        "largest_of_a_line": max(share for share, _ in parts),
        "lines": len(parts),
    }


def measure_memory(workdir: Path, steps: int) -> dict:
    """What windows of WINDOW steps hold, after the warm-up; needs one process from start to end."""
    config = memory_config(steps)
    marks = trained(config, workdir, lambda config, step: None)
    if len({mark["process"] for mark in marks}) > 1:
        raise ValueError(f"{workdir} was interrupted: memory is that of one process; remove it and start anew")
    starts = range(WARM_UP + 1, steps - WINDOW + 2, WINDOW)
    return {
        "model": config.model.to_dict() | {"seq_len": config.seq_len, "batch_size": config.batch_size},
        "steps": steps,
        "saves_and_validations_every": EVERY,
        "warm_up_steps": WARM_UP,
        "window_steps": WINDOW,
        **{
            kind: of_windows([[marks[step - 1][kind] for step in range(start, start + WINDOW)] for start in starts])
            for kind in ("own", "in_use")
        },
    }


def of_windows(windows: Sequence[Sequence[int]]) -> dict:
    """What the memory of consecutive windows of steps says.

    A step that is running when memory is read adds its intermediate results, and whether one is running is chance. So
    `held_mb` is a window's lowest tenth: what is held between steps.
    """
    held, peaks = [sorted(window)[len(window) // 10] for window in windows], [max(window) for window in windows]
    return {
        "held_mb": [value / 1e6 for value in held],
        "peak_mb": [value / 1e6 for value in peaks],
        "last_over_first": held[-1] / held[0] - 1,
        "largest_distance_from_first": max((value / held[0] - 1 for value in held), key=abs),
    }


def main(arguments: Sequence[str]) -> None:
    """Measures and writes the JSON.

    Raises:
      ValueError: a flag that cannot be used.
    """
    parser = Parser("experiments.overheads", __doc__.splitlines()[0])
    parser.add_argument("measurement", choices=("time", "memory"))
    parser.add_argument("--workdir", type=Path, required=True, help="of the run")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--pairs", type=positive, default=6, help="of stretches, for `time`")
    parser.add_argument("--steps", type=positive, default=2000, help="for `memory`")
    flags = parser.parse_args(arguments)
    check_output_file(flags.out, "--out")
    if flags.measurement == "memory" and flags.steps < WARM_UP + 2 * WINDOW:
        parser.error(f"--steps={flags.steps} is too short to compare windows; give {WARM_UP + 2 * WINDOW} or more")
    code = provenance.commit()
    if flags.measurement == "time":
        result, asked = measure_time(flags.workdir, flags.pairs), f"--pairs={flags.pairs}"
    else:
        result, asked = measure_memory(flags.workdir, flags.steps), f"--steps={flags.steps}"
    about = {
        "command": f"python experiments/overheads.py {flags.measurement} {asked}",
        "commit": code,
        "machine": f"{os.cpu_count()}-core {platform.machine()} CPU, JAX {jax.__version__}",
        "load_average_at_end": os.getloadavg(),
    }
    flags.out.write_text(json.dumps(about | result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], interrupted="interrupted; the same command goes on"))
