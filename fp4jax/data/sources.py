"""Sources: what `config.data.source` names, opened.

    embedded, FOLDER, GLOB, FILE    shards of text, tokenized into the cache when they are first used
    FOLDER with an index.json       a prepared set (`python -m fp4jax.data.prepare`)
    A:0.7,B:0.3                     several of these, mixed by weight

Whatever a source is, it gives the same stream of tokens for the same documents.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping

import ml_collections

from fp4jax.data.cache import tokenized_corpus
from fp4jax.data.documents import BadLines
from fp4jax.data.errors import DataError
from fp4jax.data.packing import TokenStream
from fp4jax.data.prepared import PreparedSet, is_prepared
from fp4jax.data.shards import find_shards
from fp4jax.data.tokenizers import Tokenizer

_WEIGHTED = re.compile(r"(.+):([0-9.]+(?:e-?[0-9]+)?)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a source: its token stream, a hash of that, documents, tokens, unigram entropy in nats."""

    stream: TokenStream
    digest: str
    documents: int
    tokens: int
    unigram_entropy: float


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
      name: what the user called it.
      weight: its share of the training rows, all sources' weights together being 1.
      shards: files it was read from.
      split: the one that was asked for.
      bad_lines: lines without a document, skipped; of a prepared set none, its own report has them.
    """

    name: str
    weight: float
    shards: int
    split: Split
    bad_lines: BadLines


def open_sources(data_config: ml_collections.ConfigDict, tokenizer: Tokenizer, split: str) -> tuple[Source, ...]:
    """Opens one split of all sources.

    Raises:
      DataError: a source cannot be read, or was prepared with another tokenizer or validation_fraction.
    """
    named = parse_sources(str(data_config.source))
    total = math.fsum(named.values())
    return tuple(_open(name, weight / total, data_config, tokenizer, split) for name, weight in named.items())


def parse_sources(source: str) -> Mapping[str, float]:
    """The sources that a text names and their weights: {"A": 0.7, "B": 0.3} for "A:0.7,B:0.3".

    A text of which not every part between commas ends in a weight is the name of one source.

    Raises:
      DataError: a weight that is not positive, or a source that is named twice.
    """
    matches = [_WEIGHTED.fullmatch(part.strip()) for part in source.split(",")]
    if not all(matches):
        return {source: 1.0}
    weights = {}
    for match in matches:
        name = match[1].strip()
        try:
            weight = float(match[2])
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise DataError(f"data.source: the weight {match[2]!r} of {name!r} must be a number above 0")
        if name in weights:
            raise DataError(f"data.source names {name!r} twice; give it one weight, the sum")
        weights[name] = weight
    return weights


def _open(name: str, weight: float, data_config: ml_collections.ConfigDict, tokenizer: Tokenizer, split: str) -> Source:
    folder = pathlib.Path(name).expanduser()
    max_bad_fraction, validation_fraction = float(data_config.max_bad_fraction), float(data_config.validation_fraction)
    if is_prepared(folder):
        prepared = PreparedSet.open(folder)
        _check_prepared(prepared, tokenizer, validation_fraction)
        own = prepared.splits[split]
        facts = Split(prepared.stream(split), own.digest, own.documents, own.tokens, own.unigram_entropy)
        return Source(name, weight, len(own.shards), facts, BadLines(max_bad_fraction))
    shards = find_shards(name)
    corpus = tokenized_corpus(
        shards,
        tokenizer,
        text_key=data_config.text_key,
        validation_fraction=validation_fraction,
        max_bad_fraction=max_bad_fraction,
    )
    own = corpus.splits[split]
    facts = Split(corpus.stream(split), own.digest, own.documents, own.tokens, own.unigram_entropy)
    return Source(name, weight, len(shards), facts, corpus.bad_lines)


def _check_prepared(prepared: PreparedSet, tokenizer: Tokenizer, validation_fraction: float) -> None:
    """Raises DataError unless a set is what tokenizing its texts now would give."""
    if prepared.tokenizer["fingerprint"] != tokenizer.fingerprint:
        raise DataError(
            f"{prepared.folder} was prepared with the tokenizer {prepared.tokenizer['name']!r}, which is not "
            f"data.tokenizer={tokenizer.name!r}; set data.tokenizer to that one, or prepare the data with this one"
        )
    was = prepared.options["validation_fraction"]
    if was != validation_fraction:
        raise DataError(
            f"{prepared.folder} was prepared with validation_fraction={was:g}, data.validation_fraction is "
            f"{validation_fraction:g}; set it to {was:g}, or prepare the data with it"
        )
