"""What the 0.6B configurations share: Qwen3-0.6B and its optimization. Train one of `averis_0p6b`, `bf16_0p6b`, ...

The paper (arXiv 2603.10444) gives the model, the corpus (DCLM) and the tokens (100B). It gives no learning rate, batch,
schedule or sequence length: those values are assumed.
"""

import ml_collections

from fp4jax.config import default_config

TOKENS = 100_000_000_000
SEQUENCES_PER_MICROBATCH = 16


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.seq_len = 4096  # assumed
    config.batch_size = 256  # assumed: 1.05M tokens a step
    config.steps = TOKENS // (256 * 4096)
    # 2 sequences a device on 8 devices; follows --config.batch_size, so that a batch of 1 is one microbatch.
    sequences = config.get_oneway_ref("batch_size") + (SEQUENCES_PER_MICROBATCH - 1)
    config.microbatches = sequences // SEQUENCES_PER_MICROBATCH

    config.model.vocab_size = 151936
    config.model.hidden_size = 1024
    config.model.num_layers = 28
    config.model.num_heads = 16
    config.model.num_kv_heads = 8
    config.model.head_dim = 128
    config.model.intermediate_size = 3072
    config.model.remat = "linear_inputs"  # assumed

    config.optimizer.learning_rate = 6e-4  # assumed
    config.optimizer.warmup_steps = 2000  # assumed
    config.optimizer.end_learning_rate_fraction = 0.1  # assumed
    config.optimizer.b1 = 0.9  # assumed
    config.optimizer.b2 = 0.95  # assumed
    config.optimizer.weight_decay = 0.1  # assumed
    config.optimizer.clip_norm = 1.0  # assumed

    config.data.tokenizer = "embedded"  # its 4096 ids are the first of the 151936
    config.mesh.data = -1
    config.checkpoint.every = 1000
    config.evaluation.every = 1000
    config.evaluation.batches = 16
    return config
