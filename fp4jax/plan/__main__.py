r"""Compiles the training step of a configuration for machines that are not there, and says what it needs on them.

    python -m fp4jax.plan --config=configs/averis_0p6b.py --target=h200:8[,b200:8,v5e:4x4] [--out=plan.json] \
        [--config.key=value ...]

Memory, FLOPs, collectives, products native, fused or emulated, kernels: docs/plan.md. Needs requirements-plan.txt, no
GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from fp4jax import provenance
from fp4jax.cli import check_output_file
from fp4jax.plan import kernels, table, targets
from fp4jax.training.command import DEBUG, run

CONFIG = config_flags.DEFINE_config_file("config", None, "File with the run's configuration.", lock_config=True)
TARGET = flags.DEFINE_list("target", None, "Machines, such as h200:1, b200:8 or v5e:4x4.")
OUT = flags.DEFINE_string("out", None, "File for the plans as JSON.")


def main() -> None:
    if CONFIG.value is None or not TARGET.value:
        raise ValueError("--config and --target are needed: --config=configs/averis_0p6b.py --target=h200:8")
    path = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    if not path.is_file():
        raise ValueError(f"--config={path}: there is no such file")
    chosen = [targets.parse(name) for name in TARGET.value]
    for target in chosen:
        target.check_installed()
    if OUT.value:
        check_output_file(Path(OUT.value), "--out")
    about = provenance.about("fp4jax.plan", sys.argv[1:])  # before the work: of the code that does it
    plans = []
    for target in chosen:
        plans.append({"config": provenance.without_folders(str(path))} | _in_a_process(CONFIG.value, target))
        print("\n".join(table.lines(plans[-1])), end="\n\n", flush=True)
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(about | {"plans": plans}, indent=1) + "\n", encoding="utf-8")


def _in_a_process(config: ml_collections.ConfigDict, target: targets.Target) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        given, found, dump = Path(folder) / "config.json", Path(folder) / "plan.json", Path(folder) / "kernels"
        dump.mkdir()
        given.write_text(json.dumps(config.to_dict()), encoding="utf-8")
        command = [sys.executable, "-m", "fp4jax.plan.step", given, target.name, found]
        if DEBUG.value:
            command.append("--debug")
        environment = os.environ | targets.ENVIRONMENT | kernels.environment(dump)
        process = subprocess.run(command, env=environment, stderr=None if DEBUG.value else subprocess.PIPE, text=True)
        if process.returncode:
            last = (process.stderr or "").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise ValueError(f"{target.name}: {last[0].removeprefix('error: ')}")
        return json.loads(found.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(run(main))
