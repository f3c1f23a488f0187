"""SmolLM2-135M, trained further from its published weights: recipes compared on a real model, with its mean bias.

Command:   make models && python train.py --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m
Hardware:  one H100 or H200 (FP4 emulated) for the whole run; with `--config.steps=3 --config.batch_size=1
           --config.seq_len=128 --config.evaluation.batches=1` three real steps on 2 CPU cores with 8 GB
Time:      not run in full
Expect:    the first step's loss is that of a trained model, 3.1 to 3.4 nats on the embedded corpus, and not ln 49152 =
           10.8 (docs/weights.md has the steps that were run)

The sizes are those of the weights (arXiv 2502.02737), which a run refuses to differ from; what the optimizer does is
assumed. The weights are read from 4-bit integers, so the master weights start on those values.
"""

import ml_collections

from fp4jax.config import default_config

SMOLLM2 = "smollm2-135m"


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.recipe = "averis"
    config.init_from = SMOLLM2
    config.data.tokenizer = SMOLLM2
    config.seq_len = 1024  # assumed
    config.batch_size = 32  # assumed
    config.microbatches = 1
    config.steps = 500  # assumed: 16M tokens, 6 times the embedded corpus

    config.model.name = "llama"
    config.model.vocab_size = 49152
    config.model.hidden_size = 576
    config.model.num_layers = 30
    config.model.num_heads = 9
    config.model.num_kv_heads = 3
    config.model.head_dim = 64
    config.model.intermediate_size = 1536
    config.model.rope_theta = 1e5
    config.model.rms_norm_eps = 1e-5
    config.model.tie_embeddings = True
    config.model.remat = "linear_inputs"  # assumed

    config.optimizer.learning_rate = 1e-4  # assumed: a fiftieth of the 5e-3 it was trained with
    config.optimizer.warmup_steps = 20  # assumed
    config.optimizer.weight_decay = 0.01  # assumed
    config.evaluation.every = 100
    return config
