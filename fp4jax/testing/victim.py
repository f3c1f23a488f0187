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
from jax.experimental import multihost_utils
from rich.console import Console

from fp4jax import distributed
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

DEVICES = 2
"""CPU devices of each of several processes."""
HEARTBEAT_TIMEOUT = 20
"""Seconds after which one of several processes that was killed counts as dead."""

# Where a run can be killed: the calls that are counted.
PLACES: dict[str, tuple[type, str]] = {
    "step": (BatchIterator, "__next__"),
    "save": (Checkpointer, "save"),
    "reader": (PackedRows, "__getitem__"),
}


@dataclass(frozen=True)
class Kill:
    """A SIGKILL `delay` seconds after the `call`-th call (from 1) of what stands in PLACES under `place`.

    process: of several, the one that it is for.
    """

    place: str
    call: int
    delay: float
    process: int = 0


@dataclass(frozen=True)
class Member:
    """One of the `count` processes of a run, number `index`; the first listens on `port` of this machine."""

    index: int
    count: int
    port: int


def run(config: dict, workdir: str, cache: str, kill: Kill | None, member: Member | None = None) -> None:
    """Trains in this process to its end, or to the kill; at the end the state's digest is written.

    member: of several processes, which one this is; None in a single one.
    """
    jax.config.update("jax_compilation_cache_dir", f"{cache}/xla")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    full = _config(config)
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    _report_starts(folder)
    if kill and kill.process == (member.index if member else 0):
        _arm(kill)
    with (folder / LOG).open("a") as log, contextlib.redirect_stderr(log):
        if member:
            _join(member, log.fileno())
        train(full, workdir, Console(file=log, width=160, quiet=not distributed.is_first()))
    digest = _digest(full, folder)
    if distributed.is_first():
        (folder / DIGEST).write_text(digest)
    jax.distributed.shutdown()


def _join(member: Member, log: int) -> None:
    """Makes this process one of several, with DEVICES devices. What the libraries print goes into the log too."""
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    jax.config.update("jax_num_cpu_devices", DEVICES)
    address = f"127.0.0.1:{member.port}"
    distributed.start(address, member.count, member.index, heartbeat_timeout=HEARTBEAT_TIMEOUT)


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
        if distributed.is_first():
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
        whole = leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
        digest.update(np.asarray(whole).tobytes())
    return f"{step} {digest.hexdigest()}"
