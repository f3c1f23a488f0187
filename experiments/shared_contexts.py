"""How many tokens the downstream tasks put through a model, with a row for every answer and for every context.

    make models eval-data
    PYTHONPATH=. python experiments/shared_contexts.py --out=results/evaluation/tokens.json

Of the whole sets that `make eval-data` writes, with SmolLM2's tokenizer, padded as `eval.py --tasks` pads them.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate

from fp4jax import models
from fp4jax.cli import Parser, check_output_file, run
from fp4jax.evaluation.sharing import Pair, shared_rows
from fp4jax.evaluation.task_data import TASKS, check_files, open_task
from fp4jax.generation import bucket

MAX_LENGTH = 2048


class Listener(TemplateLM):
    """A model that keeps what it is asked."""

    def __init__(self, tokenizer: object):
        super().__init__()
        self._tokenizer, self.pairs = tokenizer, []

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence, **_: object) -> list[tuple[float, bool]]:
        self.pairs += [(context, continuation) for _, context, continuation in requests]
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = True) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: Sequence, disable_tqdm: bool = True) -> list[str]:
        raise NotImplementedError


def padded(pairs: Sequence[Pair], share: bool) -> int:
    """Tokens of all rows, padded."""
    return sum(bucket(len(row)) for row in shared_rows(pairs, MAX_LENGTH, share=share))


def main(arguments: Sequence[str]) -> None:
    """Writes what it counted."""
    parser = Parser("experiments/shared_contexts.py", __doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task_data", type=Path, default=Path("data/eval"))
    flags = parser.parse_args(arguments)
    check_output_file(flags.out, "--out")
    names = sorted(set(TASKS) - {"race"})
    check_files(names, flags.task_data)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    tokenizer, found = models.load_parameters("smollm2-135m").tokenizer, {}
    for name in names:
        listener = Listener(tokenizer)
        with open_task(name, flags.task_data) as task:
            evaluate(listener, task, bootstrap_iters=2, log_samples=False)
        rows = {
            "a row for every answer": padded(listener.pairs, False),
            "a row for every context": padded(listener.pairs, True),
        }
        found[name] = {"answers": len(listener.pairs), "padded_tokens": rows}
        print(name, found[name], flush=True)
    flags.out.write_text(json.dumps({"tasks": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
