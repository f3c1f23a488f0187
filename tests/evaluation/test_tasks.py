"""The record of an evaluation: continued under the same settings, refused under others; the paper's table beside it."""

import json

import pytest

from fp4jax.evaluation import tasks
from fp4jax.evaluation.task_data import TASKS

METRICS = {"acc": {"value": 0.5, "stderr": 0.1}, "acc_norm": {"value": 0.25, "stderr": 0.05}}
TASK = {"metrics": METRICS, "documents": 20, "documents_in_set": 1172}


def record(names):
    return {"about": {"model": "some", "recipe": "averis"}, "tasks": dict.fromkeys(names, TASK)}


def test_the_table_has_the_papers_numbers_and_ours():
    lines = tasks.render(record(["piqa", "arc_challenge"])).splitlines()
    assert "recipe averis" in lines[0] and len(lines) == 5
    assert lines[3].split() == "arc_challenge 25.34 24.91 50.00 ± 10.00 25.00 ± 5.00 20 of 1,172".split()


def test_all_seven_have_a_mean_with_its_standard_error():
    mean = tasks.render(record(TASKS)).splitlines()[-1].split()
    assert mean == "mean 45.64 46.61 50.00 ± 3.78".split()  # the paper's own means; 10 / sqrt(7)


def run(path, names, scored, **settings):
    settings = {"recipe": "averis"} | settings
    return tasks.run_tasks(
        lambda: scored.append("opened") or Subject, names, path, settings=settings, show=scored.append
    )


class Subject:
    about = {"model": "some", "recipe": "averis"}


@pytest.fixture
def scoring(monkeypatch):
    """lm-eval is there, and scores without a model; `fails` makes a task fail."""
    fails = []

    def score(subject, names, folder, limit):
        for name in names:
            if name in fails:
                raise ValueError("interrupted")
            yield name, TASK | {"seconds": 1.0}

    monkeypatch.setattr(tasks, "_score", score)
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: object())
    return fails


def test_a_finished_task_is_not_repeated(tmp_path, scoring):
    path, scored = tmp_path / "new" / "record.json", []
    scoring.append("race")
    with pytest.raises(ValueError, match="interrupted"):
        run(path, ["piqa", "race"], scored)
    assert list(json.loads(path.read_text())["tasks"]) == ["piqa"]
    scoring.clear()
    run(path, ["piqa", "race"], scored)
    assert [line.split(":")[0] for line in scored] == ["opened", "piqa", "opened", "race"]
    run(path, ["piqa", "race"], scored)
    assert len(scored) == 4 and list(json.loads(path.read_text())["tasks"]) == ["piqa", "race"]


def test_other_settings_are_refused(tmp_path, scoring):
    path = tmp_path / "record.json"
    run(path, ["piqa"], [])
    with pytest.raises(ValueError, match="other settings .recipe averis → nvfp4.: give another --out"):
        run(path, ["piqa"], [], recipe="nvfp4")
    path.write_text("[]")
    with pytest.raises(ValueError, match="is no record of an evaluation"):
        run(path, ["piqa"], [])


def test_without_lm_eval_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="make eval-data, or pip install lm-eval=="):
        run(tmp_path / "record.json", ["piqa"], [])
    with pytest.raises(ValueError, match="limit=0"):
        tasks.run_tasks(lambda: None, ["piqa"], tmp_path / "record.json", settings={}, limit=0)
