"""What a configuration may hold: `validate` refuses what cannot run, before anything is compiled.

And what of it may change when a run goes on: `config_differences`.
"""

import math
from collections.abc import Mapping, Sequence

import ml_collections

from fp4jax.axes import BATCH_AXES
from fp4jax.config import MOE_MODEL, ConfigError, check_key, default_config, flatten, mesh_shape

SEQUENCE_BLOCK = 16
"""The weight gradient's blocks run along the sequence: 16 tokens share a scale."""

MOST_STRETCHES = 64
"""`numerics.splits` adds a sequence up in so many stretches at most, each on one device."""

BACKENDS = ("auto", "xla", "pallas")
GEMMS = ("auto", "native", "emulated", "fused")
REMATERIALIZATIONS = ("none", "full", "linear_inputs")
ATTENTIONS = ("auto", "xla", "cudnn")
GATHERS = ("auto", "step", "layer")
ACTIVATION_DTYPES = ("bfloat16", "float32")
ON_NONFINITE = ("stop", "skip", "rollback")

MAY_CHANGE = (
    *("steps", "log", "health", "checkpoint", "evaluation", "backend", "gemm", "mesh"),
    *("on_nonfinite", "divergence", "watchdog", "data.prefetch", "data.max_bad_fraction", "model.remat"),
    *("model.attention", "model.gather_weights", "model.sequence_sharding"),
)
"""Keys and groups that may change when a run goes on: they decide how long, where, how fast it computes, not what."""

MAX_SHOWN = 100
"""Characters of a value that an error message shows."""


def validate(config: ml_collections.ConfigDict, device_count: int | None = None) -> None:
    """Checks a whole configuration; with `device_count` also that it fits the devices.

    Raises:
      ConfigError: the first thing that cannot run, in one line.
    """
    for key in ("batch_size", "microbatches"):  # before the others: a configuration may have values that divide by them
        if config[key] == 0:
            raise ConfigError(f"{key}=0: must be at least 1")
    _check_schema(config)
    _check_ranges(config)
    _check_model(config.model)
    if config.seq_len % SEQUENCE_BLOCK:
        below = config.seq_len // SEQUENCE_BLOCK * SEQUENCE_BLOCK
        choices = f"{below} or {below + SEQUENCE_BLOCK}" if below else f"{SEQUENCE_BLOCK}"
        raise ConfigError(
            f"seq_len={config.seq_len} is not a multiple of {SEQUENCE_BLOCK} (tokens that share a scale); use {choices}"
        )
    if config.batch_size % config.microbatches:
        raise ConfigError(
            f"batch_size={config.batch_size} is not divisible by microbatches={config.microbatches}; "
            f"use microbatches={math.gcd(config.batch_size, config.microbatches)} or another batch_size"
        )
    _check_groups(config.model.moe.groups, config.batch_size // config.microbatches)
    if device_count is not None:
        _check_mesh(config, mesh_shape(config.mesh, device_count))


def _check_schema(config: ml_collections.ConfigDict) -> None:
    schema = flatten(default_config())
    given = flatten(config)
    for key in given:
        check_key(key, set(schema))
    for key, default in schema.items():
        if key not in given:
            raise ConfigError(f"config key {key!r} is missing; start from fp4jax.config.default_config()")
        value = given[key]
        allowed = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, allowed) or isinstance(value, bool) != isinstance(default, bool):
            raise ConfigError(f"{key}={value!r} is a {type(value).__name__}; it takes a {type(default).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value!r} is not a finite number")


POSITIVE = (
    *("steps", "batch_size", "microbatches", "seq_len", "checkpoint.every", "checkpoint.keep", "evaluation.every"),
    *("divergence.rollback_steps", "watchdog.slow_step"),
    *("log.every", "optimizer.learning_rate", "optimizer.eps", "optimizer.clip_norm", "data.prefetch"),
    *(f"model.{size}" for size in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads")),
    *(f"model.{size}" for size in ("head_dim", "intermediate_size", "rope_theta", "rms_norm_eps", "init_std")),
    *("model.moe.num_experts", "model.moe.num_experts_per_token", "model.moe.groups"),
)
NOT_NEGATIVE = (
    *("seed", "health.every", "optimizer.warmup_steps", "optimizer.weight_decay", "evaluation.batches"),
    *("checkpoint.keep_every", "divergence.max_events", "divergence.spike", "watchdog.timeout"),
    "model.moe.router_loss_coefficient",
)
FRACTIONS = ("optimizer.end_learning_rate_fraction", "data.max_bad_fraction")
OPEN_FRACTIONS = ("optimizer.b1", "optimizer.b2", "data.validation_fraction")
CHOICES = {
    "backend": BACKENDS,
    "gemm": GEMMS,
    "model.remat": REMATERIALIZATIONS,
    "model.attention": ATTENTIONS,
    "model.gather_weights": GATHERS,
    "model.dtype": ACTIVATION_DTYPES,
    "on_nonfinite": ON_NONFINITE,
}


def _check_ranges(config: ml_collections.ConfigDict) -> None:
    flat = flatten(config)
    for key in POSITIVE:
        if flat[key] <= 0:
            least = "at least 1" if isinstance(flat[key], int) else "greater than 0"
            raise ConfigError(f"{key}={flat[key]}: must be {least}")
    for key in NOT_NEGATIVE:
        if flat[key] < 0:
            raise ConfigError(f"{key}={flat[key]}: must be 0 or more")
    if config.seed >= 2**31:
        raise ConfigError(f"seed={config.seed}: must be below 2^31")
    _check_keep_every(config.checkpoint)
    for key in FRACTIONS:
        if not 0 <= flat[key] <= 1:
            raise ConfigError(f"{key}={flat[key]}: must be from 0 to 1")
    for key in OPEN_FRACTIONS:
        if not 0 < flat[key] < 1:
            raise ConfigError(f"{key}={flat[key]}: must be between 0 and 1")
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            raise ConfigError(f"{key}={flat[key]!r} is unknown; accepted: {', '.join(choices)}")


def _check_keep_every(checkpoint: ml_collections.ConfigDict) -> None:
    if checkpoint.keep_every % checkpoint.every:
        raise ConfigError(
            f"checkpoint.keep_every={checkpoint.keep_every} is not a multiple of checkpoint.every={checkpoint.every}, "
            f"so that few of those steps are saved; use {math.lcm(checkpoint.keep_every, checkpoint.every)}"
        )


def _check_model(model: ml_collections.ConfigDict) -> None:
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_heads={model.num_heads} is not divisible by model.num_kv_heads={model.num_kv_heads}; "
            f"use model.num_kv_heads={math.gcd(model.num_heads, model.num_kv_heads)}"
        )
    if model.head_dim % 2:
        raise ConfigError(f"model.head_dim={model.head_dim} is odd; rotary embeddings turn pairs: use an even number")
    _check_moe(model)


def _check_moe(model: ml_collections.ConfigDict) -> None:
    """Whether the experts' options are used, and can be; `capacity` is read by the model."""
    if model.name != MOE_MODEL:
        for key, default in default_config().model.moe.items():
            if model.moe[key] != default:
                raise ConfigError(
                    f"model.moe.{key}={model.moe[key]} is for experts, which model.name={model.name!r} does not have; "
                    f"use model.name={MOE_MODEL!r} or leave it at {default}"
                )
    elif model.moe.num_experts_per_token > model.moe.num_experts:
        raise ConfigError(
            f"model.moe.num_experts_per_token={model.moe.num_experts_per_token} of "
            f"model.moe.num_experts={model.moe.num_experts}; use num_experts_per_token={model.moe.num_experts} or less"
        )


def _check_groups(groups: int, sequences: int) -> None:
    if sequences % groups:
        raise ConfigError(
            f"model.moe.groups={groups} does not divide the {sequences} sequences of a microbatch; "
            f"use model.moe.groups={math.gcd(groups, sequences)} or another batch_size"
        )


def _check_mesh(config: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> None:
    _check_experts(config.model, sizes["expert"])
    rows = config.batch_size // config.microbatches
    shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    if rows % shards:
        microbatches = f" / microbatches={config.microbatches}" if config.microbatches > 1 else ""
        multiple = math.ceil(rows / shards) * shards * config.microbatches
        raise ConfigError(
            f"batch_size={config.batch_size}{microbatches} gives {rows} sequences for {_split(sizes)}; "
            f"use batch_size={multiple} or a smaller mesh"
        )
    if config.model.moe.groups > 1 and config.model.moe.groups % shards:
        raise ConfigError(
            f"model.moe.groups={config.model.moe.groups} for {_split(sizes)}: every device needs whole groups; "
            f"use model.moe.groups={shards} or, which gathers all tokens, 1"
        )
    for size in ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"):
        _check_divides(config.model, size, sizes, ("tensor",))
    _check_divides(config.model, "hidden_size", sizes, ("fsdp", "expert"))
    if config.model.sequence_sharding:
        _check_sequence(config.seq_len, sizes["tensor"])
    if config.backend == "pallas":
        _check_whole_blocks(config.model, "intermediate_size", sizes, ("tensor",))
        _check_whole_blocks(config.model, "hidden_size", sizes, ("fsdp", "expert"))


def _split(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in BATCH_AXES)


def _check_sequence(seq_len: int, devices: int) -> None:
    """Whether devices along `tensor` can share a sequence: in whole blocks, and in stretches whose sums a mean adds."""
    if devices & (devices - 1) or devices > MOST_STRETCHES:
        below = min(1 << (devices.bit_length() - 1), MOST_STRETCHES)
        raise ConfigError(
            f"mesh.tensor={devices}: with model.sequence_sharding a power of two of devices, {MOST_STRETCHES} at most, "
            f"share a sequence; use mesh.tensor={below} or model.sequence_sharding=False"
        )
    unit = SEQUENCE_BLOCK * devices
    if seq_len % unit:
        below = seq_len // unit * unit
        choices = f"{below} or {below + unit}" if below else f"{unit}"
        raise ConfigError(
            f"seq_len={seq_len} is not a multiple of {unit}, a block of {SEQUENCE_BLOCK} tokens for each of "
            f"mesh.tensor={devices} with model.sequence_sharding; use seq_len={choices} or a smaller mesh.tensor"
        )


def _check_divides(model: ml_collections.ConfigDict, size: str, sizes: Mapping[str, int], axes: Sequence[str]) -> None:
    """Whether devices along all `axes` can split that size; names the first that is too many."""
    rest, splitting = model[size], []
    for axis in axes:
        splitting += [f"mesh.{axis}={sizes[axis]}"] if sizes[axis] > 1 else []
        if rest % sizes[axis]:
            raise ConfigError(
                f"model.{size}={model[size]} is not divisible by {' x '.join(splitting)}; "
                f"use mesh.{axis}={math.gcd(rest, sizes[axis])}"
            )
        rest //= sizes[axis]


def _check_whole_blocks(
    model: ml_collections.ConfigDict, size: str, sizes: Mapping[str, int], axes: Sequence[str]
) -> None:
    """Whether kernels, which quantize the shards of weights, get whole blocks."""
    shard = model[size] // math.prod(sizes[axis] for axis in axes)
    if shard < model[size] and shard % SEQUENCE_BLOCK:
        splitting = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1)
        raise ConfigError(
            f"backend='pallas' needs shards of whole blocks of {SEQUENCE_BLOCK}: model.{size}={model[size]} over "
            f"{splitting} gives {shard}; use backend='xla' or a smaller mesh"
        )


def _check_experts(model: ml_collections.ConfigDict, devices: int) -> None:
    if devices == 1:
        return
    if model.name != MOE_MODEL:
        raise ConfigError(
            f"mesh.expert={devices} is for experts, which model.name={model.name!r} does not have; use mesh.expert=1"
        )
    if model.moe.num_experts % devices:
        raise ConfigError(
            f"model.moe.num_experts={model.moe.num_experts} is not divisible by mesh.expert={devices}; "
            f"use mesh.expert={math.gcd(model.moe.num_experts, devices)}"
        )


def config_differences(
    saved: Mapping, current: Mapping | ml_collections.ConfigDict, may_change: Sequence[str] = MAY_CHANGE
) -> list[str]:
    """Returns "key saved → current" for each key that changes what a run computes: all but `may_change`.

    A key that did not exist when the checkpoint was written had its present default.
    """
    before = flatten(default_config()) | flatten(saved)
    after = flatten(current)
    differing = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return [
        f"{key} {_short(before.get(key))} → {_short(after.get(key))}"
        for key in differing
        if not any(key == free or key.startswith(f"{free}.") for free in may_change)
    ]


def _short(value: object) -> str:
    """A value as the message of a difference shows it; a policy's rules can be long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
