"""What the documentation shows is what happens: doctests, errors, generated tables."""

import doctest
import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fp4jax

ROOT = Path(fp4jax.__file__).parent.parent
DOCS = ROOT / "docs"
WITHOUT_EXAMPLE = {"Prepared", "Format", "QTensor"}  # made by `prepare`, the formats' table and `quantize`
DATA = {f"fp4jax.data.{name}" for name in ("tokenizers", "shards", "documents", "packing", "statistics", "held_out")}


def defining_module(name: str) -> str:
    """Of a public function or class; packages gather theirs from modules."""
    return getattr(fp4jax, name).__module__


CALLABLE = {name for name in fp4jax._DEFINED_IN if callable(getattr(fp4jax, name))}
MODULES = {defining_module(name) for name in CALLABLE - WITHOUT_EXAMPLE} | DATA | {"fp4jax.linen", "fp4jax.nnx"}


@pytest.mark.parametrize("name", sorted(CALLABLE - WITHOUT_EXAMPLE))
def test_every_public_function_has_an_example(name):
    assert ">>> " in getattr(fp4jax, name).__doc__


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", sorted(MODULES))
def test_docstrings_are_true(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0 and result.attempted > 0


def errors():
    """(heading, code, message) of every entry of docs/errors.md, and the code they all start with."""
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    start, *entries = re.split(r"^## ", text, flags=re.MULTILINE)
    found = []
    for entry in entries:
        code, message = (re.search(rf"```{kind}\n(.*?)\n```", entry, re.DOTALL) for kind in ("python", "text"))
        if code and message:
            found.append((entry.splitlines()[0], code[1], message[1]))
    return re.search(r"```python\n(.*?)```", start, re.DOTALL)[1], found


RUN = """
import json, sys
setup, entries = json.load(sys.stdin)
names = {}
exec(setup, names)
for code in entries:
    try:
        exec(code, names)
        print("no error")
    except Exception as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}")
"""


def test_errors_are_as_documented():
    """In a process of its own, without the type checks that tests put in front of the library's own."""
    setup, entries = errors()
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    assert len(entries) == page.count("```text\n") >= 14
    text = json.dumps([setup, [code for _, code, _ in entries]])
    run = subprocess.run([sys.executable, "-c", RUN], input=text, capture_output=True, text=True, cwd=ROOT, check=True)
    said = dict(zip([heading for heading, _, _ in entries], run.stdout.splitlines(), strict=True))
    assert said == {heading: message for heading, _, message in entries}


def test_recipe_tables_are_current():
    page = runpy.run_path(str(ROOT / "scripts" / "make_recipe_tables.py"))["page"]()
    assert (DOCS / "recipe_tables.md").read_text(encoding="utf-8") == page, "run scripts/make_recipe_tables.py"


def test_which_recipe_shows_the_ledgers_figures():
    """Every row of the page's table stands in that of RESULTS.md, with the same two losses."""

    def rows(text):
        lines = [line for line in text.splitlines() if line.startswith("| `")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {row[0]: row[1:] for row in cells}

    _, _, table = (ROOT / "RESULTS.md").read_text(encoding="utf-8").partition("<!-- table: ptq -->")
    ledger = rows(table.partition("<!-- end of table -->")[0])
    page = rows((DOCS / "which_recipe.md").read_text(encoding="utf-8"))
    assert len(page) >= 8
    for name, (everything, activations) in page.items():
        assert (ledger[name][0], ledger[name][3]) == (everything, activations), name
