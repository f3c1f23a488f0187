"""What Hugging Face calls things: the keys of a `config.json` and the tensors of a model, and ours for them.

A new model is a row of ARCHITECTURES. Tensors need no table: our paths are theirs, but that ours are stacked over
layers (and experts), and that a kernel is [inputs, outputs] here and [outputs, inputs] there.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fp4jax.models.llama import LlamaConfig
from fp4jax.models.qwen3 import Qwen3Config
from fp4jax.models.qwen3_moe import Qwen3MoEConfig
from fp4jax.models.registry import name_of

SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
"""Our hyperparameter → its key in `config.json`."""

_OF_EXPERTS = {
    "intermediate_size": "moe_intermediate_size",
    "num_experts": "num_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "norm_topk_prob": "norm_topk_prob",
    "router_loss_coefficient": "router_aux_loss_coef",
}

_MAY_BE_ZERO = ("router_loss_coefficient",)

ROPE_THETA = "rope_theta"

FIXED = {"hidden_act": "silu", "attention_bias": False}
"""What our models are, by the keys that would say otherwise. A file without a key does not."""

# The same, of keys that some models alone have: they are checked and not written.
_CHECKED = {"mlp_bias": False, "use_sliding_window": False, "partial_rotary_factor": 1.0}
# Ours → theirs, where a part of a path differs by more than the axes it is stacked over.
_RENAMED = {"layers.": "layers.{}.", "experts.": "experts.{}.", "mlp.router": "mlp.gate"}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model as Hugging Face has it.

    Attributes:
      class_name: of the model in `transformers`.
      config: our hyperparameters of it.
      settings: our hyperparameter → key.
      fixed: key → the one value of it that our model has.
    """

    class_name: str
    config: type[Qwen3Config]
    settings: Mapping[str, str] = dataclasses.field(default_factory=lambda: SETTINGS)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=lambda: FIXED)

    def read(self, content: Mapping[str, Any], dtype: str) -> tuple[Qwen3Config | None, list[str]]:
        """The hyperparameters in a `config.json`, for activations of `dtype`; None with what is wrong."""
        content = _with_defaults(content)
        problems = [
            f"{key}={content[key]!r}, supported: {value!r}"
            for key, value in {**self.fixed, **_CHECKED}.items()
            if content.get(key, value) not in (value, None)
        ]
        layers = content.get("layer_types") or []
        others = [layer for layer in layers if layer != "full_attention"] if isinstance(layers, list) else [layers]
        if others:
            shown = sorted({repr(layer) for layer in others})
            problems.append(f"layer_types has {', '.join(shown)}, supported: 'full_attention'")
        theta, rope_problems = _read_rope(content)
        values: dict[str, Any] = {"rope_theta": theta}
        kinds = {field.name: field.type for field in dataclasses.fields(self.config)}
        for ours, key in self.settings.items():
            value, kind = content.get(key), kinds[ours]
            if value is None:
                problems.append(f"no {key!r} in config.json")
            elif not _is_a(value, kind, least_is_zero=ours in _MAY_BE_ZERO):
                range_of = f"{kind.__name__} of 0 or more" if ours in _MAY_BE_ZERO else f"positive {kind.__name__}"
                problems.append(f"{key}={value!r} in config.json, expected a {'bool' if kind is bool else range_of}")
            else:
                values[ours] = kind(value)  # JSON writes 0 for 0.0
        problems += rope_problems
        if problems:
            return None, problems
        try:
            return self.config(**values, dtype=dtype), []
        except ValueError as error:
            return None, [str(error)]

    def write(self, config: Qwen3Config, model_type: str) -> dict[str, Any]:
        """The hyperparameters as keys of a `config.json`, of `transformers` before 5 (rope_theta) and since."""
        settings = {key: getattr(config, ours) for ours, key in self.settings.items()}
        theta = float(config.rope_theta)
        return {
            "architectures": [self.class_name],
            "model_type": model_type,
            **settings,
            **self.fixed,
            ROPE_THETA: theta,
            "rope_parameters": {"rope_type": "default", ROPE_THETA: theta},
        }


ARCHITECTURES = {
    "qwen3": Architecture("Qwen3ForCausalLM", Qwen3Config),
    "llama": Architecture("LlamaForCausalLM", LlamaConfig),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        Qwen3MoEConfig,
        SETTINGS | _OF_EXPERTS,
        # Layers without experts among those with are not supported: all are scanned as one stack.
        FIXED | {"mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
}
"""`model_type` of a `config.json` → what it is. Ours are registered under the same names."""


def config_json(config: Qwen3Config) -> dict[str, Any]:
    """What a `config.json` says of the hyperparameters."""
    model_type = name_of(config)
    return ARCHITECTURES[model_type].write(config, model_type)


def _with_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """With what files leave out: Llama's head_dim and key/value heads follow from the others, older ones without them;
    Qwen3-MoE's num_experts has another name since transformers 5.
    """
    content = dict(content)
    if content.get("model_type") == "qwen3_moe" and content.get("num_experts") is None:
        content["num_experts"] = content.get("num_local_experts")
    if content.get("tie_word_embeddings") is None:
        content["tie_word_embeddings"] = False
    if content.get("model_type") == "llama":
        heads, hidden = content.get("num_attention_heads"), content.get("hidden_size")
        if content.get("num_key_value_heads") is None:
            content["num_key_value_heads"] = heads
        if content.get("head_dim") is None and _is_a(heads, int) and _is_a(hidden, int):
            content["head_dim"] = hidden // heads
    return content


def _read_rope(content: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """(theta, problems): from "rope_theta" or, since transformers 5, from "rope_parameters"."""
    theta = content.get(ROPE_THETA)
    problems = []
    for key in ("rope_scaling", "rope_parameters"):
        rope = content.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            return None, [f"{key}={rope!r} in config.json"]
        theta = rope.get(ROPE_THETA, theta)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            problems.append(f"rotary positions scaled by {kind!r} ({key}), supported: 'default'")
    if not _is_a(theta, float):
        problems.append(f"no {ROPE_THETA!r} in config.json" if theta is None else f"{ROPE_THETA}={theta!r}")
    return theta, problems


def _is_a(value: object, kind: type, least_is_zero: bool = False) -> bool:
    """Whether it is one, and, of numbers, positive (or zero)."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind) and (value > 0 or (least_is_zero and value == 0))


def stored_tensors(parameter: str, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str, tuple[int, ...]]]:
    """(index in a stacked parameter of ours, the tensor's name, its shape there) of every tensor in a parameter."""
    template = _template(parameter)
    stacked = template.count("{}")
    one = shape[stacked:][::-1] if is_kernel(parameter) else shape[stacked:]
    for index in np.ndindex(*shape[:stacked]):
        yield index, template.format(*index), one


def is_kernel(parameter: str) -> bool:
    """Whether it is [inputs, outputs] here and [outputs, inputs] there."""
    return parameter.endswith(".kernel")


def _template(parameter: str) -> str:
    """From "layers.mlp.up_proj.kernel" to "model.layers.{}.mlp.up_proj.weight"."""
    if parameter == "lm_head":
        return "lm_head.weight"
    if parameter == "embedding":
        return "model.embed_tokens.weight"
    path = parameter.removesuffix(".kernel").removesuffix(".weight")
    for ours, theirs in _RENAMED.items():
        path = path.replace(ours, theirs)
    return f"model.{path}.weight"
