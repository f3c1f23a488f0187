import json
import os
from html.parser import HTMLParser

import pytest

from fp4jax.comparison import report
from fp4jax.comparison.plan import Run
from fp4jax.comparison.records import from_json, load_record, smoothed, to_json
from tests.comparison.records import record

DECLARATION = {"baseline": "bf16", "primary": ["averis", "nvfp4"], "config": {"steps": 30}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("comparison")
    records = [
        *(record("bf16", seed, 5.0 + seed) for seed in (0, 1)),
        *(record("nvfp4", seed, 5.2 + seed, health={"gradient_cosine": 0.5}) for seed in (0, 1)),
        *(record("averis", seed, 5.1 + seed, seconds_per_step=None) for seed in (0, 1)),
        record("mxfp4", 0, None),
    ]
    report.write(path, records, DECLARATION, "python -m fp4jax.compare <all>", missing=1)
    return path


class Checker(HTMLParser):
    """Collects tags that are not closed and addresses that would be loaded."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        if tag != "meta":
            self.open.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.loaded += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]

    def handle_data(self, data):
        self.text += data


def test_html_is_whole_and_loads_nothing(folder):
    text = (folder / "report.html").read_text()
    page = Checker()
    page.feed(text.removeprefix("<!doctype html>"))
    assert page.open == [] and page.loaded == []
    assert text.count("<svg") == 4
    assert "python -m fp4jax.compare <all>" in page.text and "<all>" not in text


def test_markdown_says_what_was_found(folder):
    text = (folder / "report.md").read_text()
    gap = 100 * (0.1 / 5 + 0.1 / 6) / 2
    assert f"`averis`, +{gap:.2f} ± " in text
    assert "Diverged: `mxfp4` (seed 0)." in text and "1 runs are missing" in text
    assert (
        "Declared before the runs: the gap of `averis` is 1.833 percentage points smaller than that of `nvfp4`" in text
    )
    assert "| `mxfp4` |  | diverged |" in text
    for name in ("loss_gap", "gap_by_step", "validation_loss", "training_loss"):
        assert f"({name}.png)" in text and (folder / f"{name}.png").stat().st_size > 5000
    assert "| `nvfp4` | 0.5 |" in text  # health


def test_the_report_is_made_from_its_numbers_alone_and_never_half_written(folder, monkeypatch):
    replace, replaced = os.replace, []
    monkeypatch.setattr(os, "replace", lambda *names: (replaced.append(names[1].name), replace(*names)))
    before = {name: (folder / name).read_bytes() for name in ("report.md", "report.html", "loss_gap.png")}
    for name in before:
        (folder / name).unlink()
    report.redraw(folder)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert set(before) <= set(replaced)
    with pytest.raises(ValueError, match="make the comparison first"):
        report.redraw(folder / "elsewhere")


def test_records_survive_json():
    records = [record("bf16", 0, 5.0), record("nvfp4", 1, None, health={"gradient_cosine": None})]
    assert from_json(json.loads(json.dumps(to_json(records)))) == records


def test_smoothing_has_no_pull_of_its_start():
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smoothed([1.0, 2.0], weight=0.5) == pytest.approx([1.0, 5 / 3])


def test_a_report_without_the_baseline_yet(tmp_path):
    report.write(tmp_path, [record("nvfp4", 0, 5.0)], DECLARATION, "python -m fp4jax.compare", missing=3)
    assert "3 runs are missing" in (tmp_path / "report.md").read_text()


def test_steps_without_a_loss_and_runs_without_a_last_validation(tmp_path):
    run = Run("nvfp4", 0, tmp_path)
    made = to_json([record("nvfp4", 0, 5.0)])[0]
    facts = {key: made[key] for key in ("peak_memory_bytes", "peak_memory_of", "device", "jax")}
    (tmp_path / "summary.json").write_text(json.dumps(facts | {"diverged": None}))
    lines = [{"step": 1, "loss": 8.0, "tokens": 9.0}, {"step": 2, "tokens": 9.0, "skipped": 1.0}]
    lines.append({"step": 3, "loss": 7.0, "tokens": 9.0, "validation_loss": 7.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = load_record(run)
    assert (found.steps, found.losses, found.validation_loss) == ([1, 3], [8.0, 7.0], 7.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 6.0, "tokens": 9.0}) + "\n")
    with pytest.raises(ValueError, match="no validation loss at its last step; delete"):
        load_record(run)
