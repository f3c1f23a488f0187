"""Records of runs that nobody made."""

from fp4jax.comparison.records import Record


def record(recipe, seed, loss, **fields):
    """A run that ended with this validation loss; None: it diverged."""
    values = {
        "steps": [10, 20, 30],
        "losses": [8.0, 7.0, loss or 9.0],
        "validation_steps": [15, 30],
        "validation_losses": [7.5, loss or 9.0],
        "diverged": None if loss else "step 31: loss nan",
        "seconds_per_step": 0.5,
        "tokens_per_step": 1000.0,
        "peak_memory_bytes": 10**9,
        "peak_memory_of": "process",
        "device": "1 x cpu",
        "jax": "0",
        "health": {},
    }
    return Record(recipe=recipe, seed=seed, **values | fields)
