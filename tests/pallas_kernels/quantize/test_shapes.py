"""The list of shapes is what the models' configurations give."""

import pytest

from configs import averis_moe_7b_a1p5b, qwen3_0p6b
from fp4jax.models.qwen3_moe import Qwen3MoEConfig
from pallas_kernels.quantize import shapes

CONFIGS = {"0p6b": qwen3_0p6b, "7b_a1p5b": averis_moe_7b_a1p5b}
ALL = (*shapes.SHAPES, *shapes.EXPERT_SHAPES, *shapes.WEIGHT_SHAPES)


def linears(model):
    """(inputs, outputs, experts) of every linear layer of a block."""
    c = CONFIGS[model].get_config().model
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention = [(c.hidden_size, queries), (c.hidden_size, keys), (queries, c.hidden_size)]
    mlp = [(c.hidden_size, c.intermediate_size), (c.intermediate_size, c.hidden_size)]
    experts = c.moe.num_experts if c.name == "qwen3_moe" else 1
    return {(*sizes, 1) for sizes in attention} | {(*sizes, experts) for sizes in mlp}


@pytest.mark.parametrize("model", shapes.MODELS)
def test_weights_are_the_models(model):
    found = [s for s in shapes.WEIGHT_SHAPES if model in s.models]
    assert {(s.tokens, s.features, s.batch) for s in found} == linears(model)


@pytest.mark.parametrize("model", shapes.MODELS)
@pytest.mark.parametrize("tokens", shapes.TOKENS)
def test_activations_have_the_features_of_their_weights(model, tokens):
    """An operand's features are the inputs of a layer, or its outputs; experts have slots in place of tokens."""
    found = {s.array for s in (*shapes.SHAPES, *shapes.EXPERT_SHAPES) if model in s.models}
    want = {(tokens, size) for *sizes, experts in linears(model) if experts == 1 for size in sizes}
    want |= {(e, slots(tokens), size) for *sizes, e in linears(model) if e > 1 for size in sizes}
    assert want == {array for array in found if array[-2] == (tokens if len(array) == 2 else slots(tokens))}


def slots(tokens):
    """As the model counts them."""
    return Qwen3MoEConfig.from_config(CONFIGS["7b_a1p5b"].get_config().model).slots(tokens)


def test_slots_are_whole_blocks_as_the_model_counts_them():
    for tokens in (*shapes.TOKENS, 1000, 17):
        assert shapes.slots(tokens) == slots(tokens)


def test_names_are_of_one_shape_each():
    assert len({s.name for s in ALL}) == len(ALL)
    assert "64x10240x2048" in {s.name for s in ALL}


def test_scaled_down():
    small = shapes.scaled_down(shapes.EXPERT_SHAPES[-1], 16)
    assert small.array == (4, 40, 64) and small.operands == shapes.EXPERT_SHAPES[-1].operands
    assert shapes.scaled_down(shapes.SHAPES[-1], 8192).array == (1, 16)
