"""What docs/errors.md says is refused, caused: a function for every row of its tables, in the files beside this one.

Each function is given a `Place`, writes below `folder` what the row's first column says, and returns the call that is
refused. What it asks the library to write goes to `out`. The call may change neither: a test compares both.
"""

import dataclasses
import io
import json
import pathlib
from collections.abc import Callable

import numpy as np
from rich.console import Console

from fp4jax import models
from fp4jax.checkpoint import Checkpointer
from fp4jax.config import default_config
from fp4jax.data import open_dataset
from fp4jax.data.prepare.inputs import find_units
from fp4jax.data.prepare.options import Options
from fp4jax.data.prepare.run import prepare
from fp4jax.data.tokenizers import load_tokenizer
from fp4jax.models.pretrained import parameter_shapes

OPTIONS = Options(
    tokenizer="embedded", text_key="text", validation_fraction=0.2, record_tokens=16, min_characters=1,
    max_characters=100_000, max_mojibake=0.01, language="any", min_language_share=0.65,
)  # fmt: skip
LINES = b"".join(json.dumps({"text": f"Fellow citizens, number {i} of them"}).encode() + b"\n" for i in range(60))


@dataclasses.dataclass(frozen=True)
class Place:
    """Folders of one case."""

    folder: pathlib.Path
    out: pathlib.Path

    def shard(self, content: bytes, name: str = "a.jsonl") -> str:
        """Writes a shard."""
        path = self.folder / "shards" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return str(path)

    def open(self, source: str, **changes):
        """Opens the training data of a source."""
        config = default_config().data
        config.update({"source": source, "validation_fraction": 0.2} | changes)
        return open_dataset(config, seq_len=16, batch_size=2, seed=0)

    def prepared(self, folder: pathlib.Path | None = None, workers: int = 1, **changes) -> str:
        """Prepares a shard into a set."""
        options = dataclasses.replace(OPTIONS, **changes)
        units = find_units(self.shard(LINES), "train", None)
        target = folder or self.folder / "set"
        prepare(units, target, options, workers=workers, max_bad_fraction=0.0, console=Console(file=io.StringIO()))
        return str(target)

    def run(self, tokenizer: str = "embedded", **more) -> pathlib.Path:
        """A run that saved its third step; `more` are options that this version does not have."""
        config = default_config()
        sizes = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "intermediate_size": 16, "hidden_size": 16}
        config.model.update(sizes | {"num_layers": 1})
        config.data.tokenizer = tokenizer
        with config.unlocked():
            config.update(more)
        shapes = parameter_shapes(models.Qwen3Config.from_config(config.model))
        position = {"next_batch": 3, "tokenizer": load_tokenizer(tokenizer).fingerprint}
        with Checkpointer(self.folder / "run") as checkpointer:
            params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
            checkpointer.save(3, params, {"step": np.int32(3)}, position, config)
        return self.folder / "run"


Call = Callable[[], object]
Case = Callable[[Place], Call]
CASES: dict[str, Case] = {}


def refused(what: str) -> Callable[[Case], Case]:
    """Names the row that a function is the cause of."""

    def add(case: Case) -> Case:
        assert what not in CASES, what
        CASES[what] = case
        return case

    return add
