"""A training run that is killed at a place and a moment that were drawn beforehand: what `kills.py` starts.

A kill is a SIGKILL that the process sends itself: nothing in it, no handler and no `finally`, runs after it.
"""

import contextlib
import functools
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import ml_collections
import numpy as np
from rich.console import Console

from fp4jax.checkpoint import Checkpointer
from fp4jax.config import default_config
from fp4jax.data.packing import PackedRows
from fp4jax.data.pipeline import BatchIterator
from fp4jax.training import train
from fp4jax.training.loop import _Loop
from fp4jax.training.mesh import make_mesh
from fp4jax.training.optimizer import make_optimizer
from fp4jax.training.state import model_template, sharded_abstract_state

STARTS = "starts.jsonl"
DIGEST = "digest.txt"
LOG = "log.txt"

# Where a run can be killed: the calls that are counted.
PLACES: dict[str, tuple[type, str]] = {
    "step": (BatchIterator, "__next__"),
    "save": (Checkpointer, "save"),
    "reader": (PackedRows, "__getitem__"),
}


@dataclass(frozen=True)
class Kill:
    """A SIGKILL `delay` seconds after the `call`-th call (from 1) of what stands in PLACES under `place`."""

    place: str
    call: int
    delay: float


def run(config: dict, workdir: str, cache: str, kill: Kill | None) -> None:
    """Trains in this process to its end, or to the kill; at the end the state's digest is written."""
    jax.config.update("jax_compilation_cache_dir", f"{cache}/xla")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    full = _config(config)
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    _report_starts(folder)
    if kill:
        _arm(kill)
    with (folder / LOG).open("a") as log, contextlib.redirect_stderr(log):
        train(full, workdir, Console(file=log, width=160))
    (folder / DIGEST).write_text(_digest(full, folder))


def _config(values: dict) -> ml_collections.ConfigDict:
    config = default_config()
    config.update(values)
    return config


def _arm(kill: Kill) -> None:
    owner, name = PLACES[kill.place]
    original: Callable = getattr(owner, name)
    calls, lock = [], threading.Lock()

    @functools.wraps(original)
    def counted(*arguments: object, **named: object) -> object:
        with lock:
            calls.append(None)
            due = len(calls) == kill.call
        if due:
            threading.Thread(target=_die, args=(kill.delay,), daemon=True).start()
        return original(*arguments, **named)

    setattr(owner, name, counted)


def _die(delay: float) -> None:
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


def _report_starts(folder: Path) -> None:
    """Every start of the loop appends the steps that it begins after."""
    original = _Loop.run

    def run(self: _Loop, done: int) -> None:
        with (folder / STARTS).open("a") as file:
            file.write(json.dumps({"after": done}) + "\n")
        original(self, done)

    _Loop.run = run


def _digest(config: ml_collections.ConfigDict, folder: Path) -> str:
    """SHA-256 of all bits of the last checkpoint's parameters and optimizer state, and its step."""
    template = model_template(config)
    target = sharded_abstract_state(template, make_optimizer(config, template.logical_axes), make_mesh(config.mesh))
    with Checkpointer(folder, read_only=True) as checkpointer:
        step = checkpointer.latest_step()
        state = checkpointer.restore(target.params, {"step": target.step, "opt_state": target.opt_state})[:2]
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.asarray(leaf).tobytes())
    return f"{step} {digest.hexdigest()}"
