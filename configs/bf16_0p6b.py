"""Qwen3-0.6B in BF16: the baseline of the FP4 recipes.

Command:   python train.py --config=configs/bf16_0p6b.py --workdir=runs/bf16_0p6b
Hardware:  8 x H200
Time:      not run. Estimated 14 device-days (1.8 days on 8 x H200) for 100B tokens: 5.0 GFLOP a token,
           400 TFLOP/s sustained a device (assumed: 40 % of the dense BF16 peak)
Expect:    not run. The paper gives losses only as gaps to this run

Runs offline on the embedded corpus. The paper's: --config.data.source=/data/dclm --config.data.tokenizer=qwen3
"""

import ml_collections

from configs import qwen3_0p6b


def get_config() -> ml_collections.ConfigDict:
    config = qwen3_0p6b.get_config()
    config.recipe = "bf16"
    return config
