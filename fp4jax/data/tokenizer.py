"""`python -m fp4jax.data.tokenizer train`: a byte-level BPE (Sennrich et al. 2016) of one's own text.

    python -m fp4jax.data.tokenizer train --source=/data/dclm --output=tokenizer.json --vocab_size=32768

It learns from the documents of the training split and writes a Hugging Face `tokenizer.json`, which
`config.data.tokenizer` takes by its path. The same text gives the same bytes.
"""

import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Sequence

import tokenizers

from fp4jax.cli import Parser, run
from fp4jax.config import default_config
from fp4jax.data.documents import BadLines, read_documents, split_of
from fp4jax.data.errors import DataError
from fp4jax.data.shards import find_shards

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257
"""Entries of a tokenizer without a merge: all bytes, and the end-of-text token."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE whose token 0 is END_OF_TEXT; it decodes to exactly the bytes that were encoded.

    Args:
      texts: is gone through once.
      vocab_size: entries, all 256 bytes and the end-of-text token among them; fewer where the text runs out of pairs.
    """
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: tokenizers.Tokenizer, path: pathlib.Path) -> None:
    """Writes a `tokenizer.json`, whole or not at all; raises OSError where that is not possible."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        try:
            file.write(tokenizer.to_str() + "\n")
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def main(arguments: Sequence[str]) -> None:
    """Trains what the flags say."""
    flags = _parser().parse_args(arguments)
    if flags.vocab_size < SMALLEST:
        raise DataError(
            f"--vocab_size={flags.vocab_size}: must be at least {SMALLEST}: every byte, and the end of text"
        )
    path = flags.output / "tokenizer.json" if flags.output.is_dir() else flags.output
    if path.suffix != ".json" or not path.parent.is_dir():
        raise DataError(f"--output={flags.output}: give a folder that exists, or a file NAME.json in one")
    if path.exists():
        raise DataError(
            f"--output={path} is there already; remove it or name another, models depend on their tokenizer"
        )
    counts = {"documents": 0, "characters": 0}
    tokenizer = train_bpe(_training_texts(flags, counts), flags.vocab_size)
    if not counts["documents"]:
        raise DataError(f"--source={flags.source} has no document in its training split to learn from")
    write_tokenizer(tokenizer, path)
    entries = tokenizer.get_vocab_size()
    short = f" (not {flags.vocab_size:,}: the text has no more pairs that repeat)" if entries < flags.vocab_size else ""
    print(
        f"{path}: {entries:,} entries{short}, learned from {counts['characters']:,} characters in "
        f"{counts['documents']:,} documents of {flags.source}"
    )


def _training_texts(flags, counts: dict[str, int]) -> Iterable[str]:
    bad = BadLines(flags.max_bad_fraction)
    for document in read_documents(find_shards(flags.source), flags.text_key, bad):
        if counts["characters"] >= flags.max_characters:
            return
        if split_of(document.text, flags.validation_fraction) == "train":
            counts["documents"] += 1
            counts["characters"] += len(document.text)
            yield document.text


def _parser() -> Parser:
    data = default_config().data
    parser = Parser("fp4jax.data.tokenizer", "Makes a tokenizer.")
    parser.add_argument("action", choices=["train"], help="train: a byte-level BPE from text")
    parser.add_argument("--source", required=True, help="'embedded', a folder, a glob or a file of text shards")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="tokenizer.json to write, or its folder")
    parser.add_argument("--vocab_size", type=int, required=True, help="entries")
    parser.add_argument("--text_key", default=data.text_key, help="key of the text")
    fraction = {"type": float, "default": data.validation_fraction}
    parser.add_argument("--validation_fraction", **fraction, help="of documents that it does not learn from")
    fraction = {"type": float, "default": data.max_bad_fraction}
    parser.add_argument("--max_bad_fraction", **fraction, help="of lines that hold no document")
    parser.add_argument("--max_characters", type=int, default=1_000_000_000, help="it learns from so many at most")
    return parser


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
