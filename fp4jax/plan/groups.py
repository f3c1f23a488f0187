"""Which devices talk to which in a collective, as optimized HLO writes it: by mesh axes, by lists, or by an iota."""

import math
import re

import numpy as np

_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")


def groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups (of a permute: the pairs) of a collective, by the devices' places in the mesh.

    Args:
      attributes: what stands behind the instruction's operands.
      devices: how many the program runs on; all of them are one group where none is written.

    Raises:
      ValueError: groups in another notation.
    """
    if found := _MESH.search(attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        shared = re.findall(r"'([^']+)'", found[2])
        if found[2] != ",".join(f"'{name}'" for name in shared):
            raise ValueError(f"unknown notation of a collective's groups: {found[0]}")
        order = [name for name in axes if name not in shared] + shared
        ids = np.arange(math.prod(axes.values())).reshape(*axes.values())
        ids = ids.transpose([list(axes).index(name) for name in order])
        return ids.reshape(-1, math.prod(axes[name] for name in shared)).tolist()
    if found := _IOTA.search(attributes):
        shape = [int(size) for size in found[3].split(",")]
        order = [int(axis) for axis in found[4].split(",")] if found[4] else range(len(shape))
        ids = np.arange(math.prod(shape)).reshape(shape).transpose(order)
        return ids.reshape(int(found[1]), int(found[2])).tolist()
    if found := _LISTS.search(attributes):
        listed = [[int(device) for device in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
        return listed or [list(range(devices))]
    raise ValueError(f"unknown notation of a collective's groups: {attributes[:80]}")


def leave_machines(attributes: str, devices: int, on_a_machine: int) -> bool:
    """Whether a group has devices of two machines, each of which has so many neighbours in the mesh's order."""
    return any(len({device // on_a_machine for device in group}) > 1 for group in groups(attributes, devices))
