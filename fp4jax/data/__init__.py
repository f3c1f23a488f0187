"""Training data: from shards of documents to batches of tokens that resume exactly. Nothing here needs a device.

In the order in which data flows; each module explains itself first.
"""

# What a user's mistake raises, wherever it is met: one line, a ValueError.
from fp4jax.data.errors import DataError

# shards: which files a `source` names ("embedded", a folder, a glob), and their lines. A truncated shard is an error.
from fp4jax.data.shards import find_shards

# documents: the texts in the lines, the count of lines without one, and the split by document.
from fp4jax.data.documents import BadLines, Document, read_documents, split_of

# tokenizers: "embedded", "qwen3", "smollm2-135m", or the path of a tokenizer.json or .gguf file.
from fp4jax.data.tokenizers import Tokenizer, load_tokenizer

# packing: documents' tokens → one stream → rows of seq_len + 1 tokens.
from fp4jax.data.packing import PackedRows

# corpus, cache: the tokenized corpus as files, written once, mapped into memory afterwards (folder: FP4JAX_CACHE).
from fp4jax.data.cache import cache_folder
from fp4jax.data.corpus import TokenizedCorpus

# statistics: documents, tokens, rows, unigram entropy.
from fp4jax.data.statistics import DatasetStats, unigram_entropy

# gguf: a pretrained model's file, with the tokenizer inside it.
from fp4jax.data.gguf import GGUFFile, find_gguf

# held_out: rows of validation text for measurements on a model, in a fixed order.
from fp4jax.data.held_out import HeldOutText, held_out_text

# pipeline: the whole way. `open_dataset(config.data, seq_len=..., batch_size=..., seed=...).batches()`.
from fp4jax.data.pipeline import Batch, BatchIterator, Dataset, open_dataset

__all__ = [
    "BadLines",
    "Batch",
    "BatchIterator",
    "DataError",
    "Dataset",
    "DatasetStats",
    "Document",
    "GGUFFile",
    "HeldOutText",
    "PackedRows",
    "TokenizedCorpus",
    "Tokenizer",
    "cache_folder",
    "find_gguf",
    "find_shards",
    "held_out_text",
    "load_tokenizer",
    "open_dataset",
    "read_documents",
    "split_of",
    "unigram_entropy",
]
