"""What a result is from: the commit and the command line, without this machine's folders."""

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout, or what the package is installed in."""

DIRTY = "-dirty"
_ABSOLUTE = re.compile(r"(?<![\w./-])(?:file://)?(/[^\s,'\"()\[\]{}:]+)")


def about(module: str, arguments: Sequence[str]) -> dict[str, str | None]:
    """{"commit", "command"} of `python -m module arguments...`."""
    return {"commit": commit(), "command": command(module, arguments)}


def commit() -> str | None:
    """The checkout's commit, with "-dirty" where files that Git follows differ from it; None in an installed package.

    A copy without Git's folder is told its commit by FP4JAX_COMMIT.
    """
    if told := os.environ.get("FP4JAX_COMMIT"):
        return told
    if not (ROOT / ".git").exists():  # a package may lie in somebody else's checkout, which Git would find
        return None
    try:
        return _git("rev-parse", "--short", "HEAD") + (DIRTY if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def command(module: str, arguments: Sequence[str], out: str = "out") -> str:
    """The command line as one would repeat it in the checkout: of the flag `out` the file's name, no absolute path."""
    told, flag = ["python", "-m", module], ""
    for argument in arguments:
        value = argument
        prefix = ""
        if argument.startswith("-"):
            flag, equals, value = argument.partition("=")
            prefix = flag + equals
        told.append(prefix + (Path(value).name if flag.lstrip("-") == out else without_folders(value)))
    return shlex.join(told)


def without_folders(path: str) -> str:
    """Text with its absolute paths from the checkout on, or their names alone if they are elsewhere.

    >>> without_folders("/home/somebody/plan.json"), without_folders("configs/averis_tiny.py")
    ('plan.json', 'configs/averis_tiny.py')
    >>> without_folders("file:///data/a.bin,('/data/b.bin',)")
    "a.bin,('b.bin',)"
    """
    return _ABSOLUTE.sub(lambda found: _from_checkout(Path(found[1])), path)


def _from_checkout(path: Path) -> str:
    for root in (ROOT, Path(os.path.abspath(__file__)).parent.parent):  # with links resolved, and as it was reached
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return path.name


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return run.stdout.strip()
