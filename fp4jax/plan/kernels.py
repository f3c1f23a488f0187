"""What every Pallas kernel that a process compiled needs, from the files that Mosaic GPU leaves.

Registers, spills and static shared memory are ptxas' (NAME.ptxas). What a launch adds to the shared memory, nearly all
of it, stands in the program that ptxas was given (NAME.mlir-passes.log), barriers included. Mosaic leaves
NAME.resources.txt too, but numbers those files otherwise: the same NAME may be another kernel.
"""

import dataclasses
import re
from pathlib import Path

_USED = re.compile(r"Used (\d+) registers(.*)")
_SHARED = re.compile(r"(\d+) bytes smem")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_CONSTANT = re.compile(r"(%\w+) = arith\.constant (\d+) : i32")
_LAUNCHED = re.compile(r"gpu\.launch .*dynamic_shared_memory_size (%\w+)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
      name: of its function, and a number where several programs come from one.
      architecture: "sm_90a".
      registers: of a thread.
      spill_bytes: stored to and loaded from local memory by a thread, for want of registers.
      static_shared_bytes, dynamic_shared_bytes: of the shared memory of a thread block; the launch adds the latter.
    """

    name: str
    architecture: str
    registers: int
    spill_bytes: int
    static_shared_bytes: int
    dynamic_shared_bytes: int


def environment(folder: Path) -> dict[str, str]:
    """Variables that make Mosaic GPU leave its reports in `folder`; they must be set before JAX starts."""
    return {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1"}


def read(folder: Path) -> list[Kernel]:
    """The kernels whose reports are in `folder`, by name.

    Raises:
      ValueError: a report that says nothing of registers, or a kernel of which no launch is found.
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
        _dynamic_shared(path.with_suffix(".mlir-passes.log")),
    )


def _dynamic_shared(path: Path) -> int:
    """Bytes that the kernel's launch asks for; read up to there, as the file is of many megabytes."""
    constants = {}
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if found := _CONSTANT.search(line):
                    constants[found[1]] = int(found[2])
                if found := _LAUNCHED.search(line):
                    return constants[found[1]]
    raise ValueError(f"{path.name}: no launch with its dynamic shared memory")
