"""Compiles the training step for devices that are not there: `compile_for_target.py TARGET [RECIPE ...]`.

TARGET is what `fp4jax.plan` takes, "v5e:2x2" or "h200:1". Prints a line of JSON for each recipe (default: all)
with what is needed to judge the optimized program.
"""

import json
import sys
import time
import traceback

import jax
import ml_collections
from jax.sharding import Mesh

from fp4jax.config import default_config, mesh_of
from fp4jax.plan import targets
from fp4jax.recipes import list_recipes
from fp4jax.reporting.optimized_hlo import Program
from fp4jax.scopes import PRODUCT_SCOPES
from fp4jax.training import make_mesh
from fp4jax.training.step import abstract_train_step

STAGES = ("fprop", "dgrad", "wgrad")
WIDE_TYPES = ("f64", "c64", "c128")
# Enough for every path; the other five linear layers would only multiply the time. In bfloat16 they are the control
# group, whose products must have precise sources.
QUANTIZED_LAYERS = "v_proj|down_proj"


def tiny_config(recipe: str) -> ml_collections.ConfigDict:
    """Sizes that end inside of blocks of 16, 32 and 128, along features and along tokens."""
    config = default_config()
    config.recipe = recipe
    config.policy = json.dumps([[QUANTIZED_LAYERS, "run"]])
    config.batch_size, config.microbatches, config.seq_len = 8, 2, 144
    config.model.update(
        {"vocab_size": 256, "hidden_size": 152, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
        | {"head_dim": 34, "intermediate_size": 300}
    )
    return config


def target_mesh(target: targets.Target) -> Mesh:
    """All devices of a TPU topology, as data × fsdp; or one GPU."""
    devices = target.devices()
    return make_mesh(mesh_of(data=1 if target.is_gpu else 2, fsdp=-1), devices)


def optimized_step(recipe: str, mesh: Mesh) -> str:
    """The optimized HLO of one optimizer step, compiled from shapes alone."""
    step, state, batch = abstract_train_step(tiny_config(recipe), mesh)
    with jax.set_mesh(mesh):
        lowered = step.lower(state, batch)
        return lowered.compile(targets.GPU_OPTIONS if mesh.devices.flat[0].platform == "gpu" else None).as_text()


def linear_products(text: str) -> list[dict]:
    """The products of linear layers: how many operands the recipe quantizes, how many have no precise source."""
    program, found = Program(text), []
    for product in program.products():
        path = product.scope.split("/")
        stage = next((stage for stage in STAGES if stage in path), None)
        quantized = next((i for i, scope in enumerate(PRODUCT_SCOPES) if scope in path), None)
        if stage is None or quantized is None:
            continue
        operands = program.operands(product)[:2]
        sources = [program.precise_source(operand) for operand in operands]
        found.append(
            {
                "name": product.name,
                "stage": stage,
                "quantized": quantized,
                "coded": sum(source is None for source in sources),
                "sources": [source and f"{source.name}: {source.type[:60]}" for source in sources],
                "types": [operand.type.split("{")[0] for operand in operands],
                "highest": product.rest.lower().count("highest") >= 2,
            }
        )
    return found


def report(recipe: str, mesh: Mesh) -> dict:
    """What is printed for a recipe; seconds are those of all processor cores, which a busy machine does not change."""
    start = time.process_time()
    try:
        text = optimized_step(recipe, mesh)
    except Exception:  # the other recipes are still to be seen
        return {"recipe": recipe, "error": traceback.format_exc()[-3000:]}
    seconds = round(time.process_time() - start, 1)
    wide = [name for name in WIDE_TYPES if f"{name}[" in text]
    return {"recipe": recipe, "seconds": seconds, "wide": wide, "products": linear_products(text)}


def main(target: str, *recipes: str) -> None:
    mesh = target_mesh(targets.parse(target))
    for recipe in recipes or list_recipes():
        print(json.dumps(report(recipe, mesh)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
