"""The models that are measured, with their tokens: a pretrained one, or every checkpoint of a run."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int32

from fp4jax.checkpoint import Checkpointer, CheckpointError, saved_config
from fp4jax.config import default_config, mesh_of
from fp4jax.data.errors import DataError
from fp4jax.data.held_out import held_out_text
from fp4jax.data.pipeline import open_dataset
from fp4jax.models.pretrained import load_parameters
from fp4jax.models.qwen3 import Qwen3
from fp4jax.training.mesh import make_mesh
from fp4jax.training.optimizer import make_optimizer
from fp4jax.training.state import model_template, sharded_abstract_state

ROWS = 2  # of a chunk


@dataclasses.dataclass(frozen=True)
class Subject:
    """Attributes:
    name: of the model; a run's has the steps done.
    second_moments: Adam's nu by parameter, or None for a model without an optimizer state.
    """

    name: str
    model: Qwen3
    chunks: Int32[np.ndarray, "chunks B T"]
    second_moments: dict | None = None


def pretrained(model: str, tokens: int, seq_len: int) -> Subject:
    """A pretrained model on held-out text of the embedded corpus, `tokens` rounded up to whole chunks.

    Raises:
      ValueError: a model that cannot be loaded, or too little text.
    """
    loaded = load_parameters(model, dtype="float32")
    rows = ROWS * -(-tokens // (ROWS * seq_len))
    text = held_out_text(default_config().data, loaded.tokenizer, seq_len=seq_len, rows=rows)
    return Subject(model, loaded.model("bf16"), text.tokens.reshape(-1, ROWS, seq_len))


def checkpoints(workdir: Path, tokens: int, seq_len: int | None) -> Iterator[Subject]:
    """A run's kept checkpoints in order, on its validation split.

    Raises:
      CheckpointError: no checkpoint, or one that cannot be read.
      ValueError: data that cannot be read, or too little of it.
    """
    workdir = workdir.expanduser().absolute()
    found = saved_config(workdir)
    if found is None:
        raise CheckpointError(f"{workdir} holds no checkpoint; train with this --workdir first")
    config = default_config()
    config.update(found[1])
    config.policy, config.schedule, config.recipe, config.model.dtype = "all_linear", "", "bf16", "float32"
    config.mesh = mesh_of()
    config.seq_len = seq_len or config.seq_len
    chunks = _validation(config, tokens)
    template = model_template(config)
    optimizer = make_optimizer(config, template.logical_axes)
    target = sharded_abstract_state(template, optimizer, make_mesh(config.mesh, jax.devices()[:1]))
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(target.params))
    with Checkpointer(workdir, largest_array=largest, read_only=True) as checkpointer:
        for step in checkpointer.steps():
            saved = {"step": target.step, "opt_state": target.opt_state}
            params, rest, _ = checkpointer.restore(target.params, saved, step=step)
            nu = next(part.nu for part in rest["opt_state"] if hasattr(part, "nu"))
            yield Subject(f"{workdir.name} step {step}", template.merge(params), chunks, nu)


def _validation(config, tokens: int) -> Int32[np.ndarray, "chunks B T"]:
    count = -(-tokens // (ROWS * config.seq_len))
    dataset = open_dataset(
        config.data, seq_len=config.seq_len, batch_size=ROWS, seed=config.seed, split="validation"
    )  # fmt: skip
    if dataset.stats.rows < ROWS * count:
        raise DataError(
            f"the validation split holds {dataset.stats.rows:,} rows of {config.seq_len:,} tokens, {ROWS * count:,} "
            "were asked for; ask for fewer with --tokens"
        )
    with contextlib.closing(dataset.batches()) as iterator:
        return np.stack([batch["tokens"] for batch in itertools.islice(iterator, count)])
