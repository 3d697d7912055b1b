"""Which files are meant: single files, folders with all their subfolders, and globs."""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .photo import FORMATS

SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"BM", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Source:
    """One photo to restore."""

    path: Path
    relative: Path
    """Where it stands below the folder or the fixed part of the glob that named it: its place in the output."""


def find(patterns: Iterable, leave_out: Iterable[Path] = ()) -> tuple[list[Source], list[str]]:
    """(photos, patterns that match none), photos in a fixed order, each once.

    A file that is named is taken whatever it is, also when it does not exist: reading it says what is wrong. In folders
    and globs, a file is taken for its suffix, or without a known one for its first bytes; hidden files and the folders
    `leave_out` are passed over.
    """
    left_out = {os.path.abspath(folder) for folder in leave_out}
    found, empty = {}, []
    for pattern in map(os.fspath, patterns):
        before = len(found)
        known = False
        for source in _expand(pattern, left_out):
            known |= found.setdefault(os.path.abspath(source.path), source) is not source
        if len(found) == before and not known:
            empty.append(pattern)
    return list(found.values()), empty


def _expand(pattern: str, left_out: set[str]) -> Iterator[Source]:
    if not pattern:
        return
    if os.path.isdir(pattern):
        yield from _walk(Path(pattern), Path(pattern), left_out)
    elif os.path.lexists(pattern) or not glob.has_magic(pattern):
        yield Source(Path(pattern), Path(Path(pattern).name))
    else:
        top = _fixed_part(pattern)
        for name in sorted(glob.glob(pattern, recursive=True)):
            path = Path(name)
            if _below(path, left_out):
                continue
            if path.is_dir():
                # `**` lists every folder beside the files in it: only another last component names folders.
                if not pattern.rstrip("/" + os.sep).endswith("**"):
                    yield from _walk(path, top, left_out)
            elif _is_photo(path):
                yield Source(path, path.relative_to(top))


def _fixed_part(pattern: str) -> Path:
    """The folders of a glob before its first wildcard."""
    parts = Path(pattern).parts
    wild = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:wild])


def _walk(folder: Path, top: Path, left_out: set[str]) -> Iterator[Source]:
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and os.path.abspath(os.path.join(here, f)) not in left_out
        )
        for name in sorted(names):
            path = Path(here, name)
            if not name.startswith(".") and _is_photo(path):
                yield Source(path, path.relative_to(top))


def _below(path: Path, left_out: set[str]) -> bool:
    path = Path(os.path.abspath(path))
    return any(str(p) in left_out for p in (path, *path.parents))


def _is_photo(path: Path) -> bool:
    if path.suffix.lower() in FORMATS:
        return True
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return looks_like_photo(file.read(16))
    except OSError:
        return False


def looks_like_photo(head: bytes) -> bool:
    """Whether a file that starts with these 16 bytes is one of the formats that are read."""
    return head.startswith(SIGNATURES) and (not head.startswith(b"RIFF") or head[8:12] == b"WEBP")
