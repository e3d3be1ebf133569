"""Loose objects of a git repository, a file each, unpacked in this process instead of through a pipe from git.

``objects/<two digits of its name>/<the others>`` holds ``<kind> <size> NUL <content>``, deflated (gitrepository-layout; RFC
1950). An object is given only where all is as it must be and the hash is the name. Everything else, a file that is damaged, an
object that is nowhere or is larger than wanted, is git's to find, to unpack or to complain of.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from isal import isal_zlib

from chrysalis_ray.core.errors import GenomeCorrupt

KINDS = frozenset({b"blob", b"tree", b"commit", b"tag"})
HEADER = re.compile(rb"([a-z]+) (0|[1-9][0-9]{0,18})\0")
HEADER_BYTES = 32  # more than any header has
SHARD = re.compile(r"[0-9a-f]{2}")


class LooseObjects:
    """The loose objects below some object folders. They are listed once, when the first of their shard is asked for."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = [str(folder) for folder in folders]
        self._shards = {name for folder in self._folders for name in _names(folder) if SHARD.fullmatch(name)}
        self._listed: dict[str, dict[str, str]] = {}

    def holds(self, name: str) -> bool:
        """Whether there is a file for the object, whatever is in it."""
        return self._file_of(name) is not None

    def read(self, name: str, most: int) -> tuple[str, bytes] | None:
        """(kind, content) of the object, hashed; None where it is not there, not what its name says, or longer than `most`.
        Raises GenomeCorrupt where what is there is no file: git would wait for a pipe forever."""
        file = self._file_of(name)
        packed = None if file is None else _content(file, most)
        return None if packed is None else unpacked(packed, name, most)

    def _file_of(self, name: str) -> str | None:
        listed = self._listed.get(name[:2])
        if listed is None:
            listed = self._listed[name[:2]] = self._list(name[:2])
        return listed.get(name[2:])

    def _list(self, digits: str) -> dict[str, str]:
        """The rest of the name -> file, of the objects whose names begin with `digits`."""
        paths = [f"{folder}/{digits}" for folder in self._folders] if digits in self._shards else []
        return {name: f"{path}/{name}" for path in paths for name in _names(path)}


def object_folders(store: Path) -> list[Path]:
    """The object folder of a bare store, and those that it borrows from."""
    own = store / "objects"
    try:
        lent = (own / "info" / "alternates").read_bytes().split(b"\n")
    except OSError:
        lent = []
    return [own, *(Path(os.fsdecode(line)) for line in lent if line.startswith(b"/"))]


def unpacked(packed: bytes, name: str, most: int) -> tuple[str, bytes] | None:
    """(kind, content) of the object `name` from the bytes of its file; None where they are not that object, or it is longer
    than `most`. Never more than that is unpacked."""
    whole = inflated(packed, most + HEADER_BYTES)
    header = None if whole is None else HEADER.match(whole)
    if whole is None or header is None or header[1] not in KINDS:
        return None
    content = whole[header.end() :]
    if len(content) != int(header[2]) or len(content) > most:
        return None
    digest = (hashlib.sha1 if len(name) == 40 else hashlib.sha256)(whole, usedforsecurity=False)
    return (header[1].decode(), content) if digest.hexdigest() == name else None


def inflated(packed: bytes | memoryview, most: int) -> bytes | None:
    """What `packed` unpacks to (RFC 1950), by Intel's ISA-L: twice as fast as zlib. None where it is not one whole stream of
    less than `most` bytes; more is never unpacked."""
    unpacker = isal_zlib.decompressobj()
    try:
        content = unpacker.decompress(packed, most)
    except isal_zlib.error:  # type: ignore[misc]  # the stub calls the class an instance
        return None
    return content if unpacker.eof and not unpacker.unused_data else None


def packed_at_most(size: int) -> int:
    """The most bytes that an object of `size` bytes is packed to: what cannot be deflated grows by less than a thousandth."""
    return size + size // 1000 + 1024


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _content(path: str, most: int) -> bytes | None:
    """The bytes of a file; None where it cannot be read or is longer than what it should hold. Raises GenomeCorrupt."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise GenomeCorrupt(f"{path} is no file", "the repository is malformed; clone it again")
        return os.read(descriptor, about.st_size) if about.st_size <= packed_at_most(most) else None
    except OSError:
        return None
    finally:
        os.close(descriptor)
