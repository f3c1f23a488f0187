"""Where results go: JSON that says which device, release, commit and command they are from."""

import json
import platform
import re
import sys
from pathlib import Path

import jax

from fp4jax import provenance
from fp4jax.hardware import huge_pages


def about(command: str) -> dict[str, object]:
    """What a result cannot be read without."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"{platform.machine()} CPU"
    return {
        "device": kind,
        "platform": device.platform,
        "jax": jax.__version__,
        **provenance.about(command, sys.argv[1:]),
        **({"huge_pages": huge_pages()} if device.platform == "cpu" else {}),
    }


def default_folder() -> Path:
    """benchmarks/results/<device>."""
    name = re.sub(r"[^a-z0-9]+", "_", str(about("")["device"]).lower()).strip("_")
    return provenance.ROOT / "benchmarks" / "results" / name


def write(path: Path, command: str, rows: list[dict], **more: object) -> None:
    """Writes the results so far; called after every row, so that a run that is cut short leaves what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about(command), **more, "rows": rows}, indent=1)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
