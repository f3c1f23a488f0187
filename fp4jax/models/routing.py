"""Which token goes to which expert: top-k routing, slots of a fixed capacity, and the way there and back.

Shapes: S tokens of a microbatch or of a group of it, flattened; E experts; J experts that a token chooses; C slots of
an expert; D hidden.

Tokens take an expert's slots in their own order, the earlier token first; who finds none is dropped by that expert.
Slots are a partial permutation of the S x J choices, so both ways, and their cotangents, are gathers: no sum depends on
the order in which a device adds, and nothing of size S x E x C is ever made.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from fp4jax.layout import by_batch_shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choices:
    """What a router says of every token.

    Attributes:
      experts: the chosen ones, the likeliest first; E, which is none of them, for a token that is padding.
      weights: what their outputs are multiplied with.
      probabilities: of all experts; zero for padding.
    """

    experts: Int32[Array, "S J"]
    weights: Float32[Array, "S J"]
    probabilities: Float32[Array, "S E"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Where choices and slots meet.

    Attributes:
      choice: the choice (token x J + rank) that each slot holds; any one where the slot is empty.
      row_mask: whether a slot is taken. An expert's taken slots are its first ones.
      slot: the slot (expert x C + position) of each choice; any one where it was dropped.
      kept: whether a choice has a slot.
    """

    choice: Int32[Array, "E C"]
    row_mask: Bool[Array, "E C"]
    slot: Int32[Array, "S J"]
    kept: Bool[Array, "S J"]


def choose(
    logits_SxE: Float32[Array, "S E"], num_chosen: int, normalize: bool, real_S: Bool[Array, " S"] | None = None
) -> Choices:
    """Softmax, then the likeliest experts; of equal ones that with the smaller index.

    Args:
      normalize: whether the weights of a token's choices are made to sum to one (`norm_topk_prob`).
      real_S: False for padding, which chooses nothing; None: all tokens are real.
    """
    if real_S is not None:
        # Before the softmax, so that not even a NaN in padding has a gradient.
        logits_SxE = jnp.where(real_S[:, None], logits_SxE, 0.0)
    probabilities_SxE = jax.nn.softmax(logits_SxE, axis=-1)
    experts_SxJ = _likeliest(lax.stop_gradient(probabilities_SxE), num_chosen)
    weights_SxJ = jnp.take_along_axis(probabilities_SxE, experts_SxJ, axis=1, mode="promise_in_bounds")
    if normalize:
        weights_SxJ = weights_SxJ / jnp.sum(weights_SxJ, axis=-1, keepdims=True)
    if real_S is not None:
        experts_SxJ = jnp.where(real_S[:, None], experts_SxJ, logits_SxE.shape[1])
        probabilities_SxE = jnp.where(real_S[:, None], probabilities_SxE, 0.0)
    return Choices(experts_SxJ, weights_SxJ, probabilities_SxE)


def _likeliest(probabilities_SxE, num_chosen):
    # By the devices that have the tokens: the compiler would gather what it takes the largest of.
    return by_batch_shard(lambda rows: lax.top_k(rows, num_chosen)[1], probabilities_SxE)


def assign_slots(experts_SxJ: Int32[Array, "S J"], num_experts: int, capacity: int) -> Slots:
    """Gives every expert's slots to the first `capacity` tokens that chose it; who chose `num_experts` gets none."""
    choices = experts_SxJ.size
    expert_of = experts_SxJ.reshape(-1)
    by_expert = jnp.argsort(expert_of, stable=True).astype(jnp.int32)
    ends_E = jnp.searchsorted(expert_of[by_expert], jnp.arange(num_experts, dtype=jnp.int32), side="right")
    ends_E = ends_E.astype(jnp.int32)
    starts_E = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_E[:-1]])
    positions_C = jnp.arange(capacity, dtype=jnp.int32)
    row_mask_ExC = positions_C[None, :] < (ends_E - starts_E)[:, None]
    choice_ExC = by_expert[jnp.minimum(starts_E[:, None] + positions_C[None, :], choices - 1)]
    rank = jnp.zeros(choices, jnp.int32).at[by_expert].set(jnp.arange(choices, dtype=jnp.int32), unique_indices=True)
    real, expert_of = expert_of < num_experts, jnp.minimum(expert_of, num_experts - 1)
    position = rank - starts_E[expert_of]
    slot = expert_of * capacity + jnp.minimum(position, capacity - 1)
    kept, shape = real & (position < capacity), experts_SxJ.shape
    return Slots(choice_ExC, row_mask_ExC, slot.reshape(shape), kept.reshape(shape))


@jax.custom_vjp
def dispatch(x_SxD: Float[Array, "S D"], slots: Slots) -> Float[Array, "E C D"]:
    """Every slot's token; empty slots are zero."""
    return _take(x_SxD, slots.choice // slots.slot.shape[1], slots.row_mask)


@jax.custom_vjp
def collect(y_ExCxD: Float[Array, "E C D"], slots: Slots) -> Float[Array, "S J D"]:
    """Every choice's row; those of dropped choices are zero."""
    return _take(y_ExCxD.reshape(-1, y_ExCxD.shape[-1]), slots.slot, slots.kept)


def _dispatch_backward(slots, g_ExCxD):
    of_choices = collect(g_ExCxD, slots).astype(jnp.float32)
    return jnp.sum(of_choices, axis=1).astype(g_ExCxD.dtype), None


def _collect_backward(slots, g_SxJxD):
    return _take(g_SxJxD.reshape(-1, g_SxJxD.shape[-1]), slots.choice, slots.row_mask), None


dispatch.defvjp(lambda x, slots: (dispatch(x, slots), slots), _dispatch_backward)
collect.defvjp(lambda y, slots: (collect(y, slots), slots), _collect_backward)


def _take(rows, index, mask):
    return jnp.where(mask[..., None], rows.at[index].get(mode="promise_in_bounds"), jnp.zeros((), rows.dtype))


def combine(y_ExCxD: Float[Array, "E C D"], weights_SxJ: Float32[Array, "S J"], slots: Slots) -> Float32[Array, "S D"]:
    """Every token's sum of its experts' outputs by their weights, in float32; a dropped choice adds nothing."""
    return jnp.sum(collect(y_ExCxD, slots).astype(jnp.float32) * weights_SxJ[..., None], axis=1)


def routing_sums(choices: Choices, slots: Slots) -> dict[str, Float32[Array, "..."]]:
    """What is known of one layer's routing, as sums that microbatches may add up.

    Returns:
      choices: [E] how often each expert was chosen, dropped ones included; probability: [E] the router's, summed over
      tokens; dropped: choices without a slot. Padding counts nowhere.
    """
    num_experts = choices.probabilities.shape[1]
    chosen = jnp.sort(choices.experts.reshape(-1))
    ends_E = jnp.searchsorted(chosen, jnp.arange(num_experts, dtype=jnp.int32), side="right")
    return {
        "choices": jnp.diff(ends_E, prepend=0).astype(jnp.float32),
        "probability": jnp.sum(choices.probabilities, axis=0),
        "dropped": jnp.sum(~slots.kept & (choices.experts < num_experts), dtype=jnp.float32),
    }


def load_balancing_loss(
    choices: Float32[Array, "*layers E"], probability: Float32[Array, "*layers E"], num_chosen: int
) -> Float32[Array, "*layers"]:
    """E x sum over experts of (choices a token) x (mean probability): `num_chosen` where all experts are alike.

    Switch Transformer's loss (arXiv 2101.03961, equations 4-6), for every layer by itself. The gradient flows through
    the probabilities. Hugging Face's Qwen3-MoE takes it of the sums over all layers, which is blind to layers that are
    lopsided in different ways; each layer has its own slots to fill, so ours are not added before.

    Args:
      choices, probability: as in `routing_sums`.
    """
    tokens = jnp.maximum(jnp.sum(choices, axis=-1, keepdims=True), 1) / num_chosen  # all may be padding
    return choices.shape[-1] * jnp.sum((choices / tokens) * (probability / tokens), axis=-1)
