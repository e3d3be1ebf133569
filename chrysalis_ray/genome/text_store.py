"""Texts of a genome in the making: in memory while they are few, beyond that in a file, so that a large genome needs no memory
for its text.

The file lies beside the genome, has no name, and is gone with the process, however it ends. What is read from it is hashed
again: a document that is sealed is what its doc_id says.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, TypeVar

from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.genome.documents import Document

IN_MEMORY = 256_000_000  # bytes of text

From = TypeVar("From")
Read = Callable[[From, Path, Counter[str], dict[str, Any]], Iterable[Document]]


class TextStore:
    """Keeps the texts of documents; what does not fit into `in_memory` bytes goes to a file in `folder`, or in the nearest
    folder above it that is there."""

    def __init__(self, folder: Path, in_memory: int | None = None) -> None:
        self._folder = folder
        self._room = IN_MEMORY if in_memory is None else in_memory
        self._file: IO[bytes] | None = None
        self._end = 0

    def keep(self, document: Document) -> Document:
        """`document`, or the same with its text in the file. Raises GenomeError when the disk is full."""
        if isinstance(document, StoredDocument):
            return document
        if document.size <= self._room:
            self._room -= document.size
            return document
        content = document.content
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=_there(self._folder), buffering=0)  # noqa: SIM115  # as long as texts
            if self._file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise GenomeError(
                f"{self._folder}: after {self._end:,} bytes of text no more can be stored there: {error.strerror}",
                "free as much space there as the sources have text, and half of it for the genome",
            ) from error
        begin, self._end = self._end, self._end + len(content)
        return StoredDocument(document, self, begin, len(content), len(document.text))

    def keeping(self, read: Read[From]) -> Read[From]:
        """`read`, with what it gives kept here."""

        def kept(source: From, relative_to: Path, skipped: Counter[str], facts: dict[str, Any]) -> Iterator[Document]:
            return map(self.keep, read(source, relative_to, skipped, facts))

        return kept

    def content(self, begin: int, size: int, doc_id: str) -> bytes:
        """The bytes of a document. Raises GenomeCorrupt when the disk gives others than were written."""
        assert self._file is not None
        try:
            found = os.pread(self._file.fileno(), size, begin)
        except OSError as error:
            raise GenomeError(f"a text stored near {self._folder} cannot be read: {error.strerror}", "build again") from error
        if hashlib.sha256(found).hexdigest() != doc_id:
            raise GenomeCorrupt(f"a text stored near {self._folder} comes back changed ({doc_id[:16]})", "check that disk")
        return found


class StoredDocument(Document):
    """A document whose text is read when it is asked for; all else is as if it were at hand."""

    def __init__(self, record: Document, store: TextStore, begin: int, size: int, characters: int) -> None:
        for name in RECORD:
            object.__setattr__(self, name, getattr(record, name))
        object.__setattr__(self, "_place", (store, begin, size, characters))

    @property
    def content(self) -> bytes:
        store, begin, size, _ = self._where
        return store.content(begin, size, self.doc_id)

    @property
    def text(self) -> str:
        return self.content.decode(self.encoding)

    @property
    def size(self) -> int:
        return self._where[2]

    @property
    def characters(self) -> int:
        return self._where[3]

    def in_memory(self) -> Document:
        return Document(**{field.name: getattr(self, field.name) for field in fields(Document)})

    def changed(self, **changes: Any) -> Document:
        if changes.keys() & {"doc_id", "text", "encoding"}:
            return self.in_memory().changed(**changes)
        same = StoredDocument(self, *self._where)
        for name, value in changes.items():
            object.__setattr__(same, name, value)
        return same

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process it goes with its text."""
        return Document, tuple(getattr(self, field.name) for field in fields(Document))

    @property
    def _where(self) -> tuple[TextStore, int, int, int]:
        return self.__dict__["_place"]


RECORD = tuple(field.name for field in fields(Document) if field.name != "text")


def _there(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
