"""What the command-line scripts share: flags in, one line of error out."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from fp4jax import distributed
from fp4jax.cli import describe
from fp4jax.config import check_overrides
from fp4jax.training.preemption import Preempted

DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error and the libraries' own log.")


def run(main: Callable[[], None], arguments: Sequence[str] = sys.argv) -> int:
    """Parses the flags and calls `main`; returns the exit code.

    What a user can cause (ValueError, OSError, a wrong flag) is printed as one line on stderr; any other error too,
    with its type, and --debug shows the traceback.
    """
    # Flags that cannot be parsed still have to be able to ask for a traceback.
    debug = any(argument in ("--debug", "-debug", "--debug=true") for argument in arguments)
    try:
        check_overrides(arguments[1:])
        app.define_help_flags()
        rest = flags.FLAGS(arguments)[1:]
        if rest:
            raise ValueError(f"unknown argument {rest[0]!r}; flags are written --name=value")
        if not debug:
            # Orbax logs a failed write with its traceback, and then raises it: the raised one is what is shown.
            logging.set_verbosity(logging.FATAL)
        main()
        return 0
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to go on from the last checkpoint", file=sys.stderr)
        return 130
    except Preempted as stopped:
        if distributed.is_first():
            print(stopped, file=sys.stderr)
        return stopped.exit_code
    except Exception as error:
        if debug:
            raise
        print(f"{distributed.prefix()}{describe(error, flags.Error)}", file=sys.stderr)
        return 1
