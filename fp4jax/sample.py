"""See what a model says: continue prompts.

    python -m fp4jax.sample --model=smollm2-135m --prompt="The capital of France is" [--recipe=averis]
    python -m fp4jax.sample --workdir=runs/averis_tiny --prompt="Fellow citizens" --temperature=0.8 --top_p=0.95

--prompt may be given several times: the prompts are one batch, and under a recipe they share means and scales. The text
of a prompt is encoded as it is; no chat template is put around it.
"""

import sys
import time

from absl import flags

from fp4jax.evaluation.subject import open_subject
from fp4jax.generation import Generator, Sampling
from fp4jax.training.command import run

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of train.py.")
MODEL = flags.DEFINE_string("model", None, "Instead of --workdir: smollm2-135m, or a model's file.")
PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue; may be given several times.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Most tokens of a continuation.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Divides the logits; 0 takes the most likely token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the so many most likely tokens; 0 for all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the most likely tokens of together this probability; 1 for all.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws: of tokens, and of a recipe that rounds stochastically.")
RECIPE = flags.DEFINE_string("recipe", None, "By default the one the run was trained with, bf16 for --model.")
POLICY = flags.DEFINE_string("policy", None, "Layers that get the recipe; by default the run's, or all.")


def main() -> None:
    prompts = PROMPT.value
    if not prompts:
        raise ValueError("--prompt is missing; it is the text to continue")
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
    subject = open_subject(
        workdir=WORKDIR.value, model=MODEL.value, recipe=RECIPE.value, policy=POLICY.value, batch_size=len(prompts),
        seed=SEED.value,
    )  # fmt: skip
    tokenizer = subject.tokenizer
    if "" in prompts:
        print("an empty --prompt is continued as what follows the end of a text", file=sys.stderr)
    encoded = [tokenizer.encode(prompt) or [tokenizer.end_of_text] for prompt in prompts]
    longest = max(map(len, encoded))
    if longest + MAX_TOKENS.value > subject.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and --max_tokens={MAX_TOKENS.value} exceed the {subject.max_length} tokens "
            "that the model takes: shorten one of them"
        )
    generate = Generator(subject.frozen, tokenizer.end_of_text, sampling, SEED.value, subject.mesh)
    start = time.perf_counter()
    found = generate(encoded, MAX_TOKENS.value)
    seconds = time.perf_counter() - start
    for prompt, tokens in zip(prompts, found, strict=True):
        print(f"{prompt}{tokenizer.decode(tokens)}\n")
    count = sum(map(len, found))
    print(f"{count} tokens in {seconds:.1f} s with compilation; {subject.about['layers']}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main))
