"""Says which GPU JAX sees, and fails where it sees none: tests would all be skipped there, with exit code 0.

python -m benchmarks.device
"""

import sys
from collections.abc import Sequence

import jax

from fp4jax.cli import Parser, run

COMMAND = "benchmarks.device"


def main(arguments: Sequence[str]) -> None:
    """Prints the device.

    Raises:
      NotImplementedError: it is no GPU.
    """
    Parser(COMMAND, (__doc__ or "").partition("\n")[0]).parse_args(arguments)
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise NotImplementedError(
            f"JAX {jax.__version__} sees no GPU, its device is {device.device_kind} ({device.platform}): "
            'pip install "jax[cuda13]", and see that JAX_PLATFORMS does not say cpu'
        )
    print(f"{len(jax.devices())} x {device.device_kind}, JAX {jax.__version__}")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
