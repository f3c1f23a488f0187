"""Make tests/models/fixtures/{qwen3,qwen3moe,llama}_*.npz: logits of the `transformers` models, to check ours against.

The fixtures are committed, so tests need neither torch nor transformers. To make them again (byte for byte the same
with the same versions), in a throw-away environment:

    python3.11 -m venv .venv-fixtures && .venv-fixtures/bin/pip install torch==2.13.0 transformers==5.23.0 numpy
    .venv-fixtures/bin/python scripts/make_model_fixtures.py [fixture ...]

Each file holds, for one small random model in float32:
    config      JSON, the keys of a Hugging Face config.json (rope_theta at the top level)
    weight:NAME float32, Hugging Face parameter names and layouts ([out_features, in_features] for linear layers), of
                experts those of a saved checkpoint, a matrix for each; a tied head is not stored twice
    tokens      int32 [2, 17]
    logits      float32 [2, 17, vocab_size]
    aux_loss    float32 [1 + num_hidden_layers], the load-balancing loss of the tokens, of all layers' sums and then of
                each layer alone; of models with experts
    versions    JSON, the versions of torch and transformers
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "models" / "fixtures"
BATCH, LENGTH = 2, 17

CLASSES = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}
# Every case breaks a different habit: head_dim is hidden_size / num_attention_heads in llama_gqa_tied alone, sizes are
# odd where the architecture lets them be, and kv heads run from one (multi-query) to all (plain multi-head). The
# vocabulary of a Llama has room for a byte-level tokenizer.
CASES = {
    "qwen3_gqa_tied": dict(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ),
    "qwen3_mqa_untied": dict(
        vocab_size=131, hidden_size=40, intermediate_size=56, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=1, head_dim=8, rope_theta=1e4, rms_norm_eps=1e-5, tie_word_embeddings=False,
    ),
    "qwen3_mha_untied": dict(
        vocab_size=61, hidden_size=33, intermediate_size=47, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=3, head_dim=10, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False,
    ),
    "llama_gqa_tied": dict(
        vocab_size=288, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
    "llama_mqa_untied": dict(
        vocab_size=288, hidden_size=40, intermediate_size=56, num_hidden_layers=3, num_attention_heads=5,
        num_key_value_heads=1, head_dim=16, rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=False,
    ),
    "qwen3moe_top2_untied": dict(
        vocab_size=97, hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False,
        moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
    ),
    "qwen3moe_top3_unnormalized": dict(
        vocab_size=61, hidden_size=33, intermediate_size=47, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, head_dim=10, rope_theta=1e4, rms_norm_eps=1e-5, tie_word_embeddings=True,
        moe_intermediate_size=17, num_experts=5, num_experts_per_tok=3, norm_topk_prob=False,
    ),
}  # fmt: skip


def build_model(model_type: str, case: dict, seed: int) -> torch.nn.Module:
    """A model whose activations stay near unit scale and whose norm weights are far from one, so errors show."""
    case = dict(case)
    rope = {"rope_type": "default", "rope_theta": case.pop("rope_theta")}
    config_class, model_class = CLASSES[model_type]
    config = config_class(**case, rope_parameters=rope, attn_implementation="eager", experts_implementation="eager")
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.25, 1.75, generator=generator)
            elif "embed_tokens" in name:
                parameter.normal_(0.0, 0.5, generator=generator)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
    return model


def weights_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """By parameter name; of a model with experts, which are one array in memory, by the names of a checkpoint."""
    if "Moe" not in type(model).__name__:
        return {name: value.detach().numpy() for name, value in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return dict(sorted(load_file(Path(folder) / "model.safetensors").items()))


def balance(output, case: dict) -> np.ndarray:
    counts = case["num_experts"], case["num_experts_per_tok"]
    layers = [load_balancing_loss_func((logits,), *counts) for logits in output.router_logits]
    return np.array([output.aux_loss, *layers], np.float32)


def main() -> None:
    FIXTURES.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for seed, (name, case) in enumerate(CASES.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        kind = name.partition("_")[0]
        model = build_model(kind, case, seed)
        tokens = torch.randint(case["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(100 + seed))
        routers = {"output_router_logits": True} if "num_experts" in case else {}
        with torch.no_grad():
            output = model(tokens, **routers)
        logits = output.logits
        weights = {f"weight:{key}": value for key, value in weights_of(model).items()}
        losses = {"aux_loss": balance(output, case)} if routers else {}
        path = FIXTURES / f"{name}.npz"
        np.savez_compressed(
            path,
            config=np.array(json.dumps({"model_type": CLASSES[kind][0].model_type, **case})),
            versions=np.array(json.dumps(versions)),
            tokens=tokens.numpy().astype(np.int32),
            logits=logits.numpy(),
            **losses,
            **weights,
        )
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, logits std {logits.std():.3f}")


if __name__ == "__main__":
    main()
