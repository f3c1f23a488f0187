"""A Qwen3-MoE of 7B parameters, 1.6B of them active for a token, with Averis: everything but the router in FP4.

Command:   python train.py --config=configs/averis_moe_7b_a1p5b.py --workdir=runs/averis_moe_7b_a1p5b
Hardware:  accelerators with 87 GB for parameters and moments in all, and activations beside them;
           --config.mesh.expert=8 splits the experts
Time:      not run
Expect:    not run. The paper reports a loss 0.81 % above BF16 after 50B tokens

The paper (arXiv 2603.10444) names the model "Qwen3 7B-A1.5B" and its tokens (50B), and gives no dimension of it: all of
them are assumed, chosen to give 7.27B parameters and 1.63B active ones, embedding and head included.
"""

import ml_collections

from fp4jax.config import default_config

TOKENS = 50_000_000_000
SEQUENCES_PER_MICROBATCH = 16


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.recipe = "averis"
    config.seq_len = 4096  # assumed
    config.batch_size = 256  # assumed: 1.05M tokens a step
    config.steps = TOKENS // (256 * 4096)
    sequences = config.get_oneway_ref("batch_size") + (SEQUENCES_PER_MICROBATCH - 1)
    config.microbatches = sequences // SEQUENCES_PER_MICROBATCH

    config.model.name = "qwen3_moe"
    config.model.vocab_size = 151936
    config.model.hidden_size = 2048  # assumed
    config.model.num_layers = 16  # assumed
    config.model.num_heads = 16  # assumed
    config.model.num_kv_heads = 8  # assumed
    config.model.head_dim = 128  # assumed
    config.model.intermediate_size = 1024  # assumed; of one expert
    config.model.tie_embeddings = False  # assumed
    config.model.remat = "linear_inputs"  # assumed
    config.model.moe.num_experts = 64  # assumed
    config.model.moe.num_experts_per_token = 8  # assumed
    config.model.moe.norm_topk_prob = True
    config.model.moe.capacity = "1.25"  # assumed
    config.model.moe.router_loss_coefficient = 0.001  # assumed
    # A group for every sequence of a microbatch: what a device has of a batch is whole groups on any mesh.
    config.model.moe.groups = config.get_oneway_ref("batch_size") // config.get_oneway_ref("microbatches")

    config.optimizer.learning_rate = 4e-4  # assumed
    config.optimizer.warmup_steps = 2000  # assumed
    config.optimizer.end_learning_rate_fraction = 0.1  # assumed
    config.optimizer.b1 = 0.9  # assumed
    config.optimizer.b2 = 0.95  # assumed
    config.optimizer.weight_decay = 0.1  # assumed
    config.optimizer.clip_norm = 1.0  # assumed

    config.data.tokenizer = "embedded"  # its 4096 ids are the first of the 151936
    config.mesh.fsdp = -1
    config.checkpoint.every = 1000
    config.evaluation.every = 1000
    config.evaluation.batches = 16
    return config
