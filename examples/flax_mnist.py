"""A Flax Linen classifier of images in FP4: convolutions and the last layer stay, the wide layers are quantized.

python examples/flax_mnist.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import fp4jax

POLICY = fp4jax.Policy.of(("Dense_2", "bf16"), (".", "averis"))


class CNN(nn.Module):
    """The usual small network for MNIST."""

    @nn.compact
    def __call__(self, images):
        x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3))(images)), (4, 4), (4, 4)).reshape(len(images), -1)
        x = nn.relu(nn.Dense(64)(x))
        x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(10)(x)


def digits(count: int = 64):
    """Images [count, 28, 28, 1] of ten classes: a noisy bar whose place is the class. No download."""
    labels = jnp.arange(count) % 10
    bars = (jnp.arange(28)[None, :, None] // 3 == labels[:, None, None]).astype(jnp.float32)
    noise = jax.random.normal(jax.random.key(2), (count, 28, 28))
    return (bars + 0.3 * noise)[..., None], labels


@jax.jit
def train_step(state, images, labels, key):
    def loss(params):
        logits = state.apply_fn({"params": params}, images, rngs={"fp4": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


def main(steps: int = 20):
    images, labels = digits()
    model = fp4jax.linen.quantize(CNN(), POLICY)
    variables = model.init(jax.random.key(0), images)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.adam(5e-3))
    print(fp4jax.report(train_step, state, images, labels, jax.random.key(1)))
    losses = []
    for step in range(steps):
        state, value = train_step(state, images, labels, jax.random.fold_in(jax.random.key(1), step))
        losses.append(float(value))
    layers = model.layers(variables, images)
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps", flush=True)
    return model, layers, losses


if __name__ == "__main__":
    main()
