"""Kills a training run at random moments and shows that it ends where an undisturbed one does.

    python -m fp4jax.testing.faults --kills=50 [--workdir=runs/faults] [--config=FILE] [--seed=0] [--output=FILE]
    python -m fp4jax.testing.faults --processes=2 --kills=10 ...

SIGKILLs fall into steps, into saves and into the data reader; of several processes (on this machine, two CPU devices
each) they hit one, and the others have to end by themselves. Every restart must go on from the newest checkpoint that
was committed, and the final parameters and optimizer state, and the metrics of every step, must be those of the
undisturbed run bit for bit. Exit codes: 0 they are, 1 they are not, or an error.
"""

import json
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from fp4jax.testing.kills import kill_and_compare, tiny_config
from fp4jax.training.command import run

CONFIG = config_flags.DEFINE_config_file("config", None, "The run; by default a tiny one.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "runs/faults", "Folder for both runs; new.")
KILLS = flags.DEFINE_integer("kills", 5, "How many times the run is killed.", lower_bound=1)
PROCESSES = flags.DEFINE_integer("processes", 1, "Processes that train together.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Draws the moments.", lower_bound=0)
OUTPUT = flags.DEFINE_string("output", None, "JSON file with what happened.")


def main() -> None:
    """Runs, prints a line and writes the JSON; raises ValueError if the runs differ."""
    config = CONFIG.value
    if config is None:
        config = tiny_config(KILLS.value, PROCESSES.value)
    elif not (path := Path(config_flags.get_config_filename(flags.FLAGS["config"]))).is_file():
        raise ValueError(f"--config={path}: there is no such file")
    outcome = kill_and_compare(config, Path(WORKDIR.value), KILLS.value, SEED.value, PROCESSES.value)
    if OUTPUT.value:
        path = Path(OUTPUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(outcome.to_json(config), indent=1) + "\n", encoding="utf-8")
    if outcome.failures:
        raise ValueError(str(outcome))
    print(outcome)


if __name__ == "__main__":
    sys.exit(run(main))
