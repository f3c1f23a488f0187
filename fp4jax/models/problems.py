"""One error for all that is wrong with a file."""

import os
from collections.abc import Sequence

from fp4jax.data.errors import DataError

SHOWN = 8


def raise_problems(path: str | os.PathLike, claim: str, problems: Sequence[str]) -> None:
    """Raises a DataError "PATH CLAIM: problem; problem and 3 more" unless there are none."""
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError(f"{path} {claim}: {'; '.join(problems[:SHOWN])}{more}")
