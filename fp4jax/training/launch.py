"""The flags by which the processes of one run find one another, and how they leave it: for train.py and eval.py."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import flags

from fp4jax import distributed
from fp4jax.training import command
from fp4jax.training.preemption import Preempted

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Of several processes, started by hand: HOST:PORT of process 0; see docs/clusters.md."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is, from 0.")
TIMEOUT = flags.DEFINE_integer("coordinator_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout", 100, "Seconds of silence after which a process counts as dead.", lower_bound=1
)


def run(main: Callable[[], None], arguments: Sequence[str] = sys.argv) -> int:
    """As `command.run`, in one process or as one of several."""
    ends_with_the_others = False

    def joined() -> None:
        nonlocal ends_with_the_others
        distributed.start(
            COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value,
            timeout=TIMEOUT.value, heartbeat_timeout=HEARTBEAT.value,
        )  # fmt: skip
        try:
            with distributed.naming_lost_processes():
                main()
            ends_with_the_others = True
        except Preempted:
            ends_with_the_others = True
            raise

    try:
        code = command.run(joined, arguments)
    except Exception:  # with --debug alone
        if not distributed.several():
            raise
        traceback.print_exc()
        code = 1
    if distributed.several():
        if ends_with_the_others:
            jax.distributed.shutdown()
        else:
            # Leaving in an orderly way would wait for the others, and they wait for this process in a collective.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code
