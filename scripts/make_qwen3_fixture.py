"""Make tests/models/fixtures/qwen3_*.npz: logits of the `transformers` Qwen3, to check ours against.

The fixtures are committed, so tests need neither torch nor transformers. To make them again (byte for byte the same
with the same versions), in a throw-away environment:

    python3.11 -m venv .venv-qwen3 && .venv-qwen3/bin/pip install torch==2.13.0 transformers==5.23.0 numpy
    .venv-qwen3/bin/python scripts/make_qwen3_fixture.py

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

# Every case breaks a different habit: head_dim is never hidden_size / num_attention_heads, sizes are odd where the
# architecture lets them be, and kv heads run from one (multi-query) to all (plain multi-head).
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
}  # fmt: skip


def build_model(case: dict, seed: int) -> torch.nn.Module:
    """A Qwen3 whose activations stay near unit scale and whose norm weights are far from one, so errors show."""
    case = dict(case)
    rope = {"rope_type": "default", "rope_theta": case.pop("rope_theta")}
    config = transformers.Qwen3Config(**case, rope_parameters=rope, attn_implementation="eager")
    model = transformers.Qwen3ForCausalLM(config).float().eval()
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
        model = build_model(case, seed)
        tokens = torch.randint(case["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(100 + seed))
        with torch.no_grad():
            logits = model(tokens).logits
        weights = {f"weight:{key}": value.detach().numpy() for key, value in model.named_parameters()}
        path = FIXTURES / f"{name}.npz"
        np.savez_compressed(
            path,
            config=np.array(json.dumps({"model_type": "qwen3", **case})),
            versions=np.array(json.dumps(versions)),
            tokens=tokens.numpy().astype(np.int32),
            logits=logits.numpy(),
            **weights,
        )
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, logits std {logits.std():.3f}")


if __name__ == "__main__":
    main()
