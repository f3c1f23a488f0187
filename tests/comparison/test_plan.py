import pytest

from fp4jax.comparison.plan import Comparison
from fp4jax.config import ConfigError, default_config


def comparison(workdir, recipes=("bf16", "nvfp4"), seeds=(0, 1), baseline="bf16", primary=None, config=None):
    return Comparison(config or default_config(), recipes, seeds, baseline, primary, workdir)


def test_runs_differ_in_recipe_and_seed_alone(tmp_path):
    plan = comparison(tmp_path)
    runs = list(plan.runs())
    assert [(run.recipe, run.seed) for run in runs] == [("bf16", 0), ("nvfp4", 0), ("bf16", 1), ("nvfp4", 1)]
    assert len({run.folder for run in runs}) == 4
    values = [plan.config_of(run).to_dict() for run in runs]
    assert [(value.pop("recipe"), value.pop("seed")) for value in values] == [(run.recipe, run.seed) for run in runs]
    assert all(value == values[0] for value in values)
    assert plan.config.recipe == "averis"  # the given one is left alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipes": ("bf16",)}, "two recipes"),
        ({"recipes": ("bf16", "nvfp4", "nvfp4")}, "nvfp4 twice"),
        ({"seeds": (1, 1)}, "1 twice"),
        ({"seeds": ()}, "needs a seed"),
        ({"recipes": ("bf16", "fp3")}, "fp3"),
        ({"baseline": "fp8"}, "baseline 'fp8' is not among"),
        ({"primary": ("nvfp4", "averis")}, "takes two different recipes"),
        ({"primary": ("nvfp4", "nvfp4")}, "takes two different recipes"),
    ],
)
def test_plans_that_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path, **change)


def test_a_config_that_cannot_run_is_refused(tmp_path):
    config = default_config()
    config.seq_len = 30
    plan = comparison(tmp_path, config=config)
    with pytest.raises(ConfigError, match="seq_len=30"):
        plan.config_of(next(plan.runs()))


def test_what_was_declared_holds(tmp_path):
    comparison(tmp_path).declare()
    comparison(tmp_path, recipes=("bf16", "nvfp4", "averis"), seeds=(0, 1, 2)).declare()  # more of it
    config = default_config()
    config.update_from_flattened_dict({"log.every": 1, "checkpoint.every": 7})
    comparison(tmp_path, config=config).declare()  # how it is written down
    for change, message in (
        ({"baseline": "nvfp4"}, "baseline bf16 → nvfp4"),
        ({"primary": ("nvfp4", "bf16")}, "primary None"),
    ):
        with pytest.raises(ValueError, match=message):
            comparison(tmp_path, **change).declare()
    for key, value in (("steps", 7), ("batch_size", 16), ("on_nonfinite", "skip"), ("evaluation.batches", 0)):
        config = default_config()
        config.update_from_flattened_dict({key: value})
        with pytest.raises(ValueError, match=f"{key} .* → {value!r}; choose another"):
            comparison(tmp_path, config=config).declare()


def test_folders_and_files_of_something_else(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something that is no comparison; choose another --workdir"):
        comparison(tmp_path / "other").declare()
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]
    comparison(tmp_path / "mine").declare()
    for damaged in ("", '{"baseline": ', "[1]", '{"a": 1}'):
        (tmp_path / "mine" / "declaration.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"declaration.json is damaged \(.*\); restore it, or choose another"):
            comparison(tmp_path / "mine").declare()
