"""Qwen3-0.6B with Averis: mean split of activations and gradients, everything in FP4 (arXiv 2603.10444).

Command:   python train.py --config=configs/averis_0p6b.py --workdir=runs/averis_0p6b
Hardware:  8 x H200 (FP4 emulated) for the whole run; `--config.steps=2 --config.batch_size=1 --config.seq_len=128`
           takes two real steps on 2 CPU cores with 24 GB
Time:      not run. Estimated 38 device-days (4.8 days on 8 x H200) for 100B tokens: 5.0 GFLOP a token, 150 TFLOP/s
           sustained a device (assumed, for emulated FP4)
Expect:    not run. The paper reports a loss 1.19 % above BF16 after 100B tokens

The default data is the embedded corpus, so that the command works offline; its 2.4M tokens repeat thousands of times.
For the paper's setting: --config.data.source=/data/dclm --config.data.tokenizer=qwen3
"""

import ml_collections

from configs import qwen3_0p6b


def get_config() -> ml_collections.ConfigDict:
    config = qwen3_0p6b.get_config()
    config.recipe = "averis"
    return config
