"""What the commands share: an argument parser, errors as one line, exit codes."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

DEBUG = "--debug"


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line: it raises a ValueError instead of printing usage and leaving.

    Flags cannot be abbreviated: an abbreviation would change its meaning when a flag is added.
    """

    def __init__(self, command: str, description: str):
        super().__init__(
            prog=f"python -m {command}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            epilog=f"{DEBUG} shows the traceback of an error.",
            allow_abbrev=False,
        )
        self.command = command.rpartition(" ")[2]

    def error(self, message: str) -> NoReturn:
        """Raises the ValueError of an argument that cannot be used."""
        raise ValueError(f"{self.command}: {message} (--help lists the flags)")


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str], interrupted: str = "interrupted") -> int:
    """Calls `main` with the arguments, without --debug, which shows the traceback of an error; returns the exit code.

    Codes: 0 done, 1 an error, as one line on stderr, 130 interrupted.
    """
    debug = DEBUG in arguments
    try:
        main([argument for argument in arguments if argument != DEBUG])
        return 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(describe(error), file=sys.stderr)
        return 1


def output_folder(path: Path, flag: str = "--out") -> Path:
    """Creates the folder for what a command writes.

    Raises:
      OSError: it cannot be made; names the flag.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{flag}={path} cannot be made: {error.strerror}; give another folder") from error
    return path


def describe(error: Exception, *expected: type[Exception]) -> str:
    """One line: of what a user can cause (ValueError, OSError, NotImplementedError, `expected`) the message alone."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, (ValueError, OSError, NotImplementedError, *expected)):
        return f"error: {lines[0] or type(error).__name__}"
    return f"error: {type(error).__name__}: {lines[0][:200]} ({DEBUG} shows where)"
