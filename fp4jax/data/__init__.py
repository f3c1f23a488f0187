"""Training data: from shards of documents to batches of tokens that resume exactly. Nothing here needs a device.

The table of contents, in the order in which data flows; each module explains itself first. A name is loaded when it is
first used: a process that only tokenizes does not load what only reads batches.
"""

import importlib

# Public name → the module that defines it.
_DEFINED_IN = {
    # What a user's mistake raises, wherever it is met: one line, a ValueError.
    "DataError": "fp4jax.data.errors",
    # Which files a `source` names ("embedded", a folder, a glob). A truncated shard is an error.
    "find_shards": "fp4jax.data.shards",
    # The texts in the lines, the count of lines without one, and the split by document.
    "BadLines": "fp4jax.data.documents",
    "Document": "fp4jax.data.documents",
    "read_documents": "fp4jax.data.documents",
    "split_of": "fp4jax.data.documents",
    # "embedded", "qwen3", "smollm2-135m", the path of a tokenizer.json or .gguf file, or a name on the hub.
    "Tokenizer": "fp4jax.data.tokenizers",
    "load_tokenizer": "fp4jax.data.tokenizers",
    # Documents' tokens → one stream → rows of seq_len + 1 tokens, and which document each of them belongs to.
    "PackedRows": "fp4jax.data.packing",
    "document_segments": "fp4jax.data.packing",
    # The tokenized corpus as files, written once, mapped into memory afterwards (folder: FP4JAX_CACHE).
    "cache_folder": "fp4jax.data.cache",
    "TokenizedCorpus": "fp4jax.data.corpus",
    # The shards of `python -m fp4jax.data.prepare` (fp4jax/data/prepare/): a corpus tokenized beforehand, of any size.
    "PreparedSet": "fp4jax.data.prepared",
    # Documents, tokens, rows, unigram entropy.
    "DatasetStats": "fp4jax.data.statistics",
    "unigram_entropy": "fp4jax.data.statistics",
    # A pretrained model's file, with the tokenizer inside it.
    "GGUFFile": "fp4jax.data.gguf",
    "find_gguf": "fp4jax.data.gguf",
    # Rows of validation text for measurements on a model, in a fixed order.
    "HeldOutText": "fp4jax.data.held_out",
    "held_out_text": "fp4jax.data.held_out",
    # The whole way: `open_dataset(config.data, seq_len=..., batch_size=..., seed=...).batches()`.
    "Batch": "fp4jax.data.pipeline",
    "BatchIterator": "fp4jax.data.pipeline",
    "Dataset": "fp4jax.data.pipeline",
    "open_dataset": "fp4jax.data.pipeline",
}

__all__ = list(_DEFINED_IN)


def __getattr__(name: str):
    if name in _DEFINED_IN:
        value = getattr(importlib.import_module(_DEFINED_IN[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fp4jax.data' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
