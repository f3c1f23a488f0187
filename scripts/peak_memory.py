"""Runs a command and prints its peak memory: `python scripts/peak_memory.py python train.py --config=...`."""

import resource
import subprocess
import sys
import time


def main(command: list[str]) -> int:
    """Returns the command's exit code after printing peak resident memory (GB), wall and CPU time (s)."""
    if not command:
        sys.exit("error: name a command to measure: python scripts/peak_memory.py python train.py --config=...")
    start = time.time()
    try:
        code = subprocess.run(command).returncode
    except OSError as error:
        sys.exit(f"error: {command[0]!r} cannot be run: {error.strerror}")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = usage.ru_maxrss * 1024 / 1e9  # Linux counts in KiB
    cpu = usage.ru_utime + usage.ru_stime
    print(f"peak memory {peak:.2f} GB, {time.time() - start:.0f} s, {cpu:.0f} s of CPU, exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
