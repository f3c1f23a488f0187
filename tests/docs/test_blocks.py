"""The Python that pages show runs, in the pages' order, and prints what they say it prints."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fp4jax

ROOT = Path(fp4jax.__file__).parent.parent
# A block, and what it prints where that follows it.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)

# What a reader of pages that show a line of their own program has.
READERS_PROGRAM = """
import jax, jax.numpy as jnp, fp4jax
from flax import nnx as flax_nnx

rngs, key = flax_nnx.Rngs(0, fp4=1), jax.random.key(0)
model = flax_nnx.Sequential(flax_nnx.Linear(32, 16, rngs=rngs))
x = batch = jnp.ones((32, 64))
w = jnp.ones((64, 16))
params = {"w": w}

def loss(params, batch):
    return jnp.sum(batch @ params["w"])
"""

# A process of its own: without the suite's type checks, one device, JAX's usual promotion.
RUN = """
import contextlib, io, json, sys
program, blocks = json.load(sys.stdin)
names, printed = {"__name__": "__main__"}, []
exec(program, names)
for code in blocks:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "page, program",
    [
        ("docs/index.md", ""),
        ("docs/tutorial.md", ""),
        ("docs/your_recipe.md", ""),
        ("docs/your_kernel.md", ""),
        ("README.md", READERS_PROGRAM),
        ("docs/policies_and_schedules.md", READERS_PROGRAM),
        ("docs/recipes.md", READERS_PROGRAM),
        ("docs/report.md", READERS_PROGRAM),
        ("docs/your_model.md", READERS_PROGRAM),
    ],
)
def test_blocks_run(tmp_path, page, program):
    blocks, expected = zip(*BLOCK.findall((ROOT / page).read_text(encoding="utf-8")), strict=True)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{RUN}"]
    text = json.dumps([program, blocks])
    run = subprocess.run(command, input=text, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    printed = json.loads(run.stdout)
    assert [got for got, want in zip(printed, expected, strict=True) if want] == [want for want in expected if want]
