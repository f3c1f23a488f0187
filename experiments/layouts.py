"""How far a training run on eight devices is from the same run on one: `results/layouts/layouts.json`.

    PYTHONPATH=. python experiments/layouts.py --out=results/layouts/layouts.json [--recipes=bf16,nvfp4] [--steps=20]

Eight CPU devices, a Qwen3 of two layers and 0.4 million parameters and a Qwen3-MoE of its size, its tokens routed in
one group and in eight, sequences of 64 tokens, batches of 8, float32 activations; meshes called "sequence" shard
sequences over `tensor`, too. For every recipe, on one device and on every mesh: the first step from the same state
(loss, gradients), and the losses of STEPS steps. Rounding is discontinuous, so runs in FP4, and in bfloat16, part
after a few steps whatever the layout: the yardstick is the envelope of five runs on one device whose embedding was
moved by an ulp, each in another direction.

Products are XLA's own. YNNPACK, to which JAX 0.12 hands small ones on CPUs, adds up in another order for one sequence
than for eight, so that attention on eight devices begins with other bits; `--ynnpack` leaves it on.
"""

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np
import optax

from fp4jax.cli import Parser, check_output_file, positive, run
from fp4jax.config import default_config, mesh_of
from fp4jax.config_checks import validate
from fp4jax.recipes import as_recipe
from fp4jax.training.mesh import make_mesh, put_batch
from fp4jax.training.optimizer import make_optimizer
from fp4jax.training.state import TrainState, create_state, model_template, on_mesh, state_shardings
from fp4jax.training.step import loss_and_gradients, training_key

WITHOUT_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Compiler options."""

DEVICES = 8
RECIPES = ("float32", "bf16", "nvfp4", "averis", "averis_centered")
"""`float32` is the recipe `bf16`, without quantization, on float32 activations; `bf16` has bfloat16 ones."""

_OF_EXPERTS = {
    "expert": mesh_of(expert=4), "mixed": mesh_of(fsdp=2, expert=2, tensor=2),
    "sequence mixed": mesh_of(fsdp=2, expert=2, tensor=2),
}  # fmt: skip
MESHES = {
    "qwen3": {
        "data": mesh_of(data=8), "fsdp": mesh_of(fsdp=8), "tensor": mesh_of(tensor=8),
        "mixed": mesh_of(data=2, fsdp=2, tensor=2),
        "sequence": mesh_of(data=2, tensor=4), "sequence mixed": mesh_of(data=2, fsdp=2, tensor=2),
    },
    "qwen3_moe": _OF_EXPERTS,
    "qwen3_moe, 8 groups": _OF_EXPERTS,
}  # fmt: skip
SHARDED_SEQUENCES = ("sequence", "sequence mixed")
"""The names of those under `model.sequence_sharding`."""

OF_EXPERTS = ("averis",)
PERTURBED = 5


def config_of(model: str, recipe: str) -> ml_collections.ConfigDict:
    """Two layers of width 128 under a recipe."""
    config = default_config()
    config.model.name = model.partition(",")[0]
    config.recipe = "bf16" if recipe == "float32" else recipe
    config.batch_size, config.seq_len, config.steps = 8, 64, 100
    config.model.update(
        {"vocab_size": 512, "hidden_size": 128, "num_layers": 2, "num_heads": 8, "num_kv_heads": 8, "head_dim": 16}
        | {"intermediate_size": 256, "dtype": "bfloat16" if recipe == "bf16" else "float32"}
    )
    if config.model.name == "qwen3_moe":
        config.model.intermediate_size = 128
        config.model.moe.num_experts = 4
        config.model.moe.groups = 8 if "groups" in model else 1
    config.optimizer.warmup_steps = 5
    return config


def batches(config: ml_collections.ConfigDict, steps: int) -> list[dict[str, np.ndarray]]:
    """Random tokens of a skewed distribution, which a model can learn."""
    random = np.random.default_rng(0)
    shape = (steps, config.batch_size, config.seq_len + 1)
    tokens = np.minimum(random.geometric(0.02, shape), config.model.vocab_size - 1).astype(np.int32)
    mask = np.ones(shape[1:-1] + (config.seq_len,), np.float32)
    return [{"tokens": rows[:, :-1], "targets": rows[:, 1:], "loss_mask": mask} for rows in tokens]


class Layout:
    """The compiled programs of one configuration on one mesh."""

    def __init__(
        self, config: ml_collections.ConfigDict, sizes: dict[str, int], sequences: bool = False, ynnpack: bool = False
    ):
        config = config.copy_and_resolve_references()
        config.mesh, config.model.sequence_sharding = sizes, sequences
        validate(config, DEVICES)
        self.config, self.mesh, self.template = config, make_mesh(sizes), model_template(config)
        self.optimizer = make_optimizer(config, self.template.logical_axes)

        def differentiated(state, batch):
            key = training_key(jax.random.key_data(jax.random.key(config.seed)), state.step)
            return loss_and_gradients(1, self.template, self.mesh, state.params, batch, key)[:2]

        def updated(state, gradients):
            updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
            return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

        shardings = state_shardings(self.template, self.optimizer, self.mesh)
        # The two halves of the training step, so that one compilation serves gradients and runs.
        compiled = functools.partial(jax.jit, compiler_options=None if ynnpack else WITHOUT_YNNPACK)
        self._differentiated = on_mesh(compiled(differentiated, out_shardings=(None, shardings.params)), self.mesh)
        self._updated = on_mesh(jax.jit(updated, out_shardings=shardings), self.mesh)

    def state(self, ulps: np.ndarray | None = None) -> TrainState:
        """The initial state, the embedding moved by `ulps` where given."""
        state = create_state(self.config, self.template, self.optimizer, self.mesh)
        if ulps is not None:
            embedding = state.params["embedding"]
            moved = np.nextafter(np.asarray(embedding), ulps * np.float32(np.inf))
            state.params["embedding"] = jax.device_put(moved, embedding.sharding)
        return state

    def run(self, data: Sequence[dict[str, np.ndarray]], ulps: np.ndarray | None = None) -> tuple[list[float], dict]:
        """(the loss of every step, the first step's gradients)"""
        state, losses, first = self.state(ulps), [], None
        for batch in data:
            loss, gradients = self._differentiated(state, put_batch(batch, self.mesh))
            first = jax.device_get(gradients) if first is None else first
            losses.append(float(loss))
            state = self._updated(state, gradients)
        return losses, first


def directions(config: ml_collections.ConfigDict) -> list[np.ndarray]:
    """Up or down for every element of the embedding, PERTURBED times."""
    random = np.random.default_rng(1)
    shape = (config.model.vocab_size, config.model.hidden_size)
    return [random.choice(np.array([-1, 1], np.float32), shape) for _ in range(PERTURBED)]


def distance(found: Sequence[float], reference: Sequence[float]) -> float:
    """The largest relative difference of two runs' losses."""
    return float(np.max(np.abs(np.array(found) - reference) / np.abs(reference)))


def gradient_distances(found: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative, in the Euclidean norm: of all gradients together, and of the worst parameter."""
    apart = {name: np.linalg.norm(found[name] - value) for name, value in reference.items()}
    norms = {name: np.linalg.norm(value) for name, value in reference.items()}
    together = np.linalg.norm([*apart.values()]) / np.linalg.norm([*norms.values()])
    return {"together": float(together), "worst": float(max(apart[name] / norms[name] for name in reference))}


def measure(model: str, recipe: str, steps: int, ynnpack: bool) -> dict:
    """One recipe on all meshes of a model."""
    config = config_of(model, recipe)
    data = batches(config, steps)
    one = Layout(config, mesh_of(), ynnpack=ynnpack)
    reference, gradients = one.run(data)
    found = {"losses": reference, "meshes": {}}
    if recipe != "float32":
        perturbed = [one.run(data, ulps)[0] for ulps in directions(config)]
        found["perturbed"] = perturbed
        found["envelope"] = max(distance(run, reference) for run in perturbed)
    for name, sizes in MESHES[model].items():
        layout = Layout(config, sizes, name in SHARDED_SEQUENCES, ynnpack)
        losses, mesh_gradients = layout.run(data)
        found["meshes"][name] = {
            "mesh": sizes, "first_loss": distance(losses[:1], reference[:1]),
            "first_gradients": gradient_distances(mesh_gradients, gradients),
            "losses": losses, "distance": distance(losses, reference),
        }  # fmt: skip
        print(
            f"{model} {recipe} {name}: {json.dumps({k: v for k, v in found['meshes'][name].items() if k != 'losses'})}"
        )
    if "envelope" in found:
        print(f"{model} {recipe}: envelope {found['envelope']:.2e}", flush=True)
    return found


def main(arguments: Sequence[str]) -> None:
    """Writes what it measured."""
    parser = Parser("experiments/layouts.py", __doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--ynnpack", action="store_true")
    flags = parser.parse_args(arguments)
    check_output_file(flags.out, "--out")
    recipes = flags.recipes.split(",")
    for name in recipes:
        as_recipe("bf16" if name == "float32" else name)  # each before the first one runs
    results = {
        model: {
            recipe: measure(model, recipe, flags.steps, flags.ynnpack)
            for recipe in recipes
            if model == "qwen3" or recipe in OF_EXPERTS
        }
        for model in MESHES
    }
    about = {"steps": flags.steps, "devices": DEVICES, "jax": jax.__version__, "perturbed_runs": PERTURBED}
    about |= {"ynnpack": flags.ynnpack}
    flags.out.write_text(json.dumps(about | {"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    sys.exit(run(main, sys.argv[1:]))
