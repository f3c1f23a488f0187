"""One linear layer under fp4jax, under other JAX packages, and without quantization: what `benchmarks.peers` times.

A contender is a function (x [tokens, inputs], w [inputs, outputs], key) → y [tokens, outputs], differentiable in x and
w. All arrays are float32. A name that is none of these is a recipe of fp4jax.

| contender | fprop | dgrad and wgrad |
|---|---|---|
| f32 | float32 | float32 |
| bf16 | bfloat16 operands, result rounded to bfloat16 | the same |
| nvfp4_forward | NVFP4 to nearest | high precision: what scaled_dot_general does |
| qwix | NVFP4 to nearest | NVFP4 gradient times the unquantized x or w, as by `qwix.QtRule` |
| qwix_all | the same | both operands NVFP4, by `additional_qt_config` |
| scaled_dot_general | NVFP4 to nearest, JAX's default: a global scale of 1 | high precision |
| scaled_dot_general_amax | the same, global scale amax / 2688 given by the caller | high precision |

qwix is asked for stochastic rounding of gradients, as fp4jax rounds them; 0.1.8 rounds this type to nearest all the
same, and has no float32 scale of a matrix.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from fp4jax.dot import dot_general
from fp4jax.recipes import Recipe, as_recipe

Linear = Callable[[Array, Array, Array], Array]

_CONTRACT = (((1,), (0,)), ((), ()))
_NVFP4_RANGE = 2688.0
_TILE = 16


def linear(name: str) -> Linear:
    """The contender of that name.

    Raises:
      ModuleNotFoundError: qwix is not installed.
      ValueError: neither a contender nor a recipe.
    """
    if name in _CONTENDERS:
        return _CONTENDERS[name]()
    return _by_recipe(as_recipe(name))


def check(name: str) -> None:
    """Raises ValueError for a name that is neither a contender nor a recipe, whether or not qwix is installed."""
    if name in _CONTENDERS:
        return
    try:
        as_recipe(name)
    except ValueError as error:
        raise ValueError(f"{name!r} is none of {', '.join(_CONTENDERS)}, and no recipe: {error}") from None


def with_gradients(product: Linear) -> Callable[[Array, Array, Array, Array], tuple[Array, Array, Array]]:
    """(x, w, d, key) → (y, dL/dx, dL/dw) for dL/dy = d."""

    def run(x, w, d, key):
        y, pullback = jax.vjp(lambda x, w: product(x, w, key), x, w)
        return y, *pullback(d)

    return run


def _by_recipe(recipe: Recipe) -> Linear:
    return lambda x, w, key: dot_general(x, w, _CONTRACT, recipe=recipe, key=key)


def _float32() -> Linear:
    return lambda x, w, key: lax.dot_general(x, w, _CONTRACT)


def _bfloat16() -> Linear:
    def product(x, w, key):
        return lax.dot_general(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), _CONTRACT).astype(jnp.float32)

    return product


def _nvfp4_forward() -> Linear:
    return _by_recipe(Recipe("nvfp4_forward", fprop=as_recipe("nvfp4").fprop))


def _qwix(**more: str) -> Linear:
    from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt  # no dependency of the project
    from qwix._src.core.stochastic_rounding import get_noise_fn

    def product(x, w, key):
        noise = get_noise_fn("uniform", key, channelwise_noise_axes=(0, 1))
        config = DotGeneralQtConfig(
            lhs_qtype="nvfp4", rhs_qtype="nvfp4", tile_size=_TILE,
            dlhs_grad_qtype="nvfp4", dlhs_tile_size=_TILE, dlhs_stochastic_rounding_noise_fn=noise,
            drhs_grad_qtype="nvfp4", drhs_tile_size=_TILE, drhs_stochastic_rounding_noise_fn=noise, **more,
        )  # fmt: skip
        return dot_general_qt(x, w, _CONTRACT, config)

    return product


def _scaled_dot_general(scale_of: Callable[[Array], Float32[Array, "1"]]) -> Linear:
    def product(x, w, key):
        scales = *map(scale_of, (x, w)), jnp.ones((1,), jnp.float32)  # the gradient's is not read
        configs = [jax.nn.get_scaled_dot_general_config("nvfp4", scale) for scale in scales]
        batched = (((2,), (1,)), ((0,), (0,)))  # it takes matrices with a batch axis only
        return jax.nn.scaled_dot_general(x[None], w[None], batched, jnp.float32, configs)[0]

    return product


def _global_scale(x):
    amax = jnp.max(jnp.abs(lax.stop_gradient(x)))
    return jnp.where(amax > 0, amax / _NVFP4_RANGE, 1.0).reshape(1)


_CONTENDERS: dict[str, Callable[[], Linear]] = {
    "f32": _float32,
    "bf16": _bfloat16,
    "nvfp4_forward": _nvfp4_forward,
    "qwix": _qwix,
    "qwix_all": lambda: _qwix(dlhs_residual_qtype="nvfp4", drhs_residual_qtype="nvfp4"),
    "scaled_dot_general": lambda: _scaled_dot_general(lambda x: jnp.ones((1,), jnp.float32)),
    "scaled_dot_general_amax": lambda: _scaled_dot_general(_global_scale),
}
