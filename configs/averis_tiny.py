"""A Qwen3 of about 4 million parameters, every linear layer in FP4 with Averis, on the State of the Union addresses.

Command:   make train          (python train.py --config=configs/averis_tiny.py --workdir=runs/averis_tiny)
Hardware:  2 CPU cores, 4 GB of memory; no accelerator
Time:      4 min 7 s measured on 2 cores, start and compilation included
Expect:    validation loss 5.6 to 5.7, 0.9 to 1.0 nats below the validation documents' unigram entropy (RESULTS.md)

All values are assumed: the paper's smallest model has 0.6 billion parameters.
"""

import ml_collections

from fp4jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.recipe = "averis"
    config.steps = 200
    config.batch_size = 8
    config.seq_len = 256
    config.model.dtype = "float32"
    config.model.vocab_size = 4096
    config.model.hidden_size = 256
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.head_dim = 64
    config.model.intermediate_size = 768
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 20
    config.checkpoint.every = 100
    config.evaluation.every = 100
    return config
