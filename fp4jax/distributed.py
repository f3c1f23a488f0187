"""Several processes of one run: how they find one another, agree, and leave. In a single process all of it is free.

JAX's distributed runtime does the work: a coordinator in process 0 that the others register with, heartbeats between
them, collectives on the devices. On CPUs these are gloo's, whose order of additions depends on the devices alone, not
on how many processes they are spread over.
"""

import contextlib
import importlib.util
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

JAX_WAITS_LONGER = 60
"""Seconds: it must not give up first."""


LOST = re.compile(r"Gloo|NCCL|coordination service|heartbeat|Connection (reset|closed|refused)|UNAVAILABLE")
"""What JAX's errors say when another process has ended in the middle of something that takes all."""


class ProcessesError(ValueError):
    """Processes that cannot become one run, or are one no longer; one line."""


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Makes this process one of a run's, as the arguments or the launcher say; before anything else of JAX is used.

    Without arguments SLURM, Open MPI, Kubernetes and TPU are asked, through JAX; a process that none of them started
    with others stays alone, and nothing is initialized.

    Args:
      coordinator: "host:port" of process 0, which listens there.
      num_processes, process_id: all of them, and which one this is, from 0.
      timeout: seconds to wait for the other processes.
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead, and JAX ends the others.

    Raises:
      ProcessesError: arguments that are half given or contradict one another, a coordinator that cannot be reached.
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given) and not launched(os.environ):
        return
    arguments: dict[str, Any] = {}
    if len(missing) < len(given):
        if missing:
            raise ProcessesError(
                f"{', '.join(missing)} missing: by hand every process takes --coordinator=HOST:PORT (of process 0), "
                "--num_processes and --process_id; under SLURM, Open MPI, Kubernetes or on TPUs none of them"
            )
        _check(coordinator, num_processes, process_id)
        if process_id == 0:
            _check_port(coordinator)
        arguments = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
        # By hand means by hand: a launcher that JAX also finds would choose the devices.
        arguments["cluster_detection_method"] = "deactivate"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself; see fp4jax.training.preemption.
    jax.config.update("jax_enable_preemption_service", False)
    with _patience(timeout, coordinator or "the one that the launcher gives"):
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=timeout + JAX_WAITS_LONGER,
                heartbeat_timeout_seconds=heartbeat_timeout,
            )
        except jax.errors.JaxRuntimeError as error:
            _end(f"the processes cannot be joined ({_first_line(error)}); is the coordinator's port free?")
        except (RuntimeError, ValueError) as error:
            raise ProcessesError(
                f"the launcher's processes cannot be joined ({_first_line(error)}); start them by hand: --coordinator, "
                "--num_processes, --process_id"
            ) from error


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as one of several, or may have: on TPUs JAX has to look itself."""
    if environment.get("SLURM_STEP_NODELIST") and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return True
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return True
    return _on_tpu()


def several() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes what is written once: metrics, the console, evaluations."""
    return not several() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if several():
        multihost_utils.sync_global_devices(name)


def from_first(value: int) -> int:
    """Returns process 0's value on all of them; below 2^31. All processes have to call it."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if several() else value


def everywhere(condition: bool) -> bool:
    """Returns whether it is true in every process. All processes have to call it."""
    return bool(multihost_utils.process_allgather(np.asarray(condition)).all()) if several() else condition


def together(function: Callable) -> Callable:
    """Returns the jitted function, compiled in all processes before any of them runs it.

    gloo gives up on a process that comes to a collective for the first time 30 seconds after the others, and one that
    finds the program in the compilation cache may be minutes ahead. It is called with one set of shapes.
    """
    if not several():
        return function
    compiled: list[Callable] = []

    def call(*arguments: object) -> object:
        if not compiled:
            compiled.append(function.lower(*arguments).compile())
            barrier("a program is compiled")
        return compiled[0](*arguments)

    return call


def check_shared(folder: Path) -> None:
    """Raises ProcessesError in all processes if one of them does not see what process 0 writes in `folder`."""
    if not several():
        return
    mark = folder / f".seen-by-all-{from_first(int.from_bytes(os.urandom(3)))}"
    if is_first():
        mark.touch()
    barrier("a mark in the shared folder")
    seen = everywhere(mark.exists())
    if is_first():
        mark.unlink()
    if not seen:
        raise ProcessesError(f"{folder} is not the same folder in all processes; give a --workdir on shared storage")


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turns JAX's error for a process that is gone into one line.

    Not all ways of waiting for it end in an error: for the others, JAX ends the process after `heartbeat_timeout`.

    Raises:
      ProcessesError: another process ended while the block ran.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_of_a_lost_process(error):
            raise
        raise ProcessesError(
            f"another process has ended, or cannot be reached any more ({_first_line(error)}); its own "
            "message says why. Rerun the same command in all processes to go on from the last checkpoint"
        ) from error


def is_of_a_lost_process(error: Exception) -> bool:
    """Whether this is what JAX raises when another process has ended in the middle of something that takes all."""
    return isinstance(error, jax.errors.JaxRuntimeError) and several() and bool(LOST.search(str(error)))


def prefix() -> str:
    """What an error message of one of several processes begins with; empty in process 0 and in a single one."""
    return "" if is_first() else f"process {jax.process_index()} of {jax.process_count()}: "


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise ProcessesError(f"--coordinator={coordinator}: it is HOST:PORT of process 0, such as 10.0.0.1:9876")
    if num_processes < 1:
        raise ProcessesError(f"--num_processes={num_processes}: it is at least 1")
    if not 0 <= process_id < num_processes:
        raise ProcessesError(
            f"--process_id={process_id} with --num_processes={num_processes}: it is from 0 to {num_processes - 1}"
        )


def _check_port(coordinator: str) -> None:
    """Raises ProcessesError if the port is taken: JAX's service would crash the process every now and then."""
    both = socket.has_dualstack_ipv6()
    family, address = (socket.AF_INET6, "::") if both else (socket.AF_INET, "0.0.0.0")
    try:
        port = int(coordinator.rpartition(":")[2])
        socket.create_server((address, port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise ProcessesError(
            f"--coordinator={coordinator}: process 0 cannot listen there ({error.strerror}); choose another port"
        ) from error


@contextlib.contextmanager
def _patience(seconds: float, coordinator: str) -> Iterator[None]:
    """Ends the process if the block takes longer: JAX would abort it with a stack of C++ functions."""
    message = (
        f"coordinator {coordinator}: it was not reached, or not all processes were there, in {seconds:g} s; start all "
        "with the same --coordinator and --num_processes, open its port, or wait longer: --coordinator_timeout"
    )
    timer = threading.Timer(seconds, _end, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(message: str) -> NoReturn:
    """Ends the process at once: JAX's own ways out of a coordinator that failed wait, or crash."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _on_tpu() -> bool:
    devices = Path("/dev")
    return importlib.util.find_spec("libtpu") is not None and any(
        any(devices.glob(pattern)) for pattern in ("accel*", "vfio/[0-9]*")
    )
