"""A Qwen3 of 63 million parameters, embedding included: the largest whose comparison with seeds fits minutes of a GPU.

Command:   experiments/compare_60m.sh runs/compare_60m      (several recipes and seeds, on experiments/corpus.sh's text)
           python train.py --config=configs/qwen3_60m.py --workdir=runs/qwen3_60m --config.recipe=averis_best
Hardware:  one GPU with 80 GB
Time:      240 steps of bf16 in 46 s, of averis_best in 134 s, compilation included (an H200, three runs at a time)
Expect:    validation loss 4.97 (bf16) and 4.99 (averis_best) after 240 steps, means of five seeds (RESULTS.md)

All values are assumed: the paper's smallest model has 0.6 billion parameters. Wide for its 8 layers, so that the
products are large enough to keep a GPU busy at 16,384 tokens a step.

configs/qwen3_60m.py reads the prepared set of experiments/corpus.sh; --config.data.source=embedded
--config.data.tokenizer=embedded runs without it.
"""

import ml_collections

from fp4jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.recipe = "averis_best"
    config.steps = 600  # 9.8M tokens, two fifths of the corpus
    config.batch_size = 32
    config.seq_len = 512

    config.model.vocab_size = 16384
    config.model.hidden_size = 768
    config.model.num_layers = 8
    config.model.num_heads = 12
    config.model.num_kv_heads = 4
    config.model.head_dim = 64
    config.model.intermediate_size = 2048

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 60

    config.data.source = "runs/corpus/prepared"
    config.data.tokenizer = "runs/corpus/tokenizer.json"
    config.data.prefetch = 8
    config.checkpoint.every = 1_000_000  # at the end alone
    config.evaluation.every = 100
    config.evaluation.batches = 0  # the whole validation split, half a million tokens
    return config
