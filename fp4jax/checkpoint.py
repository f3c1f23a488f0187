"""Checkpoints: parameters, optimizer state, data position and configuration, written by Orbax.

A checkpoint is a folder `<workdir>/checkpoints/<steps done>/` that appears whole or not at all: Orbax writes beside it
and renames. Parameters and optimizer state are separate items, so that an evaluation reads the parameters alone. Saving
holds at most IN_FLIGHT_GB of copies of each at a time, since a large model's state fills the host's memory.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import ml_collections
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from fp4jax.config import default_config, flatten

IN_FLIGHT_GB = 1
"""GB of each item that are copied at a time while it is written or read (more where a single array is larger)."""

MAY_CHANGE = (
    *("steps", "log", "health", "checkpoint", "evaluation", "backend", "gemm", "mesh"),
    *("data.prefetch", "data.max_bad_fraction", "model.remat"),
)
"""Keys and groups that may change when a run goes on: they decide how long, where, how fast it computes, not what."""

MAX_SHOWN = 100
"""Characters of a value that an error message shows."""

STORAGE_TROUBLE = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|Permission denied|Read-only file system|"
    r"Input/output error|Stale file handle"
)


class CheckpointError(ValueError):
    """A checkpoint that does not belong to this run or cannot be read; one line."""


class StorageError(OSError):
    """A folder that cannot be written: full, read-only, not allowed; one line."""


def config_differences(saved: Mapping, current: Mapping | ml_collections.ConfigDict) -> list[str]:
    """Returns "key saved → current" for each key that changes what a run computes.

    A key that did not exist when the checkpoint was written had its present default.
    """
    before = flatten(default_config()) | flatten(saved)
    after = flatten(current)
    differing = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return [
        f"{key} {_short(before.get(key))} → {_short(after.get(key))}"
        for key in differing
        if not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
    ]


def prepare_workdir(workdir: str | os.PathLike) -> Path:
    """Creates the folder and makes sure that it can be written.

    Raises:
      StorageError: it cannot.
    """
    path = Path(workdir).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path) as file:
            file.write(b"0")
    except OSError as error:
        raise StorageError(f"workdir {path} cannot be written: {error.strerror}; choose another --workdir") from error
    return path


def check_space(workdir: Path, state: PyTree) -> None:
    """Raises StorageError if one checkpoint of this state (arrays or their shapes) does not fit on the disk."""
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    stat = os.statvfs(workdir)
    free = stat.f_bavail * stat.f_frsize
    if needed > free:
        raise StorageError(
            f"a checkpoint of this model takes {needed / 1e9:.2f} GB and {workdir} has {free / 1e9:.2f} GB free; "
            "free space or choose another --workdir"
        )


class Checkpointer:
    """The checkpoints of one run. A context manager: leaving it waits for the last save.

    Args:
      workdir: the run's folder.
      keep: latest checkpoints kept.
      asynchronous: `save` returns before the files are written.
      largest_array: bytes of the largest array that will be saved or restored.
      read_only: only restores; nothing is created or deleted.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int = 1,
        asynchronous: bool = False,
        largest_array: int = 0,
        read_only: bool = False,
    ):
        self.directory = Path(workdir).absolute() / "checkpoints"
        # Orbax refuses an array that is not smaller than its limit.
        in_flight_gb = max(IN_FLIGHT_GB, largest_array // 10**9 + 1)
        arrays = [
            ocp.StandardCheckpointHandler(save_concurrent_gb=in_flight_gb, restore_concurrent_gb=in_flight_gb)
            for _ in range(2)
        ]
        options = {"read_only": True} if read_only else {"cleanup_tmp_directories": True}
        if not read_only:
            options["preservation_policy"] = ocp.checkpoint_managers.LatestN(keep)
        with _storage_errors(f"{self.directory} cannot be opened"):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(enable_async_checkpointing=asynchronous, **options),
                item_handlers={
                    "params": arrays[0],
                    "optimizer": arrays[1],
                    "data": ocp.JsonCheckpointHandler(),
                    "config": ocp.JsonCheckpointHandler(),
                },
            )

    def latest_step(self) -> int | None:
        """Returns the steps done in the newest complete checkpoint; None without one."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps done of every complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, params: PyTree, optimizer: PyTree, data_position: Mapping, config: ml_collections.ConfigDict
    ) -> None:
        """Saves the state after `step` steps; a step that is already saved is left as it is.

        Raises:
          StorageError: this save, or the one before it that was still being written, failed.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimizer=ocp.args.StandardSave(optimizer),
            data=ocp.args.JsonSave(dict(data_position)),
            config=ocp.args.JsonSave(config.to_dict()),
        )
        with self._save_errors():
            self._manager.save(step, args=items)

    def restore(self, params: PyTree, optimizer: PyTree, *, step: int | None = None) -> tuple[PyTree, PyTree, dict]:
        """Restores a checkpoint into these shapes and shardings; returns (params, optimizer, data position).

        Args:
          step: one of `steps()`; None for the newest.

        Raises:
          CheckpointError: there is none, or it cannot be read.
        """
        items = {
            "params": ocp.args.StandardRestore(params),
            "optimizer": ocp.args.StandardRestore(optimizer),
            "data": ocp.args.JsonRestore(),
        }
        restored = self._restore(items, step)
        return restored["params"], restored["optimizer"], restored["data"]

    def restore_params(self, params: PyTree) -> PyTree:
        """Restores the newest checkpoint's parameters alone.

        Raises:
          CheckpointError: there is none, or it cannot be read.
        """
        return self._restore({"params": ocp.args.StandardRestore(params)})["params"]

    def saved_config(self) -> dict:
        """Returns the configuration that the newest checkpoint was trained with.

        Raises:
          CheckpointError: there is none, or it cannot be read.
        """
        return self._restore({"config": ocp.args.JsonRestore()})["config"]

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
          StorageError: it failed.
        """
        with self._save_errors():
            self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        try:
            self.wait()
        except StorageError:
            # The error that is on its way out is the cause the user must see; this one only if there is no other.
            if error is None:
                raise
        finally:
            self._manager.close()

    def _restore(self, items: dict, step: int | None = None) -> ocp.args.Composite:
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.directory} holds no checkpoint; train with this --workdir first")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be read ({_one_line(error)}); "
                "delete that folder to go on from the one before it"
            ) from error

    @contextmanager
    def _save_errors(self) -> Iterator[None]:
        with _storage_errors(f"a checkpoint could not be written to {self.directory}", self._what_is_left):
            yield

    def _what_is_left(self) -> str:
        step = max((int(path.name) for path in self.directory.iterdir() if path.name.isdigit()), default=None)
        kept = "no earlier checkpoint" if step is None else f"the checkpoint of step {step} is intact"
        return f"; {kept}; free space and rerun the same command to go on"


def saved_config(workdir: Path) -> tuple[int, dict] | None:
    """Returns (steps done, configuration) of a run's newest checkpoint; None where there is none.

    Raises:
      CheckpointError: the checkpoint cannot be read.
    """
    if not (workdir / "checkpoints").is_dir():
        return None
    with Checkpointer(workdir, read_only=True) as checkpointer:
        step = checkpointer.latest_step()
        return None if step is None else (step, checkpointer.saved_config())


def check_same_run(workdir: Path, config: ml_collections.ConfigDict) -> int:
    """Returns the steps that the run in `workdir` has done (0: none saved), if `config` may continue it.

    Raises:
      CheckpointError: the checkpoint was trained with another configuration; lists the differences.
    """
    found = saved_config(workdir)
    if found is None:
        return 0
    step, saved = found
    differences = config_differences(saved, config)
    if differences:
        raise CheckpointError(
            f"{workdir} holds step {step} of a run with another config ({'; '.join(differences)}); "
            "choose another --workdir or the former values"
        )
    return step


@contextmanager
def _storage_errors(what: str, advice: Callable[[], str] = lambda: "; choose another --workdir") -> Iterator[None]:
    """Turns what Orbax raises for a failed write (OSError, or ValueError with the system's message) into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        found = STORAGE_TROUBLE.search(str(error))
        if isinstance(error, OSError) or found:
            reason = found.group() if found else _one_line(error)
            raise StorageError(f"{what}: {reason}{advice()}") from error
        raise


def _short(value: object) -> str:
    """A value as the message of a difference shows it; a policy's rules can be long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
