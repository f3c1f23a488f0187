"""Qwen3-0.6B with Averis' residual taken against the quantized mean: an exact split, everything in FP4.

Command:   python train.py --config=configs/averis_centered_0p6b.py --workdir=runs/averis_centered_0p6b
Hardware:  8 x H200 (FP4 emulated)
Time:      not run. Estimated 38 device-days (4.8 days on 8 x H200) for 100B tokens: 5.0 GFLOP a token,
           150 TFLOP/s sustained a device (assumed, for emulated FP4)
Expect:    not run. To be compared with averis_0p6b; the paper does not have this recipe

Runs offline on the embedded corpus. The paper's: --config.data.source=/data/dclm --config.data.tokenizer=qwen3
"""

import ml_collections

from configs import qwen3_0p6b


def get_config() -> ml_collections.ConfigDict:
    config = qwen3_0p6b.get_config()
    config.recipe = "averis_centered"
    return config
