"""Every row of the tables in docs/errors.md, caused: one line, and nothing half-written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fp4jax.cli import describe
from fp4jax.data.corpus import FACTS
from tests.docs import refusals_of_commands, refusals_of_data, refusals_of_models  # noqa: F401  they fill CASES
from tests.docs.refusals import CASES, Case, Place

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.standard_promotion


def rows() -> dict[str, str]:
    """What is refused → what is said, of every table below "What is refused"."""
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").partition("\n## What is refused\n")[2]
    found = re.findall(r"^\| (.+?) \| (?:`` (.+) ``|`(.+)`) \|$", text.partition("\n## ")[0], re.MULTILINE)
    lines = [(what, with_ticks or plain) for what, with_ticks, plain in found]
    assert len(lines) == len(dict(lines)), "two rows of one name"
    return dict(lines)


def test_every_row_has_its_test_and_every_test_its_row():
    assert rows().keys() == CASES.keys()


def listing(folder: Path) -> dict[str, int | None]:
    """Path → bytes of everything below a folder; None of a folder."""
    return {str(path): path.stat().st_size if path.is_file() else None for path in folder.rglob("*")}


SLOW = {"a decompression bomb", "a line of 100 MB"}


@pytest.mark.parametrize(
    ("what", "case"),
    [pytest.param(what, case, id=what, marks=[pytest.mark.slow] * (what in SLOW)) for what, case in CASES.items()],
)
def test_it_is_refused_in_the_line_that_the_page_shows(what: str, case: Case, tmp_path, monkeypatch):
    # Beside what is compared: text that was read to its end stays tokenized, whatever is then refused of it.
    cache = tmp_path / "cache"
    monkeypatch.setenv("FP4JAX_CACHE", str(cache))
    place = Place(tmp_path / "place" / "folder", tmp_path / "place" / "out")
    place.folder.mkdir(parents=True)
    call = case(place)
    before = listing(place.folder.parent)
    with pytest.raises((ValueError, OSError)) as caught:
        call()
    assert "\n" not in str(caught.value)
    said = describe(caught.value)
    shown = ".+".join(map(re.escape, rows()[what].split("…")))
    assert re.fullmatch(f"error: {shown}", said), said
    assert listing(place.folder.parent) == before, "something was written"
    entries = [path for path in cache.glob("tokens/*") if path.suffix != ".lock"]
    assert all((path / FACTS).exists() for path in entries), "half an entry of the token cache"


COMMANDS = {
    "fp4jax.data.prepare": ["--source=/none", "--output=out"],
    "fp4jax.models.convert": ["/none", "--to=out"],
    "fp4jax.compare": ["--config=configs/averis_tiny.py", "--recipes=bf16", "--workdir=out"],
    "fp4jax.sample": ["--prompt=a", "--model=/none", "--recipe=averiz"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("module", "arguments"), COMMANDS.items(), ids=COMMANDS)
def test_commands_end_in_one_line_and_code_1(module, arguments, tmp_path):
    """train.py and eval.py are in tests/test_scripts.py."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def run(*more: str) -> subprocess.CompletedProcess:
        code = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = {module!r}; "
        code += f"runpy.run_module({module!r}, run_name='__main__')"
        command = [sys.executable, "-c", code, *arguments, *more]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    plain = run()
    assert plain.returncode == 1 and plain.stderr.startswith("error: ") and plain.stderr.count("\n") == 1, plain.stderr
    assert "Traceback" in run("--debug").stderr
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]
