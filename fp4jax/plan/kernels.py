"""What ptxas said of every Pallas kernel that a process compiled, from the files that Mosaic GPU leaves."""

import dataclasses
import re
from pathlib import Path

_USED = re.compile(r"Used (\d+) registers(.*)")
_SHARED = re.compile(r"(\d+) bytes smem")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
      name: of its function, and a number where several programs come from one.
      architecture: "sm_90a".
      registers: of a thread.
      spill_bytes: stored to and loaded from local memory by a thread, for want of registers.
      shared_bytes: of static shared memory of a thread block; what a launch adds is not in ptxas' report.
    """

    name: str
    architecture: str
    registers: int
    spill_bytes: int
    shared_bytes: int


def environment(folder: Path) -> dict[str, str]:
    """Variables that make Mosaic GPU leave its reports in `folder`; they must be set before JAX starts."""
    return {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1"}


def read(folder: Path) -> list[Kernel]:
    """The kernels whose reports are in `folder`, by name.

    Raises:
      ValueError: a report that says nothing of registers.
    """
    return [_kernel(path) for path in sorted(folder.glob("*.ptxas"))]


def _kernel(path: Path) -> Kernel:
    text = path.read_text(encoding="utf-8", errors="replace")
    used, architecture = _USED.search(text), re.search(r"for '(sm_\w+)'", text)
    if not used or not architecture:
        raise ValueError(f"{path.name}: ptxas' report has no line 'Used ... registers'")
    spills = _SPILLS.search(text)
    shared = _SHARED.search(used[2])
    return Kernel(
        path.stem,
        architecture[1],
        int(used[1]),
        sum(map(int, spills.groups())) if spills else 0,
        int(shared[1]) if shared else 0,
    )
