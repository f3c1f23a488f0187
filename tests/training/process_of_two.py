"""One process of two with four devices each: what it sees, as JSON. Started by test_processes.py."""

import json
import os
import signal
import sys

import jax
import numpy as np

from fp4jax import distributed
from fp4jax.axes import MESH_AXES
from fp4jax.config import ConfigError, mesh_of
from fp4jax.training.mesh import make_mesh, put_batch
from fp4jax.training.preemption import Agreement, StopRequest
from fp4jax.training.shares import batch_share


def refusal_of(mesh: jax.sharding.Mesh) -> str:
    try:
        return f"none: {batch_share(mesh)}"
    except ConfigError as error:
        return str(error)


def rows_put_on(mesh: jax.sharding.Mesh) -> list[list[int]]:
    """The whole batch, of which this process puts its share on its devices."""
    part, parts = batch_share(mesh)
    rows = np.arange(16, dtype=np.int32).reshape(8, 2)
    batch = put_batch({"tokens": rows[part * 8 // parts :][: 8 // parts]}, mesh)
    whole = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(mesh, jax.P()))(batch["tokens"])
    return np.asarray(whole).tolist()


def main(address: str, index: int) -> None:
    distributed.start(address, 2, index)
    mesh = make_mesh(mesh_of(data=2, fsdp=4))
    tensor_mesh = make_mesh(mesh_of(tensor=8))
    request = StopRequest()
    agreement = Agreement(request, mesh)
    stops = [agreement()]
    if index == 1:
        request.received(signal.SIGTERM)
    stops += [agreement() for _ in range(3)]
    # As a topology may have it: the blocks in another order than the processes, and the devices of each in another.
    turned_mesh = jax.sharding.Mesh(np.array(jax.devices())[::-1].reshape(2, 4, 1, 1), MESH_AXES)
    dealt_out = np.array(jax.devices()).reshape(2, 4).T.reshape(8, 1, 1, 1)
    refused = [
        refusal_of(make_mesh(mesh_of(data=4))),
        refusal_of(jax.sharding.Mesh(dealt_out, MESH_AXES)),
    ]
    print(json.dumps({
        "first": distributed.is_first(),
        "prefix": distributed.prefix(),
        "from_first": distributed.from_first(10 + index),
        "everywhere": [distributed.everywhere(index == 0), distributed.everywhere(True)],
        "share": [batch_share(mesh), batch_share(tensor_mesh), batch_share(turned_mesh)],
        "rows": [rows_put_on(mesh), rows_put_on(turned_mesh)],
        "stops": stops,
        "refused": refused,
    }), flush=True)  # fmt: skip
    jax.distributed.shutdown()
    os._exit(0)


main(sys.argv[1], int(sys.argv[2]))
