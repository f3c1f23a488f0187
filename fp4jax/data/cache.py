"""The token cache: a corpus is tokenized once for each tokenizer, not at every start.

An entry is a folder of the cache, named by a hash of everything that decides its content. It is written under another
name and renamed when whole, so a reader never sees half of one. Processes on one machine that need the same entry
wait for the one that writes it. A damaged entry is written anew, with a warning. Entries are never removed otherwise:
deleting the folder is always safe.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence

from absl import logging

from fp4jax.data.corpus import DamagedCorpusError, TokenizedCorpus, write_corpus
from fp4jax.data.errors import DataError
from fp4jax.data.tokenizers import Tokenizer

FORMAT_VERSION = 1
"""Part of every entry's name: raise it when the files, the split or the packing of a stream change."""

HASHED_BYTES = 64 << 20
"""Shards up to this size are known by their content; longer ones by size, time of change and both ends: terabytes, too,
should start at once."""
END_BYTES = 1 << 20


def cache_folder() -> pathlib.Path:
    """Where tokenized corpora are kept: the folder in the environment variable FP4JAX_CACHE, or ~/.cache/fp4jax."""
    return pathlib.Path(os.environ.get("FP4JAX_CACHE") or "~/.cache/fp4jax").expanduser()


def tokenized_corpus(
    shards: Sequence[pathlib.Path],
    tokenizer: Tokenizer,
    *,
    text_key: str,
    validation_fraction: float,
    max_bad_fraction: float,
) -> TokenizedCorpus:
    """Returns the tokenized corpus from the cache; tokenizes it into the cache first if it is not there.

    Raises:
      DataError: a shard cannot be read, too many lines are bad (in the cached corpus, too), or the cache cannot be
        written.
    """
    decides_content = [FORMAT_VERSION, tokenizer.fingerprint, text_key, validation_fraction, *map(_identity, shards)]
    key = hashlib.blake2b(repr(decides_content).encode(), digest_size=16).hexdigest()
    root = cache_folder() / "tokens"
    write = functools.partial(
        write_corpus,
        shards=shards,
        tokenizer=tokenizer,
        text_key=text_key,
        validation_fraction=validation_fraction,
        max_bad_fraction=max_bad_fraction,
    )
    try:
        corpus = _open(root / key, max_bad_fraction) or _write_entry(root, key, write, max_bad_fraction)
    except OSError as error:
        raise DataError(
            f"the token cache {root} cannot be written ({error.strerror or error}); "
            "free some space there, or set the environment variable FP4JAX_CACHE to another folder"
        ) from error
    corpus.bad_lines.check()  # an entry written under a laxer limit
    return corpus


def _write_entry(
    root: pathlib.Path, key: str, write: Callable[[pathlib.Path], None], max_bad_fraction: float
) -> TokenizedCorpus:
    with _locked(root, key):
        # The process that held the lock before may have written the entry.
        if corpus := _open(root / key, max_bad_fraction):
            return corpus
        with _fresh_folder(root, key) as folder:
            write(folder)
        return TokenizedCorpus.open(root / key, max_bad_fraction)


def _open(folder: pathlib.Path, max_bad_fraction: float) -> TokenizedCorpus | None:
    """Opens a cache entry; None where there is none or where it has to be written anew."""
    if not folder.exists():
        return None
    try:
        return TokenizedCorpus.open(folder, max_bad_fraction)
    except DamagedCorpusError as error:
        logging.warning("token cache %s is damaged (%s): tokenizing the corpus again", folder, error)
        return None


def _identity(shard: pathlib.Path) -> str:
    """A hash that changes when the shard does; see HASHED_BYTES."""
    try:
        with open(shard, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size <= HASHED_BYTES:
                return hashlib.file_digest(file, hashlib.blake2b).hexdigest()
            start = file.read(END_BYTES)
            file.seek(-END_BYTES, os.SEEK_END)
            ends = hashlib.blake2b(start + file.read()).hexdigest()
            return f"{status.st_size} {status.st_mtime_ns} {ends}"
    except OSError as error:
        raise DataError(f"shard {shard} cannot be read ({error.strerror})") from error


@contextlib.contextmanager
def _locked(root: pathlib.Path, key: str) -> Iterator[None]:
    """Holds the entry's lock; the operating system frees it however the process ends."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f"{key}.lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("waiting for another process that is tokenizing the same corpus")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _fresh_folder(root: pathlib.Path, key: str) -> Iterator[pathlib.Path]:
    """A new folder: the entry `key` if the block ends well, removed if it does not. Needs the entry's lock."""
    for left_by_a_killed_process in root.glob(f"{key}.partial-*"):
        shutil.rmtree(left_by_a_killed_process)
    folder = root / f"{key}.partial-{uuid.uuid4().hex}"
    folder.mkdir()  # tempfile.mkdtemp would shut out the others who share this cache
    try:
        yield folder
        if (root / key).exists():
            shutil.rmtree(root / key)
        folder.rename(root / key)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
