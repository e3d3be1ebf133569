"""Packed objects of a git repository, unpacked in this process instead of through a pipe from git.

``pack/pack-*.pack`` holds entries, each its kind and size, of a delta its base, and deflated content; one ends where the next
begins. ``pack/pack-*.idx`` holds the names, sorted, and where each begins (gitformat-pack, index version 2). An object is given
only where all is as it must be and the hash is the name. Everything else is git's to find, to unpack or to complain of: an
index of another version, a base in another pack, a long chain of deltas, an object larger than wanted, a pack that is damaged.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from chrysalis_ray.genome.sources.git_deltas import Misfit, patched, size_at
from chrysalis_ray.genome.sources.git_loose import inflated, packed_at_most

NAME = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
KINDS = {1: "commit", 2: "tree", 3: "blob", 4: "tag"}
DELTA_BY_PLACE, DELTA_BY_NAME = 6, 7
INDEX_BEGINS, PACK_BEGINS = b"\xfftOc\0\0\0\x02", (b"PACK\0\0\0\x02", b"PACK\0\0\0\x03")
FAN_BYTES, ENTRIES_BEGIN = 1024, 12
FAR = 0x80000000  # an offset with this bit says where in the table of long ones the offset is
MOST_PACKS = 64  # each is an open file
MOST_INDEX_BYTES = 2**29  # of all packs together: ten million objects, and more
DEEPEST = 256  # deltas on deltas; git makes 50
MOST_DELTA_BYTES = 2 * 2**20  # of one object's deltas together: they are followed step by step
MOST_BASE_BYTES = 64 * 2**20
CACHE_BYTES = 64 * 2**20


class Entry(NamedTuple):
    """An entry of a pack. `size` is that of what `packed` unpacks to; `base` is where the base of a delta begins, or None."""

    kind: int
    size: int
    base: int | None
    packed: memoryview


class PackedObjects:
    """The packed objects below some object folders. The packs are opened when the first object is asked for."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._packs: list[Pack] | None = None
        self._found: dict[str, tuple[Pack, int]] = {}  # what was looked for and not yet read

    def holds(self, name: str) -> bool:
        """Whether an index has the object, whatever is in its pack."""
        found = self._find(name)
        if found is not None:
            self._found[name] = found
        return found is not None

    def read(self, name: str, most: int) -> tuple[str, bytes] | None:
        """(kind, content) of the object, hashed; None where it is not there, not what its name says, longer than `most`, or
        not to be had without git."""
        found = self._found.pop(name, None) or self._find(name)
        if found is None:
            return None
        pack, place = found
        try:
            kind, content = pack.read(place, most)
        except (Misfit, OSError):
            return None
        header = f"{kind} {len(content)}\0".encode()
        digest = (hashlib.sha1 if len(name) == 40 else hashlib.sha256)(header, usedforsecurity=False)
        digest.update(content)
        return (kind, content) if digest.hexdigest() == name else None

    def close(self) -> None:
        """Close the packs."""
        for pack in self._packs or ():
            pack.close()
        self._packs = []

    def _find(self, name: str) -> tuple[Pack, int] | None:
        if not NAME.fullmatch(name):  # a commit may say anything of its tree
            return None
        identity = bytes.fromhex(name)
        if self._packs is None:
            self._packs = _opened(self._folders, len(identity))
        for pack in self._packs:
            place = pack.place_of(identity)
            if place is not None:
                return pack, place
        return None


def _opened(folders: Sequence[Path], id_bytes: int) -> list[Pack]:
    """The packs that can be read here, as many as have room for their indexes; none of them where they are too many to hold
    open."""
    indexes = [path for folder in folders for path in sorted((folder / "pack").glob("pack-*.idx"))]
    found, bases, room = [], Bases(), MOST_INDEX_BYTES
    for path in indexes if len(indexes) <= MOST_PACKS else ():
        try:
            found.append(Pack(path, id_bytes, bases, room))
            room -= found[-1].index_bytes
        except (Misfit, OSError):
            continue
    return found


class Bases:
    """The objects that deltas were followed from last, of all packs together at most `CACHE_BYTES`."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Pack, int], tuple[str, bytes]] = OrderedDict()
        self._bytes = 0

    def get(self, pack: Pack, place: int) -> tuple[str, bytes] | None:
        """(kind, content) of the object at `place` of `pack`, None where it is not kept."""
        found = self._kept.get((pack, place))
        if found is not None:
            self._kept.move_to_end((pack, place))
        return found

    def keep(self, pack: Pack, place: int, kind: str, content: bytes) -> None:
        """Keep an object, and drop those that were not wanted for the longest time."""
        if (pack, place) in self._kept or len(content) > CACHE_BYTES:
            return
        self._kept[pack, place] = (kind, content)
        self._bytes += len(content)
        while self._bytes > CACHE_BYTES:
            _, (_, dropped) = self._kept.popitem(last=False)
            self._bytes -= len(dropped)


class Pack:
    """One pack, open, and its index in memory, of at most `room` bytes. Raises Misfit for files that are no pack, OSError."""

    def __init__(self, index: Path, id_bytes: int, bases: Bases, room: int = MOST_INDEX_BYTES) -> None:
        self._id_bytes, self._bases = id_bytes, bases
        with os.fdopen(_descriptor(index), "rb") as stream:
            self.index_bytes = os.fstat(stream.fileno()).st_size
            if self.index_bytes > room:
                raise Misfit("a very large index")
            content = stream.read()
        self._descriptor = _descriptor(index.with_suffix(".pack"))
        try:
            end = os.fstat(self._descriptor).st_size - id_bytes
            self._read_index(content, end)
            self._check_pack(content, end)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close its file."""
        os.close(self._descriptor)

    def place_of(self, name: bytes) -> int | None:
        """Where the object begins; None where the index does not have it."""
        low, high = self._fan[name[0]], self._fan[name[0] + 1]
        number = bisect_left(range(high), name, low, high, key=self._name)
        return int(self._offsets[number]) if number < high and self._name(number) == name else None

    def read(self, place: int, most: int) -> tuple[str, bytes]:
        """(kind, content) of the object at `place`, not hashed. Raises Misfit where it is not to be had or is longer than
        `most`, OSError."""
        deltas: list[tuple[int, Entry]] = []
        delta_bytes = 0
        while (base := self._bases.get(self, place)) is None:
            entry = self._entry(place, MOST_BASE_BYTES if deltas else most)
            if entry.base is None:
                base = KINDS[entry.kind], _content(entry)
                break
            deltas.append((place, entry))
            delta_bytes += entry.size
            if len(deltas) > DEEPEST or delta_bytes > MOST_DELTA_BYTES:
                raise Misfit(f"an object of {len(deltas)} deltas, {delta_bytes} bytes")
            place = entry.base
        kind, content = base
        for here, delta in reversed(deltas):
            self._bases.keep(self, place, kind, content)
            content = patched(content, _content(delta), MOST_BASE_BYTES)
            place = here
        if len(content) > most:
            raise Misfit(f"an object of {len(content)} bytes")
        return kind, content

    # entries

    def _entry(self, place: int, most: int) -> Entry:
        """The entry that begins at `place`, of at most so many bytes, packed or not."""
        number = int(self._begins.searchsorted(place))
        if number + 1 >= len(self._begins) or self._begins[number] != place:
            raise Misfit(f"no object begins at {place}")
        length = int(self._begins[number + 1]) - place
        if length > packed_at_most(most):
            raise Misfit(f"an object of {length} packed bytes")
        content = os.pread(self._descriptor, length, place)
        try:
            size, at = size_at(content, 0, 4)
            kind, base, at = self._base(content, at, place)
        except IndexError:
            raise Misfit(f"the object at {place} is cut off") from None
        if size > most or len(content) - at > packed_at_most(size):
            raise Misfit(f"an object of {size} bytes")
        return Entry(kind, size, base, memoryview(content)[at:])

    def _base(self, content: bytes, at: int, place: int) -> tuple[int, int | None, int]:
        """(kind, where the base begins, where the deflated content does) of an entry whose size ends at `at`."""
        kind = content[0] >> 4 & 7
        if kind in KINDS:
            return kind, None, at
        if kind == DELTA_BY_PLACE:
            distance, at = _distance_at(content, at)
            return kind, place - distance, at
        if kind == DELTA_BY_NAME:
            base = self.place_of(content[at : at + self._id_bytes]) if len(content) >= at + self._id_bytes else None
            if base is None:
                raise Misfit(f"the base of the object at {place} is not in its pack")
            return kind, base, at + self._id_bytes
        raise Misfit(f"an object of kind {kind}")

    # the index

    def _read_index(self, content: bytes, end: int) -> None:
        """Take names and offsets from the index of a pack whose entries end at `end`."""
        names_begin = len(INDEX_BEGINS) + FAN_BYTES
        if not content.startswith(INDEX_BEGINS) or len(content) < names_begin:
            raise Misfit("no index of version 2")
        self._fan = (0, *struct.unpack_from(">256I", content, len(INDEX_BEGINS)))
        count = self._fan[-1]
        sums_begin = names_begin + count * self._id_bytes
        near_begin, far_begin = sums_begin + 4 * count, sums_begin + 8 * count
        far_bytes = len(content) - 2 * self._id_bytes - far_begin
        if any(low > high for low, high in zip(self._fan, self._fan[1:], strict=False)) or far_bytes < 0 or far_bytes % 8:
            raise Misfit("an index whose parts do not fit")
        self._names, self._names_begin = content[:sums_begin], names_begin
        near = np.frombuffer(content, ">u4", count, near_begin).astype(np.int64)
        far = np.frombuffer(content, ">i8", far_bytes // 8, far_begin)
        is_far = near >= FAR
        if is_far.any():
            numbers = near[is_far] - FAR
            if numbers.max() >= len(far):
                raise Misfit("an index without the long offsets that it names")
            near[is_far] = far[numbers]
        if count and not (near.min() >= ENTRIES_BEGIN and near.max() < end):
            raise Misfit("an index with offsets outside its pack")
        self._offsets = near
        self._begins = np.append(np.sort(near), end)

    def _check_pack(self, content: bytes, end: int) -> None:
        """Whether the pack is the one of the index `content`: as many objects, and the hash at its end."""
        head = os.pread(self._descriptor, ENTRIES_BEGIN, 0)
        count = struct.pack(">I", self._fan[-1])
        if head[:8] not in PACK_BEGINS or head[8:] != count:
            raise Misfit("no pack of version 2 or 3, or of other objects than its index")
        if os.pread(self._descriptor, self._id_bytes, end) != content[-2 * self._id_bytes : -self._id_bytes]:
            raise Misfit("a pack and an index that do not belong together")

    def _name(self, number: int) -> bytes:
        begin = self._names_begin + number * self._id_bytes
        return self._names[begin : begin + self._id_bytes]


def _content(entry: Entry) -> bytes:
    content = inflated(entry.packed, entry.size + 1)
    if content is None or len(content) != entry.size:
        raise Misfit(f"an object that does not unpack to its {entry.size} bytes")
    return content


def _distance_at(content: bytes, at: int) -> tuple[int, int]:
    """(how far before a delta its base begins, place behind it): 7 bits a byte, the highest first, each further byte one
    more."""
    byte = content[at]
    distance = byte & 0x7F
    while byte & 0x80:
        at += 1
        byte = content[at]
        distance = distance + 1 << 7 | byte & 0x7F
        if distance >> 62:
            raise Misfit("a base from nowhere")
    return distance, at + 1


def _descriptor(path: Path) -> int:
    """An open file. Raises Misfit for what is no file, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Misfit(f"{path} is no file")
    return descriptor
