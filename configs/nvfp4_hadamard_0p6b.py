"""Qwen3-0.6B with NVIDIA's NVFP4 recipe (arXiv 2509.25149): 16x16 weight blocks, Hadamard-16 on the weight gradient.

Command:   python train.py --config=configs/nvfp4_hadamard_0p6b.py --workdir=runs/nvfp4_hadamard_0p6b
Hardware:  8 x H200 (FP4 emulated)
Time:      not run. Estimated 38 device-days (4.8 days on 8 x H200) for 100B tokens: 5.0 GFLOP a token,
           150 TFLOP/s sustained a device (assumed, for emulated FP4)
Expect:    not run. The paper reports a loss 2.05 % above BF16 after 100B tokens

Runs offline on the embedded corpus. The paper's: --config.data.source=/data/dclm --config.data.tokenizer=qwen3
"""

import ml_collections

from configs import qwen3_0p6b


def get_config() -> ml_collections.ConfigDict:
    config = qwen3_0p6b.get_config()
    config.recipe = "nvfp4_hadamard"
    return config
