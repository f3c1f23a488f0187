"""What the commands share: an argument parser, errors as one line, exit codes."""

import argparse
import os
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


def positive(text: str) -> int:
    """A flag's type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


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


def check_output_file(path: Path, flag: str) -> None:
    """Looks before the work whether a file can be written after it; writes nothing.

    Raises:
      ValueError: it cannot; names the flag.
    """
    if path.is_dir():
        raise ValueError(f"{flag}={path} is a folder; name a file")
    if not path.parent.is_dir():
        raise ValueError(f"{flag}={path}: there is no folder {path.parent}; make it, or name another file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{flag}={path} must not be written; name another file")


def describe(error: Exception, *expected: type[Exception]) -> str:
    """One line: of what a user can cause (ValueError, OSError, NotImplementedError, `expected`) the message alone."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, (ValueError, OSError, NotImplementedError, *expected)):
        return f"error: {lines[0] or type(error).__name__}"
    return f"error: {type(error).__name__}: {lines[0][:200]} ({DEBUG} shows where)"
