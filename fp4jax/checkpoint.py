"""Checkpoints: parameters, optimizer state, data position and configuration, written by Orbax.

A checkpoint is a folder `<workdir>/checkpoints/<steps done>/` that appears whole or not at all: Orbax writes beside it
and renames. Every item in it holds the checksums of its files (Orbax would restore a flipped byte without a word): a
checkpoint that is damaged is reported and passed over for the one before it. Parameters and optimizer state are
separate items, so that an evaluation reads the parameters alone. Saving holds at most IN_FLIGHT_GB of copies of each at
a time, since a large model's state fills the host's memory.
"""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import ml_collections
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from fp4jax import distributed
from fp4jax.checksums import MANIFEST, find_damage, with_checksums
from fp4jax.config_checks import config_differences
from fp4jax.retention import retention

IN_FLIGHT_GB = 1
"""GB of each item that are copied at a time while it is written or read (more where a single array is larger)."""

ITEMS = ("params", "optimizer", "data", "config")
DAMAGED = "damaged_checkpoints"
"""Folder of the workdir that damaged checkpoints are moved to when their run goes on."""

STORAGE_TROUBLE = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|Permission denied|Read-only file system|"
    r"Input/output error|Stale file handle"
)

RERUN = "; free space and rerun the same command to go on"

_warned: set[str] = set()


class CheckpointError(ValueError):
    """A checkpoint that does not belong to this run or cannot be read; one line."""


class StorageError(OSError):
    """A folder that cannot be written: full, read-only, not allowed; one line."""


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
      keep_every: checkpoints of every so many steps are kept too, however old (0: none).
      asynchronous: `save` returns before the files are written.
      largest_array: bytes of the largest array that will be saved or restored.
      read_only: only restores; nothing is created or deleted.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int = 1,
        keep_every: int = 0,
        asynchronous: bool = False,
        largest_array: int = 0,
        read_only: bool = False,
    ):
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._trusted: set[int] = set()
        # Orbax refuses an array that is not smaller than its limit.
        in_flight_gb = max(IN_FLIGHT_GB, largest_array // 10**9 + 1)
        arrays = [
            ocp.StandardCheckpointHandler(save_concurrent_gb=in_flight_gb, restore_concurrent_gb=in_flight_gb)
            for _ in range(2)
        ]
        handlers = dict(zip(ITEMS, [*arrays, ocp.JsonCheckpointHandler(), ocp.JsonCheckpointHandler()], strict=True))
        options = {"read_only": True} if read_only else {"cleanup_tmp_directories": True}
        if not read_only:
            options["preservation_policy"] = retention(keep, keep_every)
        with _storage_errors(f"{self.directory} cannot be opened"):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(enable_async_checkpointing=asynchronous, **options),
                item_handlers={name: with_checksums(handler) for name, handler in handlers.items()},
            )

    def latest_step(self) -> int | None:
        """Returns the steps done in the newest complete and undamaged checkpoint; None without one.

        A damaged one that is newer is named on stderr.
        """
        return self._last_undamaged(self.steps()) or None

    def newest_until(self, step: int) -> int:
        """Steps of the newest checkpoint of at most `step` steps that is read anew and not damaged; 0 without one."""
        self.wait()
        self._trusted.clear()
        return self._last_undamaged([saved for saved in self.steps() if saved <= step])

    def _last_undamaged(self, steps: list[int]) -> int:
        """0: none of them. Of several processes the first looks, for all of them."""
        for step in reversed(steps) if distributed.is_first() else ():
            damage = self._damage_of(step)
            if not damage:
                return distributed.from_first(step)
            _warn(f"checkpoint {self.directory / str(step)} is damaged ({damage}) and is passed over")
        return distributed.from_first(0)

    def steps(self) -> list[int]:
        """Returns the steps done of every complete checkpoint, ascending."""
        return _steps_in(self.directory)

    def save(
        self, step: int, params: PyTree, optimizer: PyTree, data_position: Mapping, config: ml_collections.ConfigDict
    ) -> None:
        """Saves the state after `step` steps; a step that is already saved is left as it is.

        Raises:
          StorageError: this save, or the one before it that was still being written, failed.
        """
        if distributed.from_first(int(step in self.steps())):  # whose list the others' may lag behind
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimizer=ocp.args.StandardSave(optimizer),
            data=ocp.args.JsonSave(dict(data_position)),
            config=ocp.args.JsonSave(config.to_dict()),
        )
        with self._save_errors():
            self._manager.save(step, args=items)
        self._trusted.add(step)

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of more than `step` steps: the run goes back and takes another way."""
        self.wait()
        # The others' lists may hold what is being deleted.
        while (latest := distributed.from_first(max(self.steps(), default=0))) > step:
            self._manager.delete(latest)

    def restore(self, params: PyTree, optimizer: PyTree, *, step: int | None = None) -> tuple[PyTree, PyTree, dict]:
        """Restores a checkpoint into these shapes and shardings; returns (params, optimizer, data position).

        Args:
          step: one of `steps()`; None for the newest that is not damaged.

        Raises:
          CheckpointError: there is none, it is damaged, or it cannot be read.
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
        config = self._restore({"config": ocp.args.JsonRestore()})["config"]
        if not isinstance(config, dict):
            raise CheckpointError(
                f"the configuration in checkpoint {self.directory / str(self.latest_step())} is no JSON object; "
                "delete that folder to go on from the one before it"
            )
        return config

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
          StorageError: it failed.
        """
        with self._save_errors():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Returns at once.

        Raises:
          StorageError: a save that was being written has failed.
        """
        # Orbax's own check would take the error from the thread that is to see it, which would go on and delete the
        # checkpoints that the failed one was to replace.
        if not self._manager.is_saving_in_progress():
            self.wait()

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
        if step is None:
            step = self.latest_step()
        elif distributed.is_first() and (damage := self._damage_of(step)):
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} is damaged ({damage}); delete that folder to go on without it"
            )
        if step is None and distributed.from_first(len(self.steps())):
            raise CheckpointError(f"all checkpoints in {self.directory} are damaged; choose another --workdir")
        if step is None:
            raise CheckpointError(f"{self.directory} holds no checkpoint; train with this --workdir first")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            if distributed.is_of_a_lost_process(error):
                raise  # the checkpoint is as good as it was
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be read ({_one_line(error)}); "
                "delete that folder to go on from the one before it"
            ) from error

    def _damage_of(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint, which are read once; None if nothing is."""
        if step in self._trusted or step not in self.steps():
            return None
        damage = _find_damage(self.directory / str(step))
        if not damage:
            self._trusted.add(step)
        return damage

    @contextmanager
    def _save_errors(self) -> Iterator[None]:
        try:
            with _storage_errors(f"a checkpoint could not be written to {self.directory}", self._what_is_left):
                yield
        except StorageError:
            # What was written of it takes the space that the next save needs.
            if distributed.is_first():
                for unfinished in self.directory.glob(f"*{ocp.path.atomicity.TMP_DIR_SUFFIX}*"):
                    shutil.rmtree(unfinished, ignore_errors=True)
            # Orbax counts the failed one among the saved ones, and would keep it for one that is on the disk.
            self._manager.reload()
            raise

    def _what_is_left(self) -> str:
        step = max(self.steps(), default=None)
        self._trusted &= set(self.steps())
        kept = "no earlier checkpoint" if step is None else f"the checkpoint of step {step} is intact"
        return f"; {kept}{RERUN}"


def saved_config(workdir: Path) -> tuple[int, dict] | None:
    """Returns (steps done, configuration) of a run's newest undamaged checkpoint; None where there is none at all.

    Raises:
      CheckpointError: the checkpoint cannot be read, or all are damaged.
    """
    if not distributed.from_first(len(_steps_in(workdir / "checkpoints"))):
        return None
    with Checkpointer(workdir, read_only=True) as checkpointer:
        saved = checkpointer.saved_config()
        return checkpointer.latest_step(), saved


def check_same_run(workdir: Path, config: ml_collections.ConfigDict, allow_change: bool = False) -> int:
    """Returns the steps that the run in `workdir` has done (0: none saved), if `config` may continue it.

    allow_change: a configuration that computes something else may, too; the differences are named on stderr.

    Raises:
      CheckpointError: the checkpoint was trained with another configuration; lists the differences.
    """
    found = saved_config(workdir)
    if found is None:
        return 0
    step, saved = found
    differences = config_differences(saved, config)
    if differences and not allow_change:
        raise CheckpointError(
            f"{workdir} holds step {step} of a run with another config ({'; '.join(differences)}); "
            "choose another --workdir or the former values, or go on with these: --allow_config_change"
        )
    if differences:
        _warn(f"{workdir} goes on after step {step} with another config ({'; '.join(differences)})")
    return step


def set_aside_damaged(workdir: Path, done: int) -> None:
    """Moves the checkpoints of more than `done` steps, which are damaged, out of the way; all processes wait for it."""
    for step in _steps_in(workdir / "checkpoints"):
        if step > done and distributed.is_first():
            target = workdir / DAMAGED / str(step)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            os.rename(workdir / "checkpoints" / str(step), target)
    distributed.barrier("damaged checkpoints are set aside")


def _find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if nothing is known to be."""
    if not any((checkpoint / item / MANIFEST).exists() for item in ITEMS):
        _warn(f"checkpoint {checkpoint} has no checksums: it is of an earlier version, and is taken as it is")
        return None
    return next(filter(None, (find_damage(checkpoint / item) for item in ITEMS)), None)


def _steps_in(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def _warn(message: str) -> None:
    """One line on stderr, once: the libraries' own log is silent there."""
    if message not in _warned and distributed.is_first():
        _warned.add(message)
        print(f"warning: {message}", file=sys.stderr)


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


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
