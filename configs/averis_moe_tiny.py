"""A Qwen3-MoE of 1.9 million parameters, 8 experts of which a token takes 2, all in FP4 with Averis.

Command:   make train CONFIG=configs/averis_moe_tiny.py
Hardware:  2 CPU cores, 4 GB of memory; no accelerator
Time:      90 s of CPU time; 6 min 24 s measured on 2 cores that other programs kept busy
Expect:    validation loss 6.24 after 200 steps, .38 nats below the unigram entropy; choices dropped: 27 % in step 60,
           1.1 % in step 200

All values are assumed.
"""

import ml_collections

from fp4jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.recipe = "averis"
    config.steps = 200
    config.batch_size = 8
    config.seq_len = 128
    config.model.name = "qwen3_moe"
    config.model.dtype = "float32"
    config.model.vocab_size = 4096
    config.model.hidden_size = 128
    config.model.num_layers = 3
    config.model.num_heads = 2
    config.model.num_kv_heads = 1
    config.model.head_dim = 64
    config.model.intermediate_size = 128
    config.model.moe.num_experts = 8
    config.model.moe.num_experts_per_token = 2
    config.model.moe.capacity = "1.25"
    config.model.moe.router_loss_coefficient = 0.1
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.checkpoint.every = 100
    config.evaluation.every = 100
    return config
