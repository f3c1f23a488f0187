"""Quantizers with one fault each, and the law that must name it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning

from fp4jax.numerics import NVFP4, quantize, rounding
from fp4jax.testing.subject import Subject

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FLT_MAX = np.finfo(np.float32).max


def to_nearest(v):
    return rounding.decode(rounding.encode_nearest(v, NVFP4.element), NVFP4.element)


def stochastic_on(magnitudes, shift=0.0):
    """Stochastic rounding to a grid; `shift` is added to the probability of going up."""

    def element(v, key):
        grid = jnp.asarray(magnitudes)
        magnitude = jnp.minimum(jnp.abs(v), 6.0)
        above = jnp.clip(jnp.searchsorted(grid, magnitude), 1, len(magnitudes) - 1)
        low, high = grid[above - 1], grid[above]
        inside = (magnitude > low) & (magnitude < high)
        position = (magnitude - low) / (high - low) + jnp.where(inside, jnp.float32(shift), jnp.float32(0))
        return jnp.sign(v) * jnp.where(jax.random.uniform(key, v.shape) < position, high, low)

    return element


def emulate(element=to_nearest, *, block=16, tensor_scale=True, zero_guard=True, smallest=0.0):
    """NVFP4 without codes, for faults: `f(x)`, or `f(x, key)` where `element` draws."""

    def values(x, *key):
        blocks = x.astype(jnp.float32).reshape(-1, block)
        amax = jnp.max(jnp.abs(blocks))
        encode = jnp.minimum(NVFP4.range / amax, FLT_MAX) if zero_guard else NVFP4.range / amax
        encode = encode if tensor_scale else jnp.float32(1)
        peak = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
        wanted = jnp.minimum(peak * (encode * NVFP4.inverse_element_max), 448.0)
        byte = rounding.encode_scale(jnp.maximum(wanted, smallest), NVFP4.scale)
        scale = rounding.decode_scale(byte, NVFP4.scale)
        q = element(blocks * jnp.minimum(1 / (scale * (1 / encode)), FLT_MAX), *key)
        return (q * scale * (1 / encode)).reshape(x.shape)

    return values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Faulty:
    """What `quantize` gives, with a part replaced."""

    codes: jax.Array
    scales: jax.Array
    amax: jax.Array
    values: jax.Array

    def dequantize(self):
        return self.values


def with_fault(fault):
    def quantizer(x):
        q = quantize(x)
        return Faulty(**({"codes": q.codes, "scales": q.scales, "amax": q.amax, "values": q.dequantize()} | fault(q)))

    return quantizer


def sr(x, key):
    return quantize(x, rounding="stochastic", key=key).dequantize()


def nearest_for_stochastic(x, key):
    return quantize(x).dequantize()


def missing_half(v):
    q = to_nearest(v)
    return jnp.where(jnp.abs(q) == 0.5, jnp.float32(0), q)


def truncating(v):
    return (
        jnp.sign(v) * jnp.asarray(MAGNITUDES)[jnp.searchsorted(jnp.asarray(MAGNITUDES), jnp.abs(v), side="right") - 1]
    )


def ties_away(v):
    return to_nearest(v * np.float32(1 + 2.0**-22))


def wrapping(v):
    return jnp.where(jnp.abs(v) > 6.1, -v, to_nearest(v))


def rounding_down(v):
    grid = jnp.asarray([-m for m in MAGNITUDES[:0:-1]] + list(MAGNITUDES))
    return grid[jnp.clip(jnp.searchsorted(grid, v, side="right") - 1, 0, 14)]


def nan_to_zero(x):
    return quantize(jnp.where(jnp.isnan(x), jnp.zeros_like(x), x)).dequantize()


def infinity_to_finite(x):
    return quantize(jnp.clip(x, -1e30, 1e30)).dequantize()


def growing(x):
    return quantize(x * np.float32(1.125)).dequantize()


def in_own_dtype(x):
    return quantize(x * jnp.asarray(1.01, x.dtype)).dequantize()


def other_under_jit(x):
    return x * 2 if isinstance(x, jax.core.Tracer) else x


def small_noise(x, key):
    """Adds noise of half a step before rounding to nearest: unbiased by far not everywhere, and three neighbours."""
    noise = jax.random.uniform(key, x.shape, minval=-0.5, maxval=0.5)
    return quantize(x + noise * (jnp.abs(x) < 6)).dequantize()


@custom_partitioning
def local_maximum(x):
    """Every device takes its own largest magnitude for the tensor's."""
    return quantize(x).dequantize()


def _partition(mesh, arguments, result):
    sharding = arguments[0].sharding
    return mesh, lambda x: quantize(x).dequantize(), sharding, (sharding,)


local_maximum.def_partition(
    partition=_partition,
    infer_sharding_from_operands=lambda mesh, arguments, result: arguments[0].sharding,
    sharding_rule="i j -> i j",
)

GOOD = quantize
SKIPS_1_5 = stochastic_on((0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0))
# law → {what is wrong: the quantizer}. Every law has at least one.
BROKEN = {
    "golden vectors: values": {"blocks of 32": Subject(emulate(block=32))},
    "golden vectors: codes": {
        "nibbles swapped": Subject(with_fault(lambda q: {"codes": q.codes << 4 | q.codes >> 4})),
    },
    "golden vectors: scales and amax": {
        "scales one step up": Subject(with_fault(lambda q: {"scales": q.scales + jnp.uint8(1)})),
        "amax doubled": Subject(with_fault(lambda q: {"amax": q.amax * 2})),
    },
    "golden vector of 16x16 blocks": {"rows instead": Subject(GOOD, square=lambda x: quantize(x).dequantize())},
    "amax is the largest magnitude": {
        "amax in bfloat16": Subject(with_fault(lambda q: {"amax": q.amax.astype(jnp.bfloat16).astype(jnp.float32)})),
    },
    "block scales": {"448 never used": Subject(with_fault(lambda q: {"scales": jnp.minimum(q.scales, 125)}))},
    "values follow from codes": {
        "dequantize loses the tensor scale": Subject(with_fault(lambda q: {"values": q.values()})),
    },
    "all 15 values, nearest": {"no 0.5": Subject(emulate(missing_half))},
    "nearest value, ties to even": {
        "truncation": Subject(emulate(truncating)),
        "ties away from zero": Subject(emulate(ties_away)),
    },
    "saturates at 6": {"wraps around": Subject(emulate(wrapping))},
    "idempotence": {"grows": Subject(growing)},
    "scale equivariance": {"no tensor scale": Subject(emulate(tensor_scale=False))},
    "negation": {"rounds down": Subject(emulate(rounding_down))},
    "bfloat16 input": {"computes in the input's dtype": Subject(in_own_dtype)},
    "zero": {"0 / 0": Subject(emulate(zero_guard=False))},
    "underflow": {"scales not below 2^-9": Subject(emulate(smallest=2.0**-9))},
    "infinity is not hidden": {"clipped": Subject(infinity_to_finite)},
    "NaN is not hidden": {"NaN to zero": Subject(nan_to_zero)},
    "all 15 values, stochastic": {"no 1.5": Subject(GOOD, emulate(SKIPS_1_5))},
    "stochastic: two neighbours only": {
        "no 1.5": Subject(GOOD, emulate(SKIPS_1_5)),
        "noise of half a unit": Subject(GOOD, small_noise),
    },
    "stochastic: E[SR(v)] = v": {
        "nearest": Subject(GOOD, nearest_for_stochastic),
        "up 4 % too often": Subject(GOOD, emulate(stochastic_on(MAGNITUDES, shift=0.04))),
        "noise of half a unit": Subject(GOOD, small_noise),
    },
    "stochastic: follows its key": {
        "nearest": Subject(GOOD, nearest_for_stochastic),
        "its own key": Subject(GOOD, lambda x, key: sr(x, jax.random.key(0))),
    },
    "jit = eager": {"another program under jit": Subject(other_under_jit)},
    "sharded = single device": {"each device its own maximum": Subject(local_maximum)},
}  # fmt: skip
