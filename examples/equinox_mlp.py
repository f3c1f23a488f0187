"""An Equinox model in FP4: one example at a time, vmapped, and quantized inside the loss.

make test-examples  # makes .venv-examples and runs every example
.venv-examples/bin/python examples/equinox_mlp.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import fp4jax

POLICY = fp4jax.Policy.of((r"layers\.2", "bf16"), (".", "averis"))
OPTIMIZER = optax.adam(5e-3)


def loss(model, x, y, key):
    model = fp4jax.equinox.quantize(model, POLICY, key=key)
    return jnp.mean(jnp.square(jax.vmap(model)(x) - y))


@eqx.filter_jit
def train_step(model, state, x, y, key):
    value, gradients = eqx.filter_value_and_grad(loss)(model, x, y, key)
    updates, state = OPTIMIZER.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, value


def main(steps: int = 20):
    x = jax.random.normal(jax.random.key(1), (64, 16))
    y = jnp.sin(x[:, :4])
    model = eqx.nn.MLP(16, 4, width_size=64, depth=2, key=jax.random.key(0))
    layers = fp4jax.equinox.layers(model, POLICY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    gradient = jax.grad(lambda params, *rest: loss(eqx.combine(params, static), *rest))
    print(fp4jax.report(gradient, params, x, y, jax.random.key(2)))
    state = OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array))
    losses = []
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(2), step)
        model, state, value = train_step(model, state, x, y, key)
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps", flush=True)
    return model, layers, losses


if __name__ == "__main__":
    main()
