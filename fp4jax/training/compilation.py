"""Compiled programs are kept on disk: the second start of a run does not compile again."""

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> Path:
    """Turns on JAX's persistent compilation cache in `$FP4JAX_CACHE/xla`, by default `~/.cache/fp4jax/xla`.

    A folder that JAX_COMPILATION_CACHE_DIR or the JAX configuration already names is kept. Returns the folder.
    """
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    root = os.environ.get("FP4JAX_CACHE") or Path.home() / ".cache" / "fp4jax"
    folder = Path(root).expanduser().absolute() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return folder
