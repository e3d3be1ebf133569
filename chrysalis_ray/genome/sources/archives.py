"""Documents of a zip or tar file, read member by member and never unpacked.

An archive is refused whole, before any of it is used, when a member's name leaves it (absolute, ``..``), is a link or a
device, is encrypted, or when it unpacks to more than `MAX_TOTAL` bytes, `MAX_MEMBERS` members or `MAX_RATIO` times its own
size: a bomb is told by what it has unpacked so far, not by what its header claims.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from chrysalis_ray.config.genome import ArchiveSource
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import sha256_of_file
from chrysalis_ray.core.written_paths import written_path
from chrysalis_ray.genome.documents import Document, decoded, hash_order, make_document, shown_path
from chrysalis_ray.genome.globs import domain_of
from chrysalis_ray.genome.licences import LICENCE_BYTES, is_licence_file, licensing

MAX_MEMBERS = 500_000
MAX_TOTAL = 8 * 2**30
MAX_RATIO = 200
RATIO_COUNTS_FROM = 16 * 2**20  # a few megabytes of blanks are no attack
MAX_DOCUMENT_BYTES = 32 * 2**20
PIECE = 1 << 20

UNPACKERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError, ValueError)


class Budget:
    """How much an archive may still unpack to."""

    def __init__(self, path: Path, packed: int) -> None:
        self.path, self.packed = path, packed
        self.unpacked = self.members = 0

    def spend(self, unpacked: int) -> None:
        """Raises GenomeError once too much came out."""
        self.unpacked += unpacked
        if self.unpacked > MAX_TOTAL:
            raise self._bomb(f"unpacks to more than {MAX_TOTAL:,} bytes")
        if self.unpacked > max(RATIO_COUNTS_FROM, MAX_RATIO * self.packed):
            raise self._bomb(f"{self.packed:,} bytes unpack to more than {MAX_RATIO} times as many")

    def count_member(self) -> None:
        self.members += 1
        if self.members > MAX_MEMBERS:
            raise self._bomb(f"holds more than {MAX_MEMBERS:,} members")

    def _bomb(self, what: str) -> GenomeError:
        return GenomeError(f"{self.path} {what}: it is refused as a bomb", "unpack it where you trust it, and name the folder")


class _Counted:
    """A stream that pays for every byte it gives."""

    def __init__(self, stream: IO[bytes], budget: Budget) -> None:
        self._stream, self._budget = stream, budget

    def read(self, size: int) -> bytes:
        piece = self._stream.read(size)
        self._budget.spend(len(piece))
        return piece


@dataclass(frozen=True)
class Member:
    """A file of an archive; `content` is None where it is too large to be a document."""

    name: str
    content: bytes | None


def read_archive(source: ArchiveSource, relative_to: Path, skipped: Counter[str], facts: dict[str, Any]) -> Iterator[Document]:
    """One document per text file, in the archive's order; in hash order where the source is capped.

    Counts ``not_text``, ``empty``, ``too_large`` and ``unmatched``; puts the archive's sha256 and its number of files into
    `facts`. Raises GenomeError for an archive that is missing, another than `sha256` says, broken, hostile or a bomb.
    """
    path = relative_to / written_path(source.path)
    if not path.is_file():
        raise GenomeError(f"there is no archive {path}", "paths are relative to the experiment file")
    sha256 = sha256_of_file(path)
    if source.sha256 not in (None, sha256):
        raise GenomeError(f"{path}: sha256 is {sha256}, not {source.sha256}", "this is another file than the one you named")
    licence_texts = []
    names = []
    for member in _members(path, lambda name: is_licence_file(name)):  # the whole archive is inspected before any of it is used
        names.append(member.name)
        if member.content is not None and len(member.content) <= LICENCE_BYTES and is_licence_file(member.name):
            licence_texts.append((member.name, member.content.decode("utf-8", "replace")))
    licences = licensing(licence_texts, source.licence)
    facts |= {"sha256": sha256, "files": len(names)}
    wanted = {name: domain for name in names if (domain := domain_of(name, source.patterns)) is not None}
    skipped["unmatched"] += sum(name not in wanted for name in names)

    def documents() -> Iterator[Document]:
        for member in _members(path, wanted.__contains__):
            if member.name not in wanted:
                continue
            found = None if member.content is None else decoded(member.content)
            if found is None or not found[0].strip():
                skipped["too_large" if member.content is None else "not_text" if found is None else "empty"] += 1
                continue
            licence, evidence = licences.of(member.name, found[0])
            key = f"{source.path}/{member.name}"
            yield make_document(found[0], key, key, wanted[member.name], licence, found[1], evidence)

    if source.max_megabytes is None:
        yield from documents()
    else:
        yield from sorted(documents(), key=lambda document: hash_order(document.path))


def _members(path: Path, wanted: Callable[[str], bool]) -> Iterator[Member]:
    """The files of an archive, all checked, those that are `wanted` with their content. Raises GenomeError."""
    with _told(path), path.open("rb") as stream:
        head = stream.read(6)
        stream.seek(0)
        budget = Budget(path, path.stat().st_size)
        if head.startswith(b"PK"):
            yield from _zip_members(stream, budget, wanted)
            return
        opener = next((opener for magic, opener in UNPACKERS.items() if head.startswith(magic)), None)
        unpacked = stream if opener is None else opener(stream)
        yield from _tar_members(unpacked, budget, wanted)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the readers of archives raise, as GenomeError."""
    try:
        yield
    except GenomeError:
        raise
    except BROKEN as error:
        raise GenomeError(
            f"{path} cannot be read as a zip or tar file: {type(error).__name__}: {str(error)[:200]}", "fetch or pack it again"
        ) from error
    except RuntimeError as error:  # zipfile, for a member that is encrypted
        raise GenomeError(f"{path}: {str(error)[:200]}", "pack it again without a password") from error


def _zip_members(stream: IO[bytes], budget: Budget, wanted: Callable[[str], bool]) -> Iterator[Member]:
    with zipfile.ZipFile(stream) as archive:
        for entry in archive.infolist():
            budget.count_member()
            name = _safe_name(entry.filename, budget.path)
            kind = entry.external_attr >> 28  # the file type of unix modes, 0 where another system packed it
            if kind not in (0, 0o4, 0o10):
                raise _hostile(budget.path, name, "is a link or a device")
            if entry.is_dir():
                continue
            if entry.flag_bits & 1:
                raise _hostile(budget.path, name, "is encrypted")
            with archive.open(entry) as member:
                yield Member(name, _content(member, budget, wanted(name)))


def _tar_members(stream: IO[bytes], budget: Budget, wanted: Callable[[str], bool]) -> Iterator[Member]:
    counted: Any = _Counted(stream, budget)
    with tarfile.open(fileobj=counted, mode="r|", encoding="utf-8", errors="surrogateescape", tarinfo=_WholeHeader) as archive:
        for entry in archive:
            budget.count_member()
            vars(archive)["members"] = []  # tarfile remembers every member; a million of them would not fit
            name = _safe_name(entry.name, budget.path)
            if entry.isdir():
                continue
            if not entry.isreg():
                raise _hostile(budget.path, name, "is a link or a device")
            member = archive.extractfile(entry)
            assert member is not None
            if entry.issparse():
                budget.spend(entry.size)  # holes cost the archive nothing
            yield Member(name, _content(member, Budget(budget.path, budget.packed), wanted(name)))
        while counted.read(PIECE):  # to the end of the packed stream, where its checksum stands
            pass


class _WholeHeader(tarfile.TarInfo):
    """A header that must be whole: by itself, tarfile takes a damaged one for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # two blocks of zeros: the proper end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, at byte {archive.offset}") from error


def _content(member: IO[bytes], budget: Budget, wanted: bool) -> bytes | None:
    """The bytes of a member, None where it is too large or not wanted; read to its end in any case, for its checksum."""
    pieces: list[bytes] = []
    size = 0
    while piece := member.read(PIECE):
        budget.spend(len(piece))
        size += len(piece)
        if wanted and size <= MAX_DOCUMENT_BYTES:
            pieces.append(piece)
    return b"".join(pieces) if wanted and size <= MAX_DOCUMENT_BYTES else None


def _safe_name(name: str, path: Path) -> str:
    """`name` as text that leads nowhere else. Raises GenomeError for one that is absolute or climbs."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name or parts[0][1:2] == ":":
        raise _hostile(path, name, "leads out of the archive")
    shown = shown_path(name.encode("utf-8", "surrogateescape"))
    return "/".join(part for part in shown.split("/") if part not in ("", "."))


def _hostile(path: Path, name: str, what: str) -> GenomeError:
    return GenomeError(
        f"{path}: the member {name[:100]!r} {what}", "unpack it where you trust it, and name the folder as a source instead"
    )
