"""Files of this machine: globs that stay in their folder, and opening what was listed and nothing else.

A glob begins at the folder that its part without glob characters names, and what it finds lies below: a symbolic
link that leads out is refused, not followed and not passed over. (A path without glob characters may be a link:
it is what somebody named.) Between listing and opening a link can be swapped for another, so a file is opened
by name and then compared with the inode that was listed. Only regular files are opened, without ever waiting for
the other end of a pipe.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

from rise_ops.errors import SourceError

MAGIC = "*?["
"""Characters that make a path a glob."""
MOST_LINKS = 10_000
"""Symbolic links that one glob follows: a dozen folders that link to each other have millions of paths."""


def matching_files(pattern: str) -> list[str]:
    """Paths that an absolute glob matches, once each; fsspec's own glob passes over folders that it may not read.

    Raises
    ------
    SourceError
        A symbolic link leads out of the folder where the glob begins.
    """
    parts = pattern.strip("/").split("/")
    fixed = next(place for place, part in enumerate(parts) if any(sign in part for sign in MAGIC))
    root = "/" + "/".join(parts[:fixed])
    if not os.path.isdir(root):
        return []
    return list(dict.fromkeys(_Walk(root).expanded(root, parts[fixed:])))


def regular_status(path: str) -> os.stat_result:
    """What is at a path, which must be a regular file with a name that can be written down.

    Raises
    ------
    SourceError
        It is something else.
    """
    if not path.isascii() and any("\ud800" <= sign <= "\udfff" for sign in path):
        raise SourceError(f"source {shown(path)} has a name that is not UTF-8; rename it")
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"source {path} is not a regular file")
    return status


def inode_of(status: os.stat_result) -> str:
    """What tells a file from every other on this machine."""
    return f"{status.st_dev}:{status.st_ino}"


def open_regular(path: str, *, inode: str | None) -> BinaryIO:
    """A regular file for reading; the one with this inode, where it is given.

    Raises
    ------
    SourceError
        It is not a regular file, or another one than was listed.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and inode in (None, inode_of(status)):
        return file
    file.close()
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"source {path} is not a regular file")
    raise SourceError(f"source {path} is not the file that was listed; run again when its writer has finished")


def shown(path: str) -> str:
    """A path with the bytes that are not UTF-8 escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class _Walk:
    """One glob on its way through folders."""

    def __init__(self, root: str) -> None:
        self._start = root
        self._root = os.path.realpath(root)
        self._links = 0

    def expanded(self, folder: str, parts: list[str]) -> Iterator[str]:
        """Paths below a folder that match the parts."""
        head, *rest = parts
        if head == "**":
            yield from self.expanded(folder, rest or ["*"])
            for entry in _entries(folder):
                if entry.is_dir() and self._leads_on(folder, entry):
                    yield from self.expanded(entry.path, parts)
        elif any(sign in head for sign in MAGIC):
            for entry in _entries(folder):
                if fnmatch.fnmatchcase(entry.name, head) and entry.is_dir() == bool(rest):
                    yield from self._below(entry.path, rest)
        else:
            path = os.path.join(folder, head)
            if os.path.lexists(path) and os.path.isdir(path) == bool(rest):
                yield from self._below(path, rest)

    def _below(self, path: str, rest: list[str]) -> Iterator[str]:
        self._check(path)
        if rest:
            yield from self.expanded(path, rest)
        else:
            yield path

    def _leads_on(self, folder: str, entry: os.DirEntry[str]) -> bool:
        """Whether a folder may be entered: not where it is a link to one above it, or to one that led here."""
        self._check(entry.path)
        if not entry.is_symlink():
            return True
        real = os.path.realpath(entry.path)
        passed = folder
        while len(passed) >= len(self._start):
            if (os.path.realpath(passed) + "/").startswith(real.rstrip("/") + "/"):
                return False
            passed = os.path.dirname(passed)
        return True

    def _check(self, path: str) -> None:
        if not os.path.islink(path):
            return
        real = os.path.realpath(path)
        if real != self._root and not real.startswith(self._root.rstrip("/") + "/"):
            raise SourceError(
                f"source {shown(path)} is a symbolic link out of {shown(self._root)}, to {shown(real)}; name the real "
                "folder or file in corpus.sources, or remove the link"
            )
        self._links += 1
        if self._links > MOST_LINKS:
            raise SourceError(
                f"source {shown(path)}: the glob followed more than {MOST_LINKS:,} symbolic links; some lead to each "
                "other. Remove them, or name the real folders in corpus.sources"
            )


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
