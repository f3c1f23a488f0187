"""Which documents a batch read: what to look at when a loss is not finite or spikes."""

from fp4jax.data.pipeline import Dataset


def documents_in_batch(dataset: Dataset, batch: int) -> str:
    return f"batch {batch:,}"
