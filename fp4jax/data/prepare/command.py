"""The flags of `python -m fp4jax.data.prepare`."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from rich.console import Console

from fp4jax.cli import Parser
from fp4jax.config import default_config
from fp4jax.data.prepare.inputs import find_units
from fp4jax.data.prepare.options import ANY_LANGUAGE, Options
from fp4jax.data.prepare.run import prepare


def main(arguments: Sequence[str]) -> None:
    """Prepares what the flags say and prints the report."""
    flags = vars(_parser().parse_args(arguments))
    options = Options(**{field.name: flags[field.name] for field in dataclasses.fields(Options)})
    units = find_units(flags["source"], flags["tfds_split"], flags["tfds_dir"])
    console = Console(highlight=False, soft_wrap=True)
    report = prepare(
        units,
        flags["output"].expanduser(),
        options,
        workers=flags["workers"],
        max_bad_fraction=flags["max_bad_fraction"],
        console=console,
    )
    for line in report.lines():
        console.print(line)
    console.print(
        f"train on it with --config.data.source={flags['output']} --config.data.tokenizer={options.tokenizer}"
    )


def _parser() -> Parser:
    data = default_config().data
    parser = Parser("fp4jax.data.prepare", "Documents to training shards, once; run again to go on.")
    add = parser.add_argument
    add("--source", required=True, help="'embedded', a folder, a glob, a file, or tfds:NAME")
    add("--output", required=True, type=pathlib.Path, help="folder for the set")
    add("--tokenizer", default=data.tokenizer, help="as config.data.tokenizer")
    add("--workers", type=int, default=os.cpu_count(), help="processes; an input file is the work of one")
    add("--language", default="en", help=f"keep documents in this language (CLD2's code), or {ANY_LANGUAGE!r}")
    add("--min_language_share", type=float, default=0.65, help="of a document's bytes that must be in it (assumed)")
    add("--max_mojibake", type=float, default=0.01, help="of a document's characters (assumed)")
    add("--min_characters", type=int, default=1, help="shorter documents are dropped")
    add("--max_characters", type=int, default=10_000_000, help="longer documents are dropped")
    add("--validation_fraction", type=float, default=data.validation_fraction, help="of the documents")
    add("--text_key", default=data.text_key, help="key, column or feature of the text")
    add("--max_bad_fraction", type=float, default=data.max_bad_fraction, help="of records that hold no document")
    add("--record_tokens", type=int, default=2048, help="tokens in a record; rows of any length are cut from them")
    add("--tfds_split", default="train", help="of a TFDS data set")
    add("--tfds_dir", help="where TFDS keeps its data sets")
    return parser
