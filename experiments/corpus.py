r"""Makes a corpus of English technical prose and speeches from packages that can be installed by name.

    PYTHONPATH=. python experiments/corpus.py --output=runs/corpus/text [--no-apt]      (corpus.sh calls it)

| package | text | licence |
|---|---|---|
| the embedded corpus | State of the Union addresses | public domain |
| botocore (pip) | reference of the AWS interfaces, the latest version of each | Apache-2.0 |
| google-api-python-client (pip) | reference of Google's interfaces | Apache-2.0 |
| postgresql-doc-15 (apt) | manual | PostgreSQL |
| python3.11-doc (apt) | manual and library reference | PSF-2.0 |
| python-django-doc, python-sqlalchemy-doc (apt) | manuals | BSD-3-Clause, MIT |
| sqlite3-doc (apt) | manual | public domain |
| llvm-15-doc (apt) | manual | Apache-2.0 with LLVM exceptions |
| erlang-doc (apt) | manual | Apache-2.0 |

The packages of pip have fixed versions; those of apt are what the distribution has (Debian 12), fetched with `apt-get
download` and unpacked without being installed. The output is in DCLM's format, with `corpus.json` beside it: versions,
documents and characters of every package, SHA-256 of every file. Equal packages give equal bytes.

A paragraph stands once in the whole corpus, where it came first: descriptions of interfaces repeat one another, and a
held-out document must not consist of what was trained on. Documents are an interface, a page or a speech, so that what
is held out (fp4jax.data's split by a hash of the text) is held out as a whole.
"""

import argparse
import gzip
import hashlib
import html.parser
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator

import zstandard

from fp4jax.data.documents import BadLines, read_documents
from fp4jax.data.shards import find_shards

SHARDS = 16
ZSTD_LEVEL = 19
SHORTEST = 200
"""Characters; shorter documents, of what is left of them, are left out."""

Documents = Iterator[tuple[str, str]]
"""Name and text of each document; paragraphs are separated by empty lines."""


class _Text(html.parser.HTMLParser):
    """The text of an HTML page, its blocks as paragraphs."""

    BLOCKS = frozenset(
        "p div li ul ol dl dt dd table tr pre h1 h2 h3 h4 h5 h6 section article blockquote br hr".split()
    )
    LEFT_OUT = frozenset("script style head nav footer".split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._left_out = self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._left_out += tag in self.LEFT_OUT
        self._preformatted += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._left_out = max(self._left_out - (tag in self.LEFT_OUT), 0)
        self._preformatted = max(self._preformatted - (tag == "pre"), 0)
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._left_out:
            self.parts.append(data if self._preformatted else re.sub(r"\s+", " ", data))


def text_of_html(page: str) -> str:
    """The page's text; paragraphs are separated by empty lines."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    return "".join(parser.parts)


def speeches(_: pathlib.Path) -> Documents:
    """The embedded corpus, which is part of the project."""
    documents = read_documents(find_shards("embedded"), "text", BadLines(0.0))
    for number, document in enumerate(documents):
        yield f"{number:03d}", re.sub(r"\n+", "\n\n", document.text)


def aws_interfaces(folder: pathlib.Path) -> Documents:
    """`documentation` of every operation, shape and member, in the file's order; HTML in JSON."""
    for service in sorted((folder / "botocore" / "data").iterdir()):
        versions = sorted(service.glob("*/service-2.json.gz"))
        if versions:
            content = json.loads(gzip.decompress(versions[-1].read_bytes()))
            yield service.name, "\n\n".join(map(text_of_html, values_of(content, "documentation")))


def google_interfaces(folder: pathlib.Path) -> Documents:
    """`description` of every method, schema and property; all versions of an interface are one document."""
    interfaces: dict[str, list[str]] = {}
    for file in sorted((folder / "googleapiclient" / "discovery_cache" / "documents").glob("*.*.json")):
        interfaces.setdefault(file.name.partition(".")[0], []).extend(
            values_of(json.loads(file.read_bytes()), "description")
        )
    for name, descriptions in interfaces.items():
        yield name, "\n\n".join(descriptions)


def values_of(value: object, key: str) -> Iterator[str]:
    """Every text under `key` in a JSON value, at any depth."""
    if isinstance(value, dict):
        if isinstance(value.get(key), str):
            yield value[key]
        children: Iterable = value.values()
    else:
        children = value if isinstance(value, list) else ()
    for child in children:
        yield from values_of(child, key)


def pages(folder: pathlib.Path) -> Documents:
    """The HTML pages of a package, without indexes, which are lists of words, and copies under a second name."""
    for file in sorted(folder.rglob("*.html")):
        if file.is_file() and not file.is_symlink() and "index" not in file.stem:
            yield str(file.relative_to(folder)), text_of_html(file.read_text("utf-8", errors="replace"))


PIP = {"botocore==1.44.5": aws_interfaces, "google-api-python-client==2.202.0": google_interfaces}
APT = {
    "postgresql-doc-15": pages,
    "python3.11-doc": pages,
    "python-django-doc": pages,
    "python-sqlalchemy-doc": pages,
    "sqlite3-doc": pages,
    "llvm-15-doc": pages,
    "erlang-doc": pages,
}


def fetch_pip(package: str, folder: pathlib.Path) -> str:
    """Unpacks a package of exact version into the folder, without what it depends on; returns `name==version`."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
    subprocess.run([*pip, package], check=True)
    return package


def fetch_apt(package: str, folder: pathlib.Path) -> str:
    """Unpacks a package of the distribution into the folder, installing nothing; returns `name=version`."""
    download = ["apt-get", "download", "--quiet=2", "--option=APT::Sandbox::User=root", package]
    subprocess.run(download, check=True, cwd=folder)
    (file,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "--extract", str(file), str(folder)], check=True)
    shown = subprocess.run(
        ["dpkg-deb", "--show", "--showformat=${Package}=${Version}", str(file)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return shown.stdout


class Deduplicated:
    """Texts with each paragraph left out that one of them, or itself, had before."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, text: str) -> str:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            paragraph = paragraph.strip()
            digest = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=16).digest()
            if paragraph and digest not in self._seen:
                self._seen.add(digest)
                kept.append(paragraph)
        return "\n\n".join(kept)


def collect(apt: bool, scratch: pathlib.Path) -> tuple[list[dict], list[dict]]:
    """Records in DCLM's form, and what each package gave."""
    records, packages, deduplicated = [], [], Deduplicated()
    sources: list[tuple[str, Callable, Callable]] = [("embedded", lambda name, _: name, speeches)]
    sources += [(name, fetch_pip, read) for name, read in PIP.items()]
    sources += [(name, fetch_apt, read) for name, read in APT.items()] if apt else []
    for number, (name, fetch, read) in enumerate(sources):
        folder = scratch / str(number)
        folder.mkdir()
        version = fetch(name, folder)
        of_package = []
        for document, text in read(folder):
            text = deduplicated(text.encode("utf-8", errors="replace").decode())  # half a surrogate pair is no text
            if len(text) >= SHORTEST:
                of_package.append({"text": text, "url": f"package:{version}/{document}", "metadata": {}})
        if not of_package:
            raise SystemExit(f"{version} has no documents where they are expected")
        characters = sum(len(record["text"]) for record in of_package)
        packages.append({"package": version, "documents": len(of_package), "characters": characters})
        print(f"{version}: {len(of_package):,} documents, {characters:,} characters", flush=True)
        records += of_package
    return records, packages


def write(records: list[dict], packages: list[dict], output: pathlib.Path) -> None:
    """The shards, each a mixture of everything, and corpus.json."""
    records = sorted(records, key=lambda record: hashlib.sha256(record["text"].encode()).digest())
    files = {}
    for index in range(SHARDS):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records[index::SHARDS]]
        file = output / f"shard_{index:08d}_processed.jsonl.zst"
        file.write_bytes(zstandard.ZstdCompressor(ZSTD_LEVEL, threads=-1).compress("".join(lines).encode()))
        files[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (output / "corpus.json").write_text(json.dumps({"packages": packages, "sha256": files}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder to write to; must not be there")
    parser.add_argument("--apt", action=argparse.BooleanOptionalAction, default=True, help="with apt's packages")
    flags = parser.parse_args()
    flags.output.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        records, packages = collect(flags.apt, pathlib.Path(scratch))
    write(records, packages, flags.output)


if __name__ == "__main__":
    main()
