"""Is this quantizer NVFP4? Golden vectors and laws for any callable, ours or another package's.

    from fp4jax.testing import conformance
    print(conformance(fp4jax.quantize, lambda x, key: fp4jax.quantize(x, rounding="stochastic", key=key)))

`examples/conformance_of_peers.py` runs it on other packages.
"""

from fp4jax.testing.kit import conformance
from fp4jax.testing.table import Row, Table

__all__ = ["Row", "Table", "conformance"]
