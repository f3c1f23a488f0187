"""A run that is killed again and again, against one that is not: do they end in the same bits?

Every life of the run is a process of its own, forked from a server that has imported everything, so that a restart
takes a second or two; compiled programs come from the persistent cache.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import signal
import socket
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import ml_collections
import numpy as np

from fp4jax.config import default_config
from fp4jax.testing import victim
from fp4jax.testing.victim import Kill, Member
from fp4jax.training.divergence import read_events
from fp4jax.training.metrics import read_metrics

LIFE_SECONDS = 1800.0
"""A life that takes longer is taken for one that hangs; on a busy machine most of it is waiting."""
DETERMINISTIC = ("step", "loss", "grad_norm", "learning_rate", "tokens", "validation_loss")


def tiny_config(kills: int, processes: int = 1) -> ml_collections.ConfigDict:
    """A run of 6 steps a kill, with a checkpoint every 5 steps: one layer in FP4 with stochastic rounding.

    The parameters are sharded over the devices of several processes, so that each of them writes its part.
    """
    config = default_config()
    config.recipe, config.steps, config.microbatches = "averis", 6 * kills + 10, 2
    config.batch_size, config.seq_len = 4, 32
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2}
    config.model.update({**sizes, "head_dim": 16, "intermediate_size": 64})
    config.checkpoint.every = 5
    config.evaluation.every, config.evaluation.batches = 40, 1
    config.log.every = 1
    if processes > 1:
        config.mesh.fsdp = processes * victim.DEVICES
        config.batch_size = 2 * config.mesh.fsdp
    return config


@dataclass
class Outcome:
    """What came of it; `failures` is empty if all is as it should be."""

    kills: int
    seed: int
    processes: int = 1
    places: dict[str, int] = field(default_factory=dict)
    in_a_save: int = 0
    before_first_checkpoint: int = 0
    steps_repeated: int = 0
    lives: list[dict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    digest: str = ""
    seconds: float = 0.0

    def to_json(self, config: ml_collections.ConfigDict) -> dict:
        """Everything, and what it was run with."""
        machine = {"jax": jax.__version__, "platform": platform.platform(), "cpus": os.cpu_count()}
        return {**asdict(self), "machine": machine, "config": config.to_dict()}

    def __str__(self) -> str:
        where = ", ".join(f"{count} {place}" for place, count in sorted(self.places.items()))
        verdict = "; ".join(self.failures) if self.failures else "the undisturbed run's bits, no checkpoint lost"
        return (
            f"{len(self.lives)} kills ({where}; {self.in_a_save} left an unfinished save), {self.steps_repeated} steps "
            f"done again, {self.seconds:.0f} s: {verdict}"
        )


def kill_and_compare(
    config: ml_collections.ConfigDict, workdir: Path, kills: int, seed: int = 0, processes: int = 1
) -> Outcome:
    """Runs `config` once undisturbed and once with `kills` SIGKILLs, both in new folders of `workdir`.

    Of several processes, each with `victim.DEVICES` devices, one is killed; the others have to end by themselves.

    Raises:
      ValueError: the run is over before the last kill, or the folder holds something already.
    """
    whole, killed, cache = (Path(workdir).absolute() / name for name in ("undisturbed", "killed", "cache"))
    if Path(workdir).exists() and any(Path(workdir).iterdir()):
        raise ValueError(f"{workdir} is not empty; give another --workdir or delete it")
    os.environ["FP4JAX_CACHE"] = str(cache)
    start = time.perf_counter()
    outcome = Outcome(kills, seed, processes)
    codes, _ = _live(config, whole, cache, None, processes)
    if any(codes):
        raise ValueError(f"the undisturbed run failed with exit codes {codes}; see {whole / victim.LOG}")
    random = np.random.default_rng(seed)
    for _ in range(kills):
        _kill(config, killed, cache, _draw(random, config.checkpoint.every, processes), outcome)
        if outcome.failures:
            break
    else:
        if any(_live(config, killed, cache, None, processes)[0]):
            outcome.failures.append(f"the last life failed; see {killed / victim.LOG}")
        else:
            _compare(whole, killed, outcome)
    outcome.seconds = round(time.perf_counter() - start, 1)
    return outcome


def _draw(random: np.random.Generator, every: int, processes: int) -> Kill:
    place = str(random.choice(list(victim.PLACES)))
    # A life has to reach its first save every now and then, or the run would never go on.
    call = {
        "step": random.integers(1, 2 * every),
        "save": random.integers(1, 3),
        "reader": random.integers(1, 8 * every),
    }[place]
    delay = {"step": 0.1, "save": 0.3, "reader": 0.0}[place]
    moment = float(random.uniform(0, delay))
    return Kill(place, int(call), moment, int(random.integers(processes)) if processes > 1 else 0)


def _kill(config: ml_collections.ConfigDict, folder: Path, cache: Path, kill: Kill, outcome: Outcome) -> None:
    before = _committed(folder)
    codes, waited = _live(config, folder, cache, kill, outcome.processes)
    others = codes[: kill.process] + codes[kill.process + 1 :]
    if codes[kill.process] != -signal.SIGKILL or 0 in others:
        what = "was over before the last kill: give it more steps" if 0 in codes else f"ended with exit codes {codes}"
        outcome.failures.append(f"life {len(outcome.lives) + 1} {what}")
        return
    starts = [line["after"] for line in _read(folder / victim.STARTS)]
    if len(starts) != len(outcome.lives) + 1:
        # Killed before its loop began: nothing was to be resumed.
        outcome.failures.append(f"life {len(outcome.lives) + 1} was killed before its loop began")
        return
    if starts[-1] != before:
        outcome.failures.append(f"step {before} was committed and a life began after step {starts[-1]}")
    steps = [line["step"] for line in read_metrics(folder)]
    reached, after = max(steps, default=0), _committed(folder)
    outcome.steps_repeated += max(reached - after, 0)
    outcome.before_first_checkpoint += after == 0
    outcome.in_a_save += any(".orbax-checkpoint-tmp" in path.name for path in (folder / "checkpoints").glob("*"))
    outcome.places = dict(Counter(outcome.places) + Counter([kill.place]))
    ended = {"others": others, "others_seconds": round(waited, 1)} if others else {}
    outcome.lives.append({**asdict(kill), "began_after": starts[-1], "reached": reached, "committed": after, **ended})


def _compare(whole: Path, killed: Path, outcome: Outcome) -> None:
    outcome.digest = (whole / victim.DIGEST).read_text()
    if (killed / victim.DIGEST).read_text() != outcome.digest:
        outcome.failures.append("the final parameters and optimizer state are not the undisturbed run's")
    ours, theirs = ([{k: line.get(k) for k in DETERMINISTIC} for line in read_metrics(f)] for f in (killed, whole))
    if ours != theirs:
        outcome.failures.append("metrics.jsonl is not the undisturbed run's")
    if read_events(killed) != read_events(whole):
        outcome.failures.append("events.jsonl is not the undisturbed run's")


def _live(
    config: ml_collections.ConfigDict, folder: Path, cache: Path, kill: Kill | None, processes: int
) -> tuple[list[int], float]:
    """One life; returns every process's exit code, -9 if it was killed, and the seconds from first to last end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([victim.__name__])
    port = _free_port()
    members = [Member(index, processes, port) if processes > 1 else None for index in range(processes)]
    arguments = (config.to_dict(), str(folder), str(cache), kill)
    lives = [context.Process(target=victim.run, args=(*arguments, member)) for member in members]
    for process in lives:
        process.start()
    limit = time.monotonic() + LIFE_SECONDS
    multiprocessing.connection.wait([process.sentinel for process in lives], LIFE_SECONDS)
    first = time.monotonic()
    for process in lives:
        process.join(max(limit - time.monotonic(), 0))
    if any(process.is_alive() for process in lives):
        for process in lives:
            process.kill()
            process.join()
        raise ValueError(f"a life took over {LIFE_SECONDS:g} s; see {folder / victim.LOG}")
    return [process.exitcode for process in lives], time.monotonic() - first


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _committed(folder: Path) -> int:
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
