"""Laws of compilation: neither jit nor a mesh changes a bit."""

import inspect
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fp4jax.testing.nearest import spread_data
from fp4jax.testing.subject import NotApplicable, Subject, Violation


def jit_equals_eager(subject: Subject) -> str:
    x = jnp.asarray(spread_data())
    names = []
    for name, function, arguments in _roundings(subject):
        eager = inspect.unwrap(function)  # what jax.jit was given, where it was
        _same(jax.jit(function)(x, *arguments), eager(x, *arguments), f"{name}, jit against eager")
        names.append(name)
    return f"bit for bit: {', '.join(names)}"


def sharded_equals_single(subject: Subject) -> str:
    devices = jax.devices()
    if len(devices) < 2:
        raise NotApplicable("one device; on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 gives more")
    mesh = jax.sharding.Mesh(np.array(devices), ("devices",))
    x = np.tile(spread_data(), (len(devices), len(devices)))
    x[-1, -1] = 64.0  # the largest magnitude is on one device alone
    for name, function, arguments in _roundings(subject):
        single = jax.jit(function)(jnp.asarray(x), *arguments)
        for what, spec in (("rows", PartitionSpec("devices", None)), ("columns", PartitionSpec(None, "devices"))):
            sharded = jax.device_put(x, NamedSharding(mesh, spec))
            _same(jax.jit(function)(sharded, *arguments), single, f"{name}, {what} sharded")
    return f"bit for bit: rows and columns over {len(devices)} devices"


def _roundings(subject: Subject) -> Iterator[tuple[str, Callable, tuple]]:
    yield "nearest", subject.nearest, ()
    if subject.stochastic is not None:
        yield "stochastic", subject.stochastic, (jax.random.key(9),)


def _same(a, b, what):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        left, right = (np.frombuffer(np.asarray(part).tobytes(), np.uint8) for part in (left, right))
        if left.size != right.size:
            raise Violation(f"{what}: {left.size} bytes against {right.size}")
        if np.any(left != right):
            raise Violation(f"{what}: {np.sum(left != right)} of {left.size} bytes differ")


LAWS = (
    ("jit = eager", jit_equals_eager),
    ("sharded = single device", sharded_equals_single),
)
