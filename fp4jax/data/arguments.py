"""What the commands of this package share: flags in, one line of error out, exit code 2."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from fp4jax.data.errors import DataError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, and whose flags cannot be abbreviated."""

    def __init__(self, module: str, description: str):
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """Raises the DataError of an argument that cannot be used."""
        raise DataError(f"{message} (--help lists the flags)")


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Calls `main` with the arguments; returns the exit code.

    Codes: 0 done, 2 what a user can mend (a ValueError or OSError, as one line on stderr), 1 any other error, with its
    type, 130 interrupted. `--debug` among the arguments shows the traceback.
    """
    try:
        main(arguments)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in arguments:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, ValueError | OSError):
            print(f"error: {lines[0]}", file=sys.stderr)
            return 2
        print(f"error: {type(error).__name__}: {lines[0][:200]} (--debug shows where)", file=sys.stderr)
        return 1
