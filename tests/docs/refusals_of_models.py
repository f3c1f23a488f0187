"""The rows of docs/errors.md about configurations, tokenizers, checkpoints and weights."""

import functools
import pickle
from functools import partial

import numpy as np

from fp4jax import models
from fp4jax.checkpoint import check_same_run, prepare_workdir
from fp4jax.checksums import MANIFEST
from fp4jax.config import check_overrides, default_config
from fp4jax.config_checks import validate
from fp4jax.data.tokenizers import load_tokenizer
from fp4jax.models.saved_run import read_saved
from fp4jax.training.initial_weights import pretrained_parameters
from fp4jax.training.schedule import settle
from tests.docs.refusals import CASES, LINES, Call, Place, refused
from tests.models import gguf_files, hf_folders


def with_config(**changes):
    """The defaults with values that need not fit."""
    config = default_config()
    with config.ignore_type():
        for key, value in changes.items():
            *groups, name = key.split("__")
            functools.reduce(getattr, groups, config)[name] = value
    return config


THREE_DEVICES = {"mesh__data": 1, "mesh__tensor": 3, "model__num_heads": 6, "model__num_kv_heads": 3}


# Configurations

CASES |= {
    "an unknown key": lambda place: partial(check_overrides, ["--config.recepi=nvfp4"]),
    "a value of another type": lambda place: partial(validate, with_config(steps="many")),
    "a number that is none": lambda place: partial(validate, with_config(optimizer__learning_rate=float("nan"))),
    "zero steps": lambda place: partial(validate, with_config(steps=0)),
    "a mesh of more devices than there are": lambda place: partial(validate, with_config(mesh__data=3), device_count=2),
    "a mesh that does not divide the devices": lambda place: partial(
        validate, with_config(mesh__data=-1, mesh__tensor=3), device_count=8
    ),
    "a mesh with two axes left open": lambda place: partial(validate, with_config(mesh__data=-1, mesh__fsdp=-1), 8),
    "a batch that microbatches do not divide": lambda place: partial(validate, with_config(microbatches=3)),
    "rows that blocks do not divide": lambda place: partial(validate, with_config(seq_len=100)),
    "sequences that devices cannot share in whole blocks": lambda place: partial(
        validate, with_config(model__sequence_sharding=True, seq_len=144, mesh__data=1, mesh__tensor=2), 2
    ),
    "devices that cannot share a sequence evenly": lambda place: partial(
        validate, with_config(**THREE_DEVICES, model__vocab_size=4098, model__sequence_sharding=True), 3
    ),
    "shards that the batch does not hold": lambda place: partial(settle, with_config(recipe="averis+shards3")),
    "shards of shared sequences": lambda place: partial(
        settle, with_config(recipe="averis+shards8", model__sequence_sharding=True)
    ),
    "groups that a microbatch does not hold": lambda place: partial(
        validate, with_config(model__name="qwen3_moe", model__moe__groups=3), 1
    ),
    "groups that devices would share": lambda place: partial(
        validate, with_config(model__name="qwen3_moe", model__moe__groups=2, mesh__data=4), 4
    ),
}


# Tokenizers


@refused("a tokenizer that is missing")
def _(place: Place) -> Call:
    return partial(load_tokenizer, place.folder / "tokenizer.json")


@refused("a file that is no tokenizer")
def _(place: Place) -> Call:
    (place.folder / "tokenizer.json").write_text("{}")
    return partial(load_tokenizer, place.folder / "tokenizer.json")


@refused("a tokenizer of more entries than the model")
def _(place: Place) -> Call:
    return partial(place.open(place.shard(LINES)).check_vocabulary, 256)


@refused("a tokenizer that was replaced since the training")
def _(place: Place) -> Call:
    path = place.folder / "tokenizer.json"
    path.write_text(hf_folders.tokenizer_json())
    run = place.run(str(path))
    path.write_text(hf_folders.tokenizer_json(first="</s>"))
    return partial(models.load_parameters, run)


# Checkpoints


@refused("no checkpoint")
def _(place: Place) -> Call:
    return partial(read_saved, place.folder)


@refused("a checkpoint of another model")
def _(place: Place) -> Call:
    return partial(check_same_run, place.run(), default_config())


@refused("checkpoints that are all damaged")
def _(place: Place) -> Call:
    run = place.run()
    (run / "checkpoints" / "3" / "config" / "metadata").write_text("{}")
    return partial(read_saved, run)


@refused("a checkpoint of another format version")
def _(place: Place) -> Call:
    run = place.run()
    manifest = run / "checkpoints" / "3" / "params" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    return partial(read_saved, run)


@refused("a checkpoint with an option of another version")
def _(place: Place) -> Call:
    run = place.run(extra="value")
    return partial(read_saved, run)


@refused("a workdir that cannot be made")
def _(place: Place) -> Call:
    (place.folder / "file").touch()
    return partial(prepare_workdir, place.folder / "file" / "run")


# Weights


@refused("pickled weights")
def _(place: Place) -> Call:
    (place.folder / "weights.bin").write_bytes(pickle.dumps({}))
    return partial(models.load_parameters, place.folder / "weights.bin")


@refused("a folder with pickled weights")
def _(place: Place) -> Call:
    folder, _ = hf_folders.write_fixture(place.folder / "model", "llama_gqa_tied")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    return partial(models.load_parameters, folder)


@refused("a safetensors file that is cut")
def _(place: Place) -> Call:
    folder, _ = hf_folders.write_fixture(place.folder / "model", "llama_gqa_tied")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return partial(models.load_parameters, folder)


@refused("a model of another kind")
def _(place: Place) -> Call:
    folder, _ = hf_folders.write_fixture(place.folder / "model", "llama_gqa_tied", model_type="gpt2")
    return partial(models.load_parameters, folder)


@refused("a file that is no GGUF")
def _(place: Place) -> Call:
    (place.folder / "a.gguf").write_bytes(b"GGUF")
    return partial(models.load_parameters, place.folder / "a.gguf")


@refused("a GGUF file of another kind of model")
def _(place: Place) -> Call:
    gguf_files.write(place.folder / "a.gguf", {}, {"token_embd.weight": np.zeros((8, 8), np.float32)}, "gpt2")
    return partial(models.load_parameters, place.folder / "a.gguf")


@refused("init_from of another model")
def _(place: Place) -> Call:
    config = default_config()
    config.init_from = str(place.run())
    return partial(pretrained_parameters, config)


@refused("init_from of another tokenizer")
def _(place: Place) -> Call:
    run = place.run()
    config = default_config()
    config.update(read_saved(run)[1].to_dict())
    path = place.folder / "tokenizer.json"
    path.write_text(hf_folders.tokenizer_json())
    config.init_from, config.data.tokenizer = str(run), str(path)
    return partial(pretrained_parameters, config)
