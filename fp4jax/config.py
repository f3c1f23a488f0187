"""The configuration: every key, its default and what it may hold. Nothing else in the project has a default for them.

`default_config()` gives the schema, a file in `configs/` puts values on top of it, `--config.key=value` overrides
those, and `validate` refuses what cannot run before anything is compiled.
"""

import difflib
import math
from collections.abc import Iterable, Mapping

import ml_collections

SEQUENCE_BLOCK = 16
"""The weight gradient's blocks run along the sequence: 16 tokens share a scale."""

BACKENDS = ("auto", "xla", "pallas")
GEMMS = ("auto", "native", "emulated")
REMATERIALIZATIONS = ("none", "full", "linear_inputs")
ACTIVATION_DTYPES = ("bfloat16", "float32")
ON_NONFINITE = ("stop", "skip", "rollback")
MESH_AXES = ("data", "fsdp", "tensor")


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line with what was given, what is accepted, what to do."""


def default_config() -> ml_collections.ConfigDict:
    """Returns the schema with its defaults, locked: an unknown key raises.

    Top level:
      recipe: name in `fp4jax.list_recipes()`, variants with `+` ("averis+nearest").
      policy: which layer gets the recipe: "all_linear" (every linear layer of the blocks, as in the paper), "nvidia"
        (the first and last blocks in BF16), a policy file ("scan.json"), or rules as JSON ('[["mlp", "run"]]').
      schedule: recipes by step, "bf16:1%,run:80%,run+fwd_bf16:100%": each with its end in percent of the steps or as a
        step number, "run" for `recipe`; empty for `recipe` throughout.
      backend: how operands are quantized: "auto" (the best the device has), "xla" or "pallas".
      gemm: how quantized operands are multiplied: "auto", "native" (Blackwell) or "emulated".
      seed: initial weights, order of the data and every stochastic rounding.
      steps: optimizer steps of the whole run; the learning-rate schedule ends there.
      batch_size: sequences in an optimizer step, over all devices and microbatches.
      microbatches: parts that a batch is split into, one after the other, to bound activation memory.
      seq_len: tokens in a sequence, a multiple of 16.
      on_nonfinite: what to do when loss or gradient of a step are not finite: "stop", "skip" (leave the state as it
        was; the step counts) or "rollback" (go back to a checkpoint and pass over the data since).
    """
    config = ml_collections.ConfigDict(
        {
            "recipe": "averis",
            "policy": "all_linear",
            "schedule": "",
            "backend": "auto",
            "gemm": "auto",
            "seed": 0,
            "steps": 1000,
            "batch_size": 8,
            "microbatches": 1,
            "seq_len": 256,
            "on_nonfinite": "stop",
            "model": _model(),
            "optimizer": _optimizer(),
            "data": _data(),
            "mesh": _mesh(),
            "checkpoint": _checkpoint(),
            "evaluation": _evaluation(),
            "log": _log(),
            "health": _health(),
            "divergence": _divergence(),
            "watchdog": _watchdog(),
        }
    )
    return config.lock()


def _model() -> dict:
    """`name`: "qwen3", or "llama", which lacks the norms of query and key heads. `dtype` is the activations'
    (parameters are float32), `remat` what the backward recomputes.
    """
    return {
        "name": "qwen3",
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "intermediate_size": 768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_embeddings": True,
        "init_std": 0.02,
        "dtype": "bfloat16",
        "remat": "none",
    }


def _optimizer() -> dict:
    """AdamW: linear warm-up to `learning_rate`, cosine down to `end_learning_rate_fraction` of it at the last step.

    `weight_decay` acts on matrices only; gradients are clipped to the global norm `clip_norm`.
    """
    return {
        "learning_rate": 1e-3,
        "warmup_steps": 50,
        "end_learning_rate_fraction": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
    }


def _data() -> dict:
    """`source`: "embedded" (State of the Union), a folder or a glob of `.jsonl.zst` shards, a folder that
    `python -m fp4jax.data.prepare` wrote, or several with weights ("A:0.7,B:0.3"); `tokenizer`: "embedded" (4096
    tokens), "qwen3", "smollm2-135m", the path of a `tokenizer.json` or `.gguf` file, or a name on the hub;
    `validation_fraction`: of the documents; `max_bad_fraction`: of the lines that may be unreadable; `prefetch`:
    batches made ahead; `document_mask`: attention and positions begin anew with every document in a row.
    """
    return {
        "source": "embedded",
        "tokenizer": "embedded",
        "validation_fraction": 0.02,
        "text_key": "text",
        "max_bad_fraction": 0.01,
        "prefetch": 2,
        "document_mask": False,
    }


def _mesh() -> dict:
    """Devices along each axis: `data` replicates the parameters, `fsdp` shards them and the batch, `tensor` splits the
    matrices. One of them may be -1: all devices that remain.
    """
    return {"data": 1, "fsdp": 1, "tensor": 1}


def _checkpoint() -> dict:
    """A checkpoint `every` so many steps and at the end; the latest `keep` are kept, and those of every `keep_every`
    steps (0: no others). `asynchronous` writes while training goes on; on a CPU this holds a second copy of the state
    (arrays being written cannot be donated).
    """
    return {"every": 200, "keep": 3, "keep_every": 0, "asynchronous": True}


def _evaluation() -> dict:
    """Validation loss over `batches` batches (0: the whole split), `every` so many steps and at the end."""
    return {"every": 200, "batches": 8}


def _log() -> dict:
    """Metrics are written `every` so many steps; `progress` draws the progress bar on a terminal."""
    return {"every": 10, "progress": True}


def _health() -> dict:
    """Statistics of every quantized operand and the exact gradient's distance, `every` so many steps (0: never).

    Such a step takes the time of about two more and the memory of two more gradients; the others, and the training
    itself, are what they are without.
    """
    return {"every": 0}


def _divergence() -> dict:
    """`rollback_steps`: a rollback goes to the newest checkpoint at least so many steps before the one that was not
    finite; `max_events`: skipped steps and rollbacks after which a run stops all the same; `spike`: a loss is reported
    as a spike from so many standard deviations above the last 100 (0: never).
    """
    return {"rollback_steps": 1, "max_events": 20, "spike": 8.0}


def _watchdog() -> dict:
    """`timeout`: seconds without a finished step, validation batch or checkpoint after which a run counts as hanging
    and ends itself (0: never). Compilation counts too. `slow_step`: a step this many times the median is an outlier.
    """
    return {"timeout": 3600.0, "slow_step": 3.0}


def flatten(config: Mapping | ml_collections.ConfigDict, prefix: str = "") -> dict[str, object]:
    """Returns {"model.num_layers": 4, ...} for a nested config."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_overrides(arguments: Iterable[str], flag: str = "config") -> None:
    """Raises ConfigError for a `--config.key` on the command line that the schema does not have."""
    schema = default_config()
    groups = {key for key, value in schema.items() if isinstance(value, ml_collections.ConfigDict)}
    accepted = set(flatten(schema)) | groups
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name.startswith(f"{flag}."):
            _check_key(name.removeprefix(f"{flag}."), accepted)


def _check_key(key: str, accepted: set[str]) -> None:
    if key in accepted:
        return
    close = difflib.get_close_matches(key, sorted(accepted), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else f"; accepted: {', '.join(sorted(accepted))}"
    raise ConfigError(f"unknown config key {key!r}{hint}")


def mesh_shape(mesh: Mapping[str, int] | ml_collections.ConfigDict, device_count: int) -> dict[str, int]:
    """Resolves a -1 and checks the mesh against the devices.

    A mesh may take fewer devices than there are (the rest idle, which the start table shows), never more.

    Raises:
      ConfigError: the mesh needs more devices than there are, or they cannot be divided; names the axis to change.
    """
    sizes = {axis: mesh[axis] for axis in MESH_AXES}
    shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise ConfigError(f"mesh.{axis}={size}: a mesh axis is at least 1, or -1 for all remaining devices")
    if len(free) > 1:
        raise ConfigError(f"mesh {shown}: only one axis may be -1; set mesh.{free[1]} to a number")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    largest = max((axis for axis in MESH_AXES if axis not in free), key=lambda axis: sizes[axis])
    if fixed > device_count:
        fits = max(device_count * sizes[largest] // fixed, 1)
        raise ConfigError(
            f"mesh {shown} needs {fixed} devices and there are {device_count}; set mesh.{largest}={fits} or less"
        )
    if free:
        if device_count % fixed:
            fits = math.gcd(sizes[largest], device_count)
            raise ConfigError(
                f"mesh {shown}: {device_count} devices cannot be divided by {fixed}; set mesh.{largest}={fits}"
            )
        sizes[free[0]] = device_count // fixed
    return sizes


def validate(config: ml_collections.ConfigDict, device_count: int | None = None) -> None:
    """Checks a whole configuration; with `device_count` also that it fits the devices.

    Raises:
      ConfigError: the first thing that cannot run, in one line.
    """
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
    if device_count is not None:
        _check_mesh(config, mesh_shape(config.mesh, device_count))


def _check_schema(config: ml_collections.ConfigDict) -> None:
    schema = flatten(default_config())
    given = flatten(config)
    for key in given:
        _check_key(key, set(schema))
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
)
NOT_NEGATIVE = (
    *("seed", "health.every", "optimizer.warmup_steps", "optimizer.weight_decay", "evaluation.batches"),
    *("checkpoint.keep_every", "divergence.max_events", "divergence.spike", "watchdog.timeout"),
)
FRACTIONS = ("optimizer.end_learning_rate_fraction", "data.max_bad_fraction")
OPEN_FRACTIONS = ("optimizer.b1", "optimizer.b2", "data.validation_fraction")
CHOICES = {
    "backend": BACKENDS,
    "gemm": GEMMS,
    "model.remat": REMATERIALIZATIONS,
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


def _check_mesh(config: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> None:
    if config.backend == "pallas" and math.prod(sizes.values()) > 1:
        raise ConfigError(
            "backend='pallas' runs on one device: XLA would gather the operands of its kernel; use backend='xla'"
        )
    rows = config.batch_size // config.microbatches
    shards = sizes["data"] * sizes["fsdp"]
    if rows % shards:
        microbatches = f" / microbatches={config.microbatches}" if config.microbatches > 1 else ""
        multiple = math.ceil(rows / shards) * shards * config.microbatches
        raise ConfigError(
            f"batch_size={config.batch_size}{microbatches} gives {rows} sequences for "
            f"mesh.data={sizes['data']} x mesh.fsdp={sizes['fsdp']}; use batch_size={multiple} or a smaller mesh"
        )
    model = config.model
    needs = [("hidden_size", "fsdp")] + [
        (size, "tensor") for size in ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size")
    ]
    for size, axis in needs:
        if model[size] % sizes[axis]:
            raise ConfigError(
                f"model.{size}={model[size]} is not divisible by mesh.{axis}={sizes[axis]}; "
                f"use mesh.{axis}={math.gcd(model[size], sizes[axis])}"
            )
