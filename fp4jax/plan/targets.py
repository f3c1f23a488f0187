"""Machines to compile for: their names, what must be installed for them, and their devices as a mesh."""

import dataclasses
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.experimental import topologies

DESCRIPTIONS = Path(__file__).parent / "descriptions"
"""A file for every GPU: XLA's `GpuTargetConfigProto` as text, <name>.txtpb."""

REQUIREMENTS = "requirements-plan.txt"

# Products, roundings, their order and memory are settled before LLVM.
GPU_OPTIONS = {"xla_backend_optimization_level": 0, "xla_gpu_disable_gpuasm_optimizations": True}

# libtpu asks no cloud for its machine, and other processes may hold it too: it only compiles here.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""Variables of a process that compiles; they must be set before JAX starts."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Some devices of one kind.

    Attributes:
      name: as it was given, "h200:8" or "v5e:4x4".
      kind: "h200" or "v5e".
      is_gpu: one of `DESCRIPTIONS`; else a TPU.
      topology: what JAX calls the arrangement: "1x8x1" of GPUs, "v5e:4x4" of TPUs.
    """

    name: str
    kind: str
    is_gpu: bool
    topology: str

    @property
    def package(self) -> str:
        """The module without which there is no compiler for it."""
        return "jax_cuda13_plugin" if self.is_gpu else "libtpu"

    @property
    def compiler_options(self) -> Mapping[str, object] | None:
        return GPU_OPTIONS if self.is_gpu else None

    def check_installed(self) -> None:
        """Raises ValueError, which says what to install, where its compiler is missing."""
        if importlib.util.find_spec(self.package) is None:
            what = "NVIDIA's compiler, no GPU" if self.is_gpu else "libtpu, no TPU"
            raise ValueError(f"target {self.name} needs {what}: pip install -r {REQUIREMENTS}")

    def devices(self) -> Sequence[jax.Device]:
        """Its devices, which can be compiled for and not run on.

        Raises:
          ValueError: its compiler is missing, or does not know it.
        """
        self.check_installed()
        jax.devices()  # registers the plug-ins
        if self.is_gpu:
            description = (DESCRIPTIONS / f"{self.kind}.txtpb").read_text(encoding="utf-8")
            arguments = {"platform": "cuda", "topology_name": "", "topology": self.topology}
            return topologies.get_topology_desc(**arguments, target_config=description).devices
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=self.topology).devices
        except Exception as error:  # of many types, by libtpu's release
            reason = str(error).strip().splitlines()[0][:200]
            raise ValueError(f"target {self.name}: libtpu has no such topology ({reason})") from error


def gpu_names() -> list[str]:
    """The GPUs that are described."""
    return sorted(path.stem for path in DESCRIPTIONS.glob("*.txtpb"))


def parse(name: str) -> Target:
    """The target of that name: a GPU and their number ("h200:8"), or a TPU and its grid ("v5e:4x4").

    >>> parse("h200:8").topology
    '1x8x1'

    Raises:
      ValueError: no such name.
    """
    kind, _, size = name.partition(":")
    if kind in gpu_names() and re.fullmatch(r"[1-9]\d*", size):
        return Target(name, kind, True, f"1x{size}x1")
    if re.fullmatch(r"v\d+\w*", kind) and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", size):
        return Target(name, kind, False, name)
    known = ", ".join(f"{gpu}:1" for gpu in gpu_names())
    raise ValueError(
        f"unknown target {name!r}; accepted: a GPU and how many ({known}, h200:8), a TPU and its grid (v5e:4x4)"
    )
