"""Compiled programs are kept on disk: the second start of a run does not compile again, as far as JAX finds them.

It does not find programs of several devices that hold a call of JAX's `custom_partitioning`: kernels and products of
codes (`pallas_kernels.partition`, `partition_products`), attention by cuDNN. Such a call stands in the program as the
address of a Python object, another one in every process, and the key is made of the program. JAX can leave the address
out (`jax_remove_custom_partitioning_ptr_from_cache_key`), for all such calls alike. But nothing else in the key tells
how a call is cut, which kernel it runs or what numbers cuDNN is given: after a change of these the old program would be
run. So such programs are compiled at every start.
"""

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> Path:
    """Turns on JAX's persistent compilation cache in `$FP4JAX_CACHE/xla`, by default `~/.cache/fp4jax/xla`.

    What it does not serve is said above.

    A folder that JAX_COMPILATION_CACHE_DIR or the JAX configuration already names is kept. Returns the folder.
    """
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    root = os.environ.get("FP4JAX_CACHE") or Path.home() / ".cache" / "fp4jax"
    folder = Path(root).expanduser().absolute() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return folder
