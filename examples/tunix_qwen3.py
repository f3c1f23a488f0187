"""Another library's Qwen3 in FP4: google-tunix' model, most of whose linear layers call `jnp.einsum` themselves.

make test-examples  # makes .venv-examples and runs every example
.venv-examples/bin/python examples/tunix_qwen3.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3

import fp4jax

CONFIG = qwen3.ModelConfig(
    num_layers=2, vocab_size=64, embed_dim=32, hidden_dim=64, num_heads=2, head_dim=16, num_kv_heads=1,
    rope_theta=10_000, norm_eps=1e-6,
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(1), (4, 17), 0, CONFIG.vocab_size)  # to be learned by heart
POLICY = fp4jax.Policy.of(("lm_head", "bf16"), (".", "averis"))


def loss(model, tokens):
    batch, length = tokens[:, 1:].shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    logits, _ = model(tokens[:, :-1], positions, None, mask)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit
def train_step(model, optimizer, tokens):
    value, gradients = nnx.value_and_grad(loss)(model, tokens)
    optimizer.update(model, gradients)
    return value


def main(steps: int = 20):
    model = qwen3.Qwen3(CONFIG, rngs=nnx.Rngs(0))
    layers = fp4jax.nnx.quantize(model, POLICY, rngs=nnx.Rngs(fp4=0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    print(fp4jax.report(nnx.grad(loss), model, TOKENS))
    losses = [float(train_step(model, optimizer, TOKENS)) for _ in range(steps)]
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")
    return model, layers, losses


if __name__ == "__main__":
    main()
