"""Where a Hugging Face checkpoint of Qwen3-MoE keeps each parameter of ours.

A checkpoint holds a matrix [outputs, inputs] for every layer and expert; ours are [inputs, outputs], stacked over both.
Dense layers among the sparse ones (`mlp_only_layers`, `decoder_sparse_step` > 1) are not supported: all layers are
scanned as one stack. No published Qwen3-MoE has any.
"""

import dataclasses
from collections.abc import Mapping

from fp4jax.models.qwen3_moe import EXPERTS, LINEARS, Qwen3MoEConfig


@dataclasses.dataclass(frozen=True)
class Place:
    """A part of one of our parameters.

    Attributes:
      parameter: by dotted path, as `fp4jax.training` and checkpoints name it: "layers.mlp.experts.up_proj.kernel".
      index: along the parameter's leading axes: (layer, expert), (layer,) or ().
      transposed: whether the checkpoint's array is the transpose.
    """

    parameter: str
    index: tuple[int, ...] = ()
    transposed: bool = False


def places(config: Qwen3MoEConfig) -> dict[str, Place]:
    """Every array of the checkpoint by its name; together they fill all parameters, each part once."""
    found = {
        "model.embed_tokens.weight": Place("embedding"),
        "model.norm.weight": Place("norm.weight"),
    }
    if not config.tie_embeddings:
        found["lm_head.weight"] = Place("lm_head")
    for layer in range(config.num_layers):
        for name, place in _of_layer(config, layer):
            found[f"model.layers.{layer}.{name}.weight"] = place
    return found


def _of_layer(config: Qwen3MoEConfig, layer: int):
    for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
        yield norm, Place(f"layers.{norm}.weight", (layer,))
    yield "mlp.gate", Place("layers.mlp.router.kernel", (layer,), transposed=True)
    for linear in LINEARS:
        kernel = f"layers.{linear}.kernel"
        if linear not in EXPERTS:
            yield linear, Place(kernel, (layer,), transposed=True)
            continue
        for expert in range(config.num_experts):
            name = linear.replace("experts", f"experts.{expert}")
            yield name, Place(kernel, (layer, expert), transposed=True)


def moe_fields(hugging_face: Mapping[str, object]) -> dict[str, object]:
    """What a Hugging Face config.json says of experts, as fields of `Qwen3MoEConfig` (`intermediate_size` among them).

    Raises:
      ValueError: layers without experts among those with.
    """
    dense = hugging_face.get("mlp_only_layers") or []
    step = hugging_face.get("decoder_sparse_step", 1)
    if dense or step != 1:
        raise ValueError(
            f"mlp_only_layers={dense}, decoder_sparse_step={step}: dense layers among the sparse ones are not "
            "supported; only mlp_only_layers=[] with decoder_sparse_step=1 is"
        )
    return {
        "intermediate_size": hugging_face["moe_intermediate_size"],
        "num_experts": hugging_face["num_experts"],
        "num_experts_per_token": hugging_face["num_experts_per_tok"],
        "norm_topk_prob": hugging_face["norm_topk_prob"],
        "router_loss_coefficient": hugging_face["router_aux_loss_coef"],
    }
