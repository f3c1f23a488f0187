"""Train a language model.

    python train.py --config=configs/averis_tiny.py [--workdir=runs/averis_tiny] [--config.key=value ...]

Rerunning the same command continues after the last checkpoint.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from fp4jax.training import train
from fp4jax.training.launch import run

CONFIG = config_flags.DEFINE_config_file("config", None, "File with the run's configuration.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; by default runs/<name of the config file>.")
ALLOW_CHANGE = flags.DEFINE_bool("allow_config_change", False, "Let a run go on with another configuration.")


def main() -> None:
    if CONFIG.value is None:
        raise ValueError("--config is missing; for a first run: --config=configs/averis_tiny.py")
    path = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    if not path.is_file():
        raise ValueError(f"--config={path}: there is no such file")
    train(CONFIG.value, WORKDIR.value or Path("runs") / path.stem, allow_config_change=ALLOW_CHANGE.value)


if __name__ == "__main__":
    sys.exit(run(main))
