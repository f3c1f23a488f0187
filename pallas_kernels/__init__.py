"""GPU kernels, one folder an op, each equal to its twin in `fp4jax.numerics`; `fp4jax/dot.py` alone calls them."""
