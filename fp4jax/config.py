"""The configuration: every key and its default. Nothing else in the project has a default for them.

`default_config()` gives the schema, a file in `configs/` puts values on top of it, `--config.key=value` overrides
those, and `config_checks.py` refuses what cannot run before anything is compiled.
"""

import difflib
import math
from collections.abc import Iterable, Mapping

import ml_collections

from fp4jax.axes import MESH_AXES

MOE_MODEL = "qwen3_moe"


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
      gemm: how quantized operands are multiplied: "auto", "native" (Blackwell), "emulated" or
        "fused" (Hopper: decoded by a kernel as they are multiplied; not yet measured on hardware).
      seed: initial weights, order of the data and every stochastic rounding.
      init_from: the weights to start from instead: a Hugging Face folder, a .gguf file, "smollm2-135m" or the workdir
        of another run. `model` must have its sizes, and `data.tokenizer` be its tokenizer.
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
            "init_from": "",
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
    """`name`: "qwen3", "llama", which lacks the norms of query and key heads, or "qwen3_moe", which has experts:
    `intermediate_size` is then an expert's. `dtype` is the activations' (parameters are float32), `remat` what the
    backward recomputes, `gather_weights` when the devices that share a kernel get all of it: "step" (once, and held),
    "layer" (where one needs it) or "auto" (once what is quantized); `attention`: "auto", "xla" or "cudnn" (flash
    attention; auto takes it on NVIDIA GPUs); `sequence_sharding`: devices along `mesh.tensor` share the sequences of
    the residual stream, and the inputs of linear layers travel between them in codes (docs/clusters.md).
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
        "gather_weights": "auto",
        "attention": "auto",
        "sequence_sharding": False,
        "moe": _moe(),
    }


def _moe() -> dict:
    """Of "qwen3_moe" alone. `capacity`: slots of an expert over the tokens it would get if all got the same, as text
    ("1.25"), or "full": a slot for every token, so that none is dropped. `norm_topk_prob`: the weights of a token's
    experts sum to one. `groups`: parts of a microbatch, each of whole sequences and with slots of its own: where every
    device holds whole ones, tokens travel to their experts by an all-to-all (docs/moe.md). `router_loss_coefficient`:
    of the load-balancing loss.
    """
    return {
        "num_experts": 8,
        "num_experts_per_token": 2,
        "norm_topk_prob": True,
        "capacity": "1.25",
        "groups": 1,
        "router_loss_coefficient": 0.001,
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
    """Devices along each axis: `data` replicates the parameters, `fsdp` shards them and the batch, `expert` splits the
    experts of "qwen3_moe" (and, like `fsdp`, the batch and all other parameters), `tensor` splits the matrices. One of
    them may be -1: all devices that remain.
    """
    return mesh_of()


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


def config_from(values: Mapping | ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration that a file of ours holds: the defaults with these values.

    Raises:
      ConfigError: a key that there is not, or a value of another type: another version of the code wrote it.
    """
    config = default_config()
    unknown = sorted(flatten(values).keys() - flatten(config).keys())
    if unknown:
        raise ConfigError(
            f"a stored configuration has {', '.join(unknown[:5])}, which this version of the code has not; "
            "use the version that wrote it"
        )
    try:
        config.update(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"a stored configuration does not fit this version of the code ({reason})") from None
    return config


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
            check_key(name.removeprefix(f"{flag}."), accepted)


def check_key(key: str, accepted: set[str]) -> None:
    """Raises ConfigError for a key that is not in `accepted`; names the closest one that is."""
    if key in accepted:
        return
    close = difflib.get_close_matches(key, sorted(accepted), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else f"; accepted: {', '.join(sorted(accepted))}"
    raise ConfigError(f"unknown config key {key!r}{hint}")


def mesh_of(**sizes: int) -> dict[str, int]:
    """The group `mesh` with these sizes, and 1 along every axis that is not named."""
    return dict.fromkeys(MESH_AXES, 1) | sizes


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
