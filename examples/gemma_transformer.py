"""Google's Gemma in FP4: the `gemma` package's transformer (Linen), all of whose linear layers call `jnp.einsum`.

make test-examples  # makes .venv-examples and runs every example
.venv-examples/bin/python examples/gemma_transformer.py
"""

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from gemma import gm

import fp4jax

CONFIG = gm.nn.config.TransformerConfig(
    num_embed=64, embed_dim=32, hidden_dim=64, num_heads=2, head_dim=16, num_kv_heads=1,
    attention_types=(gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL), sliding_window_size=8,
    final_logit_softcap=30.0, use_post_attn_norm=True, use_post_ffw_norm=True, use_qk_norm=True,
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(1), (4, 17), 3, CONFIG.num_embed)  # to be learned by heart


@jax.jit
def train_step(state, tokens, key):
    def loss(params):
        logits = state.apply_fn({"params": params}, tokens[:, :-1], rngs={"fp4": key}).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


def main(steps: int = 20):
    model = fp4jax.linen.quantize(gm.nn.Transformer(config=CONFIG, dtype=jnp.float32), "averis")
    variables = model.init(jax.random.key(0), TOKENS)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.adam(2e-2))
    print(fp4jax.report(train_step, state, TOKENS, jax.random.key(2)))
    losses = []
    for step in range(steps):
        state, value = train_step(state, TOKENS, jax.random.fold_in(jax.random.key(2), step))
        losses.append(float(value))
    layers = model.layers(variables, TOKENS)
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps", flush=True)
    return model, layers, losses


if __name__ == "__main__":
    main()
