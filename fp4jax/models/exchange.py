"""Rows on their way from the devices that hold their tokens to those that hold their experts, and back.

A microbatch's tokens are routed in G groups of whole sequences, each of which has C slots in every expert (GShard,
arXiv 2006.16668). Where every device holds whole groups, a group's rows are put into its slots and taken out of them on
its own device: no index reaches over to another. In between, one axis of the slots is split in place of another,

    [G, E, C, D]: G along data, fsdp and expert  →  G along data and fsdp, E along expert

which is an all-to-all along `expert`, in the type of the rows: each device sends the slots of others' experts, and gets
those of its own. The cotangents travel the same ways. The number of groups is the model's and not the mesh's: one
device routes the same, and so does any other mesh.

Shapes: G groups of S tokens; E experts; C slots of an expert for a group; N = G x C; D hidden.
"""

import math

from jaxtyping import Array, Shaped

from fp4jax.layout import place

BLOCK = 16
"""Slots that share a scale in the weight gradient, and stay on one device."""


def groups_of(asked: int, sequences: int) -> int:
    """How many groups a call has: as many of those asked for as its sequences can be divided among."""
    return math.gcd(asked, sequences)


def by_group(rows: Shaped[Array, "tokens ..."], groups: int) -> Shaped[Array, "G S ..."]:
    """Consecutive tokens in groups, each group on one device."""
    return _of_groups(rows.reshape(groups, -1, *rows.shape[1:]), "batch")


def to_experts(rows_GxExC: Shaped[Array, "G E C ..."]) -> Shaped[Array, "E N ..."]:
    """Every expert's slots, those of the first group first, where its kernels are."""
    rows = _of_groups(_of_groups(rows_GxExC, "batch"), "slots", "expert")
    num_groups, num_experts, slots = rows.shape[:3]
    return _at_experts(rows.swapaxes(0, 1).reshape(num_experts, num_groups * slots, *rows.shape[3:]))


def to_groups(rows_ExN: Shaped[Array, "E N ..."], groups: int) -> Shaped[Array, "G E C ..."]:
    """`to_experts`' way back."""
    rows = _at_experts(rows_ExN)
    rows = rows.reshape(len(rows), groups, -1, *rows.shape[2:]).swapaxes(0, 1)
    return _of_groups(_of_groups(rows, "slots", "expert"), "batch")


def _at_experts(rows_ExN: Shaped[Array, "E N ..."]) -> Shaped[Array, "E N ..."]:
    """Every expert's rows where its kernels are; the devices that share an expert share its slots, in whole blocks."""
    rest = rows_ExN.ndim - 2
    return place(rows_ExN, ("expert", "slots", *[None] * rest), (1, BLOCK, *[1] * rest))


def _of_groups(rows, *names: str):
    """Rows whose first axes have these names. A single group is on no device alone: the compiler chooses."""
    return rows if len(rows) == 1 else place(rows, (*names, *[None] * (rows.ndim - len(names))))
