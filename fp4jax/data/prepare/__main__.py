"""The command; see `fp4jax.data.prepare`."""

import sys

from fp4jax.cli import run
from fp4jax.data.prepare.command import main

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
