"""`fp4jax.report` on the training step of a configuration."""
