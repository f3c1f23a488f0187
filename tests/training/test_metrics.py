import json

from fp4jax.training.metrics import FILE, MetricsWriter, read_metrics


def write(workdir, start, *steps):
    with MetricsWriter(workdir, start) as writer:
        for step in steps:
            writer.write(step, {"loss": float(step)})


def test_a_resumed_run_has_every_step_once(tmp_path):
    write(tmp_path, 0, 1, 2, 3, 4)
    write(tmp_path, 2, 3, 4, 5)
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(i, float(i)) for i in range(1, 6)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_run_that_starts_anew_forgets_the_old_one(tmp_path):
    write(tmp_path, 0, 1, 2)
    write(tmp_path, 0, 1)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_a_line_that_a_killed_run_left_unfinished(tmp_path):
    write(tmp_path, 0, 1, 2)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, 2, 3)
    assert [json.loads(line)["step"] for line in (tmp_path / FILE).read_text().splitlines()] == [1, 2, 3]


def test_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []
