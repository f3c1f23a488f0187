"""Qwen3-0.6B in vanilla NVFP4: 1x16 blocks everywhere, stochastic rounding of the gradients, no transform.

Command:   python train.py --config=configs/nvfp4_0p6b.py --workdir=runs/nvfp4_0p6b
Hardware:  8 x H200 (FP4 emulated)
Time:      not run. Estimated 38 device-days (4.8 days on 8 x H200) for 100B tokens: 5.0 GFLOP a token,
           150 TFLOP/s sustained a device (assumed, for emulated FP4)
Expect:    not run. The paper calls this recipe "vanilla FP4"

Runs offline on the embedded corpus. The paper's: --config.data.source=/data/dclm --config.data.tokenizer=qwen3
"""

import ml_collections

from configs import qwen3_0p6b


def get_config() -> ml_collections.ConfigDict:
    config = qwen3_0p6b.get_config()
    config.recipe = "nvfp4"
    return config
