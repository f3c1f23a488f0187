"""The device that a program is traced for: one of this machine, or one that a mesh describes and that is not here."""

import dataclasses
import functools
import os
import re

import jax
import jax.numpy as jnp

# A mesh of devices that are not here tells their names alone while a program is traced.
_CAPABILITIES = {
    r"NVIDIA (H100|H200|H800|H20|GH200)\b": "9.0",
    r"NVIDIA G?B200\b": "10.0",
    r"NVIDIA G?B300\b": "10.3",
    r"NVIDIA (RTX PRO \d+.* Blackwell|GeForce RTX 50\d\d)\b": "12.0",
}


CPU_ROWS = 16
"""Rows that XLA:CPU multiplies in bfloat16; a single one it multiplies in float32."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Attributes:
    platform: "cpu", "gpu" or "tpu"; device_kind: its name.
    compute_capability: of an NVIDIA GPU, "9.0"; "" of others and where it is not known.
    devices: how many there are, or how many the mesh has where it is one of devices that are not here.
    """

    platform: str
    device_kind: str
    compute_capability: str
    devices: int

    @property
    def capability(self) -> tuple[int, int]:
        """For comparisons; (0, 0) where there is none."""
        major, _, minor = self.compute_capability.partition(".")
        return int(major or 0), int(minor or 0)

    @property
    def is_gpu(self) -> bool:
        return self.platform == "gpu"

    @property
    def is_cpu(self) -> bool:
        return self.platform == "cpu"

    def __str__(self) -> str:
        return f"{self.device_kind} ({self.platform})"


def current() -> Hardware:
    """The device of the ambient mesh; without a mesh `jax.default_device`, or the first of `jax.devices()`."""
    mesh, here = jax.sharding.get_abstract_mesh(), _devices_here()
    described = mesh.abstract_device
    if described is None or described.device_kind == here[0].device_kind:
        capability = str(getattr(here[0], "compute_capability", ""))
        known = re.fullmatch(r"\d+\.\d+", capability)  # AMD's are no numbers
        return Hardware(here[0].platform, here[0].device_kind, capability if known else "", len(here))
    matching = [value for name, value in _CAPABILITIES.items() if re.match(name, described.device_kind)]
    return Hardware(described.platform, described.device_kind, "".join(matching), mesh.size)


def _devices_here() -> list:
    """Of the platform that uncommitted arrays go to."""
    default = jax.config.jax_default_device  # a device, the name of a platform, or None
    return jax.devices(getattr(default, "platform", default))


def emulation_dtype() -> jnp.dtype:
    """What quantized values are multiplied in: bfloat16 where the device has units for it, float32 elsewhere.

    Both give the same result up to the order of additions. The device is that of the ambient mesh, which may be one
    that is only compiled for; without a mesh the default one. CPUs are judged by their instruction set and not by a
    measurement, so that the same machine repeats the same run bit for bit.
    """
    units = {"cpu": _cpu_has_bfloat16_units}.get(current().platform, lambda: True)
    return jnp.dtype(jnp.bfloat16 if units() else jnp.float32)


HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""In GLIBC_TUNABLES it has malloc ask for huge pages. XLA:CPU takes its memory anew for every program that it runs, and
in pages of 4 KiB the kernel spends a good part of a small step handing it out."""


def huge_pages(folder: str = "/sys/kernel/mm/transparent_hugepage") -> bool | None:
    """Whether malloc gets huge pages in this process: None where the system has none to give, or does not tell."""
    try:
        with open(f"{folder}/enabled", encoding="ascii") as file:
            chosen = re.search(r"\[(\w+)\]", file.read())
    except OSError:
        return None
    if chosen is None or chosen[1] == "never":
        return None
    asked = re.search(r"(?:^|:)glibc\.malloc\.hugetlb=[1-9]", os.environ.get("GLIBC_TUNABLES", ""))
    return chosen[1] == "always" or asked is not None


@functools.cache
def _cpu_has_bfloat16_units() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:  # not Linux: nothing is known of its units
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))
