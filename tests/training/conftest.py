"""A corpus, a model and a run small enough to train in a test."""

import json

import jax
import numpy as np
import pytest
import zstandard

from fp4jax.config import default_config
from fp4jax.training.compilation import enable_compilation_cache


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Tokenized corpora and compiled programs of the tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FP4JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        enable_compilation_cache()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # one test's program is another's too
        yield


@pytest.fixture(autouse=True)
def _compiled_quickly(request):
    """Quick tests compile whole training steps without LLVM's optimizations; slow ones as a run does."""
    if request.node.get_closest_marker("slow") is not None:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with one shard of 200 documents of random words."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    words = np.array("the of union state people congress year government nation peace war law".split())
    documents = [" ".join(random.choice(words, 80)) for _ in range(200)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "shard.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    return folder


@pytest.fixture
def config(corpus):
    """Two layers of width 32 on sequences of 32 tokens in high precision; four steps, everything logged."""
    config = default_config()
    config.recipe, config.model.dtype = "bf16", "float32"
    config.steps = 4
    config.batch_size = 8
    config.seq_len = 32
    config.model.update(
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 64}
    )
    config.optimizer.warmup_steps = 2
    config.data.source = str(corpus)
    config.data.validation_fraction = 0.1
    config.checkpoint.every = 2
    config.evaluation.every = 4
    config.evaluation.batches = 1
    config.log.every = 1
    return config


@pytest.fixture
def averis_config(config):
    """The same in FP4 with stochastic rounding, which takes three times as long to compile."""
    config.recipe, config.model.dtype = "averis", "bfloat16"
    return config


@pytest.fixture
def batch(config):
    """A batch of random tokens in which rows have different numbers of real tokens."""
    random = np.random.default_rng(1)
    rows = random.integers(0, config.model.vocab_size, (config.batch_size, config.seq_len + 1), dtype=np.int32)
    mask = (np.arange(config.seq_len) < random.integers(1, config.seq_len, (config.batch_size, 1))).astype(np.float32)
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:], "loss_mask": mask}
