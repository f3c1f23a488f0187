"""Checksums of the files in a folder: written beside them before they are committed, compared before they are trusted.

Size and CRC-32 (ISO 3309) of every file. They are there to find damage, which they miss with probability 2^-32, not to
withstand a forger; a cryptographic hash would take two to four times as long.
"""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from fp4jax.data.json_files import is_of, one_line, parse_json

MANIFEST = "checksums.json"

FORMAT_VERSION = 1
"""Of a checkpoint: raise it when its items, or the names and shapes of parameters and optimizer state, change."""

_VERSION_KEY = "format_version"
_PIECE_BYTES = 1 << 20
_THREADS = 4


class FormatVersionError(ValueError):
    """A checkpoint of another version of the format; one line."""


def write_manifest(folder: Path) -> None:
    """Writes `checksums.json` over all files in and below `folder`, and has the disk keep them and it.

    Raises:
      OSError: a file cannot be read, or the manifest not written.
    """
    names = _files(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(lambda name: _entry(folder / name, sync=True), names))
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({_VERSION_KEY: FORMAT_VERSION, "files": dict(zip(names, entries, strict=True))}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def find_damage(folder: Path) -> str | None:
    """Returns the first file that is not as `write_manifest` found it, in a few words; None if all are.

    Files that came later are not looked at.

    Raises:
      FormatVersionError: the folder is of another version of the format.
    """
    try:
        known = _known_files(folder)
    except FileNotFoundError:
        return f"{folder.name}/{MANIFEST} is missing"
    except FormatVersionError:
        raise
    except (OSError, ValueError):
        return f"{folder.name}/{MANIFEST} cannot be read"
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _problem(folder / name, *known[name]), known)
        return next(
            (f"{folder.name}/{name} {problem}" for name, problem in zip(known, found, strict=True) if problem), None
        )


def with_checksums(handler: ocp.CheckpointHandler) -> ocp.CheckpointHandler:
    """The handler of a checkpoint's item, which from now on has its manifest written.

    That is when the item is whole and not yet committed: in the background, where the save is asynchronous.
    """
    finalize = handler.finalize

    def finalize_with_manifest(directory: os.PathLike) -> None:
        finalize(directory)
        write_manifest(Path(directory))

    handler.finalize = finalize_with_manifest
    return handler


def _known_files(folder: Path) -> dict[str, list[int]]:
    """[bytes, CRC-32] of every file that the manifest names."""
    content = parse_json((folder / MANIFEST).read_bytes())
    if is_of(content, dict[str, Any]) and isinstance(version := content.get(_VERSION_KEY), int):
        if version != FORMAT_VERSION:
            raise FormatVersionError(
                f"checkpoint {folder.parent} has format version {version}; this version of fp4jax reads "
                f"{FORMAT_VERSION}: use the version that wrote it, or choose another --workdir"
            )
        content = content.get("files")
    # Before formats had a version the files stood alone.
    if not is_of(content, dict[str, list[int]]) or any(len(entry) != 2 for entry in content.values()):
        raise ValueError("no sizes and checksums by name")
    return content


def _problem(path: Path, size: int, crc: int) -> str | None:
    try:
        if path.stat().st_size != size:
            return f"has {path.stat().st_size:,} bytes of {size:,}"
        return None if _entry(path)[1] == crc else "has another checksum than when it was written"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return f"cannot be read ({one_line(error)})"


def _files(folder: Path) -> list[str]:
    """Names of all files below `folder`, relative to it; folders are synced on the way."""
    names = []
    for parent, _, files in os.walk(folder):
        relative = Path(parent).relative_to(folder)
        names += [str(relative / name) for name in files if name != MANIFEST]
        _sync_folder(Path(parent))
    return sorted(names)


def _entry(path: Path, sync: bool = False) -> tuple[int, int]:
    """(bytes, CRC-32) of a file, read in pieces."""
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        if sync:
            os.fsync(file.fileno())
        while piece := file.read(_PIECE_BYTES):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return size, crc


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder, not only the bytes of its files, survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
