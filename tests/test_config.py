import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from fp4jax import config_checks
from fp4jax.config import ConfigError, check_overrides, default_config, flatten, mesh_of, mesh_shape
from fp4jax.config_checks import validate
from fp4jax.numerics import splits

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def set_key(config, key, value):
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    with config.unlocked():
        config[name] = value


MOE = {"model__name": "qwen3_moe"}


def config_with(**overrides):
    config = default_config()
    for key, value in overrides.items():
        set_key(config, key.replace("__", "."), value)
    return config


def test_defaults_are_valid_and_locked():
    config = default_config()
    validate(config, device_count=1)
    with pytest.raises(AttributeError):
        config.unheard_of = 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stepz", 3, "unknown config key 'stepz'; did you mean 'steps'"),
        ("model.layers", 3, "unknown config key 'model.layers'; did you mean 'model.num_layers'"),
        ("recipe", None, "recipe=None is a NoneType; it takes a str"),
        ("steps", 0, "steps=0: must be at least 1"),
        ("batch_size", -8, "batch_size=-8: must be at least 1"),
        ("batch_size", 0, "batch_size=0: must be at least 1"),
        ("microbatches", 0, "microbatches=0: must be at least 1"),
        ("microbatches", 3, "batch_size=8 is not divisible by microbatches=3; use microbatches=1"),
        ("seq_len", 100, "seq_len=100 is not a multiple of 16 (tokens that share a scale); use 96 or 112"),
        ("seq_len", 8, "seq_len=8 is not a multiple of 16 (tokens that share a scale); use 16"),
        ("seed", -1, "seed=-1: must be 0 or more"),
        ("seed", 2**31, "seed=2147483648: must be below 2^31"),
        ("backend", "cuda", "backend='cuda' is unknown; accepted: auto, xla, pallas"),
        ("gemm", "fast", "gemm='fast' is unknown; accepted: auto, native, emulated, fused"),
        ("model.remat", "some", "model.remat='some' is unknown; accepted: none, full, linear_inputs"),
        ("model.dtype", "float16", "model.dtype='float16' is unknown; accepted: bfloat16, float32"),
        ("model.num_kv_heads", 3, "model.num_heads=4 is not divisible by model.num_kv_heads=3"),
        ("model.head_dim", 63, "model.head_dim=63 is odd"),
        ("model.moe.groups", 0, "model.moe.groups=0: must be at least 1"),
        ("model.moe.num_experts", 0, "model.moe.num_experts=0: must be at least 1"),
        (
            "model.moe.num_experts",
            16,
            "num_experts=16 is for experts, which model.name='qwen3' does not have; use model",
        ),
        ("model.moe.router_loss_coefficient", -0.1, "model.moe.router_loss_coefficient=-0.1: must be 0 or more"),
        ("model.moe.capacity", 1.25, "model.moe.capacity=1.25 is a float; it takes a str"),
        ("optimizer.learning_rate", 0.0, "optimizer.learning_rate=0.0: must be greater than 0"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate=nan is not a finite number"),
        ("optimizer.b2", 1.0, "optimizer.b2=1.0: must be between 0 and 1"),
        ("optimizer.end_learning_rate_fraction", 1.5, "must be from 0 to 1"),
        ("optimizer.warmup_steps", -1, "optimizer.warmup_steps=-1: must be 0 or more"),
        ("data.validation_fraction", 0.0, "data.validation_fraction=0.0: must be between 0 and 1"),
        ("data.max_bad_fraction", 2.0, "data.max_bad_fraction=2.0: must be from 0 to 1"),
        ("checkpoint.every", 0, "checkpoint.every=0: must be at least 1"),
        ("checkpoint.asynchronous", 1, "checkpoint.asynchronous=1 is a int; it takes a bool"),
        ("log.every", True, "log.every=True is a bool; it takes a int"),
        ("on_nonfinite", "ignore", "on_nonfinite='ignore' is unknown; accepted: stop, skip, rollback"),
        ("checkpoint.keep_every", -1, "checkpoint.keep_every=-1: must be 0 or more"),
        ("checkpoint.keep_every", 300, "checkpoint.keep_every=300 is not a multiple of checkpoint.every=200"),
        ("divergence.rollback_steps", 0, "divergence.rollback_steps=0: must be at least 1"),
        ("divergence.max_events", -1, "divergence.max_events=-1: must be 0 or more"),
        ("divergence.spike", -1.0, "divergence.spike=-1.0: must be 0 or more"),
        ("watchdog.timeout", -1.0, "watchdog.timeout=-1.0: must be 0 or more"),
        ("watchdog.slow_step", 0.0, "watchdog.slow_step=0.0: must be greater than 0"),
        ("health.every", -1, "health.every=-1: must be 0 or more"),
        ("evaluation.batches", -1, "evaluation.batches=-1: must be 0 or more"),
    ],
)
def test_mistake_is_named_in_one_line(key, value, message):
    config = default_config()
    with config.ignore_type():
        set_key(config, key, value)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        validate(config)
    assert "\n" not in str(caught.value)


def test_missing_key_is_named():
    config = default_config()
    with config.unlocked():
        del config.model.rope_theta
    with pytest.raises(ConfigError, match="config key 'model.rope_theta' is missing"):
        validate(config)


@pytest.mark.parametrize(
    ("overrides", "devices", "message"),
    [
        (
            {"mesh__data": 3},
            2,
            "tensor=1 needs 3 devices and there are 2; set mesh.data=2",
        ),
        ({"mesh__fsdp": 4, "mesh__tensor": 4}, 8, "needs 16 devices and there are 8; set mesh.fsdp=2 or less"),
        ({"mesh__data": -1, "mesh__tensor": 3}, 8, "8 devices cannot be divided by 3; set mesh.tensor=1"),
        ({"mesh__data": -1, "mesh__fsdp": -1}, 8, "only one axis may be -1; set mesh.fsdp"),
        ({"mesh__data": 0}, 8, "mesh.data=0: a mesh axis is at least 1"),
        ({"mesh__data": 4, "batch_size": 6}, 8, "x mesh.fsdp=1 x mesh.expert=1; use batch_size=8"),
        ({"mesh__data": 4, "microbatches": 4}, 8, "batch_size=8 / microbatches=4 gives 2 sequences"),
        ({"mesh__fsdp": 8, "backend": "pallas", "model__hidden_size": 320}, 8, "shards of whole blocks of 16"),
        ({"mesh__tensor": 4}, 8, "model.num_kv_heads=2 is not divisible by mesh.tensor=4; use mesh.tensor=2"),
        ({"mesh__tensor": 2, "model__num_heads": 3, "model__num_kv_heads": 3}, 8, "model.num_heads=3"),
        ({"mesh__tensor": 2, "model__intermediate_size": 63}, 8, "model.intermediate_size=63"),
        ({"mesh__tensor": 2, "model__vocab_size": 4097}, 8, "model.vocab_size=4097"),
        (
            {"mesh__tensor": 2, "model__sequence_sharding": True, "seq_len": 48},
            8,
            "seq_len=48 is not a multiple of 32, a block of 16 tokens for each of mesh.tensor=2 with "
            "model.sequence_sharding; use seq_len=32 or 64 or a smaller mesh.tensor",
        ),
        (
            {"mesh__tensor": 2, "model__sequence_sharding": True, "seq_len": 16},
            8,
            "use seq_len=32 or a smaller mesh.tensor",
        ),
        (
            {"mesh__tensor": 3, "model__sequence_sharding": True, "seq_len": 96, "model__num_heads": 3}
            | {"model__num_kv_heads": 3, "model__vocab_size": 4098},
            3,
            "mesh.tensor=3: with model.sequence_sharding a power of two of devices, 64 at most, share a sequence; "
            "use mesh.tensor=2 or model.sequence_sharding=False",
        ),
        ({"mesh__fsdp": 2, "model__hidden_size": 255}, 8, "model.hidden_size=255 is not divisible by mesh.fsdp=2"),
        ({"mesh__expert": 2}, 8, "mesh.expert=2 is for experts, which model.name='qwen3' does not have"),
        (MOE | {"mesh__expert": 4, "model__moe__num_experts": 6}, 8, "divisible by mesh.expert=4; use mesh.expert=2"),
        (
            MOE | {"mesh__fsdp": 2, "mesh__expert": 4, "model__hidden_size": 252},
            8,
            "x mesh.expert=4; use mesh.expert=2",
        ),
        (MOE | {"mesh__expert": 4, "batch_size": 6}, 8, "mesh.fsdp=1 x mesh.expert=4; use batch_size=8 or a smaller"),
        (
            MOE | {"model__moe__groups": 3},
            1,
            "model.moe.groups=3 does not divide the 8 sequences of a microbatch; use model.moe.groups=1 or another",
        ),
        (
            MOE | {"model__moe__groups": 2, "mesh__fsdp": 2, "mesh__expert": 4},
            8,
            "model.moe.groups=2 for mesh.data=1 x mesh.fsdp=2 x mesh.expert=4: every device needs whole groups; "
            "use model.moe.groups=8 or, which gathers all tokens, 1",
        ),
    ],
)
def test_mesh_that_does_not_fit(overrides, devices, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(config_with(**overrides), device_count=devices)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_groups_that_fit_a_mesh(groups):
    """One group is no group: any mesh may split it."""
    config = config_with(**MOE, model__moe__groups=groups, mesh__fsdp=2, mesh__expert=2)
    validate(config, device_count=4)


def test_advice_of_the_batch_error_is_accepted():
    config = config_with(mesh__data=4, batch_size=6, microbatches=2)
    with pytest.raises(ConfigError) as caught:
        validate(config, device_count=4)
    config.batch_size = int(re.search(r"use batch_size=(\d+)", str(caught.value)).group(1))
    validate(config, device_count=4)


@pytest.mark.parametrize(
    ("mesh", "devices", "expected"),
    [((1, 1, 1), 8, (1, 1, 1)), ((-1, 1, 1), 8, (8, 1, 1)), ((2, -1, 2), 8, (2, 2, 2)), ((1, 2, -1), 2, (1, 2, 1))],
)
def test_mesh_shape(mesh, devices, expected):
    axes = ("data", "fsdp", "tensor")
    sizes = mesh_of(**dict(zip(axes, mesh, strict=True)))
    assert mesh_shape(sizes, devices) == mesh_of(**dict(zip(axes, expected, strict=True)))


def test_overrides_are_checked_before_they_are_parsed():
    check_overrides(
        ["--config=x.py", "--config.steps=3", "--config.model.num_layers", "2", "--workdir=w", "-config.seed=1"]
    )
    for argument in ("--config.stepz=3", "--config.model.depth=1", "-config.nothing", "--config.steps.more=1"):
        with pytest.raises(ConfigError, match="unknown config key"):
            check_overrides([argument])


def test_no_token_chooses_more_experts_than_there_are():
    config = config_with(model__name="qwen3_moe", model__moe__num_experts=4)
    validate(config)
    config.model.moe.num_experts_per_token = 5
    with pytest.raises(
        ConfigError, match="num_experts_per_token=5 of model.moe.num_experts=4; use num_experts_per_tok"
    ):
        validate(config)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_is_valid(path):
    config = load(path).get_config()
    validate(config, device_count=8 if config.mesh.data == -1 else 1)


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem != "qwen3_0p6b"], ids=lambda path: path.stem)
def test_shipped_config_is_a_claim(path):
    text = inspect.getdoc(load(path))
    for heading in ("Command:", "Hardware:", "Time:", "Expect:"):
        assert heading in text
    assert f"configs/{path.name}" in text


def test_0p6b_configs_differ_in_the_recipe_alone():
    configs = {path.stem: flatten(load(path).get_config()) for path in CONFIGS if path.stem.endswith("_0p6b")}
    assert len(configs) == 6
    recipes = {name: config.pop("recipe") for name, config in configs.items()}
    reference = configs.pop("qwen3_0p6b")
    assert all(config == reference for config in configs.values())
    del recipes["qwen3_0p6b"]
    assert all(name == f"{recipe}_0p6b" for name, recipe in recipes.items())


def test_0p6b_runs_with_a_batch_of_one():
    config = load(CONFIGS[0].parent / "averis_0p6b.py").get_config()
    assert config.microbatches == 16
    config.batch_size, config.seq_len, config.steps = 1, 128, 2
    validate(config, device_count=1)
    assert config.microbatches == 1


def test_stretches_are_those_of_the_means():
    assert config_checks.MOST_STRETCHES == splits.MOST_STRETCHES
