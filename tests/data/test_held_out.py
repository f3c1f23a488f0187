"""Held-out text: whole pieces of validation documents, beginnings first."""

import numpy as np
import pytest

from fp4jax.config import default_config
from fp4jax.data import DataError, held_out_text, load_tokenizer, split_of

EMBEDDED = load_tokenizer("embedded")


def test_rows_are_pieces_of_validation_documents():
    data = default_config().data
    text = held_out_text(data, EMBEDDED, seq_len=64, rows=12)
    assert text.tokens.shape == (12, 64) and text.tokens.dtype == np.int32
    assert text.offsets == (0,) * 5 + (64,) * 5 + (128,) * 2
    assert len({document.text for document in text.documents[:5]}) == 5
    assert text.documents[5:] == (*text.documents[:5], *text.documents[:2])
    for row, document, offset in zip(text.tokens, text.documents, text.offsets, strict=True):
        assert split_of(document.text, data.validation_fraction) == "validation"
        assert row.tolist() == EMBEDDED.encode(document.text)[offset : offset + 64]
    more = held_out_text(data, EMBEDDED, seq_len=64, rows=20)
    np.testing.assert_array_equal(more.tokens[:12], text.tokens)
    assert more.documents[0].text.startswith("Mr. Speaker, Mr. President, distinguished Members of the Congress")


def test_short_documents_are_left_out(data_config, write_shard):
    write_shard(["the treaty " * 40, "union"])
    config = data_config(validation_fraction=0.999_999)
    text = held_out_text(config, EMBEDDED, seq_len=16, rows=2)
    assert text.offsets == (0, 16) and {document.line for document in text.documents} == {1}


def test_more_rows_than_there_are(data_config, write_shard):
    write_shard(["the treaty " * 40])
    with pytest.raises(DataError, match="holds 0 rows of 4,096 tokens, 1 were asked for; ask for fewer"):
        held_out_text(data_config(validation_fraction=0.999_999), EMBEDDED, seq_len=4096, rows=1)
