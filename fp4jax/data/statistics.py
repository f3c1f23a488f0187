"""Statistics of a tokenized corpus: what the first log lines of a run say, and what a trained model must beat."""

import dataclasses

import numpy as np
from jaxtyping import Integer


@dataclasses.dataclass(frozen=True)
class DatasetStats:
    """What one split of a corpus holds.

    Attributes:
      source: the `data.source` of the configuration.
      split: "train" or "validation".
      tokenizer: the tokenizer's name.
      vocab_size: the tokenizer's; a model's vocabulary must be at least this large.
      end_of_text: the id after every document.
      shards: files that the corpus was read from.
      documents: documents in this split.
      tokens: tokens in this split, one end-of-text for every document included.
      rows: rows of `seq_len + 1` tokens; see `packing.py`.
      tokens_left_out: tokens at the end of the split that fill no whole row.
      bad_lines: lines of the shards, both splits together, that hold no document and were skipped.
      bad_lines_report: one line for a log: how many, of how many, why, and the first of them.
      unigram_entropy: nats per token of this split's own token frequencies, see `unigram_entropy`. Of several sources
        the mean of theirs, by weight in training and by rows in validation: what a model without context can reach
        that knows which source a token is from.
    """

    source: str
    split: str
    tokenizer: str
    vocab_size: int
    end_of_text: int
    shards: int
    documents: int
    tokens: int
    rows: int
    tokens_left_out: int
    bad_lines: int
    bad_lines_report: str
    unigram_entropy: float


def unigram_entropy(counts: Integer[np.ndarray, " vocab"]) -> float:
    """Entropy of token frequencies, H = -sum_v p_v ln p_v with p_v = counts_v / sum(counts), in nats per token.

    It is the lowest cross-entropy that a model without context can reach on these tokens (Shannon 1948, section 6): a
    loss below it was learned from context. Zero for no tokens.

    >>> round(unigram_entropy(np.array([2, 1, 1])), 4)  # 1.5 bits
    1.0397
    """
    present = counts[counts > 0].astype(np.float64)
    if not len(present):
        return 0.0
    p = present / present.sum()
    return float(max(0.0, -(p * np.log(p)).sum()))
