import json

from fp4jax.training.metrics import FILE, HEALTH_FILE, MetricsWriter, read_metrics


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


def test_health_has_every_step_once_and_nothing_of_it_stands_in_the_metrics(tmp_path):
    for start, steps in ((0, (2, 4)), (2, (4, 6))):
        with MetricsWriter(tmp_path, start) as writer:
            for step in steps:
                writer.write(step, {"loss": 1.0})
                writer.write_health(
                    step, {"cosine/wgrad/mlp.up_proj": [0.5, None]}, {"loss_gap": float(start), "ratio": None}
                )
    lines = read_metrics(tmp_path, HEALTH_FILE)
    assert [(line["step"], line["loss_gap"]) for line in lines] == [(2, 0), (4, 2), (6, 2)]
    assert lines[0]["cosine/wgrad/mlp.up_proj"] == [0.5, None] and lines[0]["ratio"] is None
    assert read_metrics(tmp_path) == [{"step": step, "loss": 1.0} for step in (2, 4, 6)]
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"health/cosine/wgrad/mlp.up_proj" in events and b"health/loss_gap" in events
    assert b"health/ratio" not in events


def test_a_run_without_health_has_no_file_of_it(tmp_path):
    write(tmp_path, 0, 1)
    assert not (tmp_path / HEALTH_FILE).exists()
