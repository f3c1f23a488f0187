"""The argument parser of the subcommands of `python -m fp4jax.analyze`."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line: it raises a ValueError instead of printing usage and leaving.

    Flags cannot be abbreviated: an abbreviation would change its meaning when a flag is added.
    """

    def __init__(self, subcommand: str, description: str):
        super().__init__(
            prog=f"python -m fp4jax.analyze {subcommand}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        self.subcommand = subcommand

    def error(self, message: str) -> NoReturn:
        """Raises the ValueError of an argument that cannot be used."""
        raise ValueError(f"{self.subcommand}: {message} (--help lists the flags)")
