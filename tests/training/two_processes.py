"""A run for two processes of four devices, or one of eight: FP4 with stochastic rounding, eight shards."""

import ml_collections

from fp4jax.testing.kills import tiny_config


def get_config() -> ml_collections.ConfigDict:
    config = tiny_config(kills=1)
    config.mesh.fsdp = 8
    config.steps, config.batch_size = 8, 16
    config.checkpoint.every, config.evaluation.every = 3, 4
    return config
