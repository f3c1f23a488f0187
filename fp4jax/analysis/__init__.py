"""What is measured on arrays and models: numbers apart from plots, each behind a subcommand of `fp4jax.analyze`."""
