"""Make tests/models/fixtures/{qwen3,llama}_*.npz: logits of the `transformers` models, to check ours against.

The fixtures are committed, so tests need neither torch nor transformers. To make them again (byte for byte the same
with the same versions), in a throw-away environment:

    python3.11 -m venv .venv-fixtures && .venv-fixtures/bin/pip install torch==2.13.0 transformers==5.23.0 numpy
    .venv-fixtures/bin/python scripts/make_model_fixtures.py

Each file holds, for one small random model in float32:
    config      JSON, the keys of a Hugging Face config.json (rope_theta at the top level)
    weight:NAME float32, Hugging Face parameter names and layouts ([out_features, in_features] for linear layers);
                a tied head is not stored twice
    tokens      int32 [2, 17]
    logits      float32 [2, 17, vocab_size]
    versions    JSON, the versions of torch and transformers
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "models" / "fixtures"
BATCH, LENGTH = 2, 17

CLASSES = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
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
}  # fmt: skip


def build_model(model_type: str, case: dict, seed: int) -> torch.nn.Module:
    """A model whose activations stay near unit scale and whose norm weights are far from one, so errors show."""
    case = dict(case)
    rope = {"rope_type": "default", "rope_theta": case.pop("rope_theta")}
    config_class, model_class = CLASSES[model_type]
    model = model_class(config_class(**case, rope_parameters=rope, attn_implementation="eager")).float().eval()
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


def main() -> None:
    FIXTURES.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for seed, (name, case) in enumerate(CASES.items()):
        model_type = name.partition("_")[0]
        model = build_model(model_type, case, seed)
        tokens = torch.randint(case["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(100 + seed))
        with torch.no_grad():
            logits = model(tokens).logits
        weights = {f"weight:{key}": value.detach().numpy() for key, value in model.named_parameters()}
        path = FIXTURES / f"{name}.npz"
        np.savez_compressed(
            path,
            config=np.array(json.dumps({"model_type": model_type, **case})),
            versions=np.array(json.dumps(versions)),
            tokens=tokens.numpy().astype(np.int32),
            logits=logits.numpy(),
            **weights,
        )
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, logits std {logits.std():.3f}")


if __name__ == "__main__":
    main()
