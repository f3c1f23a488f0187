"""Held-out text for measurements on a model: rows of tokens, each from one document, in an order that never changes."""

import dataclasses

import ml_collections
import numpy as np
from jaxtyping import Int32

from fp4jax.data.documents import BadLines, Document, read_documents, split_of
from fp4jax.data.errors import DataError
from fp4jax.data.shards import find_shards
from fp4jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class HeldOutText:
    """Rows of held-out text.

    Attributes:
      tokens: int32 [N, T].
      documents: the N documents that the rows are from.
      offsets: the N positions in their documents, in tokens, where the rows begin.
    """

    tokens: Int32[np.ndarray, "N T"]
    documents: tuple[Document, ...]
    offsets: tuple[int, ...]


def held_out_text(
    data_config: ml_collections.ConfigDict, tokenizer: Tokenizer, *, seq_len: int, rows: int
) -> HeldOutText:
    """The first `rows` rows of the validation split.

    First come the beginnings of all its documents, then their second `seq_len` tokens, and so on; the rest of a
    document that fills no row is left out. A row is text alone: no end-of-text token stands in it. The default split of
    the embedded corpus has five documents: Reagan 1986, Jackson 1831, Grant 1873, Truman 1949 and Nixon 1972, in this
    order. They are held out of our training; a model that others trained may have read them.

    >>> from fp4jax.config import default_config
    >>> from fp4jax.data.tokenizers import load_tokenizer
    >>> config = default_config().data
    >>> held_out_text(config, load_tokenizer(config.tokenizer), seq_len=128, rows=4).tokens.shape
    (4, 128)

    Args:
      data_config: `config.data`, of which source, text_key, validation_fraction and max_bad_fraction count.
      tokenizer: the model's own.
      seq_len: tokens in a row, T.
      rows: N.

    Raises:
      DataError: the corpus cannot be read, or holds fewer rows.
    """
    bad_lines = BadLines(float(data_config.max_bad_fraction))
    documents = [
        document
        for document in read_documents(find_shards(data_config.source), data_config.text_key, bad_lines)
        if split_of(document.text, float(data_config.validation_fraction)) == "validation"
    ]
    encoded = tokenizer.encode_batch([document.text for document in documents])
    pieces = sorted(
        (offset, index) for index, ids in enumerate(encoded) for offset in range(0, len(ids) - seq_len + 1, seq_len)
    )
    if len(pieces) < rows:
        raise DataError(
            f"the validation split of {str(data_config.source)!r} holds {len(pieces):,} rows of {seq_len:,} tokens, "
            f"{rows:,} were asked for; ask for fewer or shorter ones, or raise data.validation_fraction="
            f"{data_config.validation_fraction:g}"
        )
    chosen = pieces[:rows]
    tokens = np.array([encoded[index][offset : offset + seq_len] for offset, index in chosen], np.int32)
    return HeldOutText(
        tokens.reshape(rows, seq_len),
        tuple(documents[index] for _, index in chosen),
        tuple(offset for offset, _ in chosen),
    )
