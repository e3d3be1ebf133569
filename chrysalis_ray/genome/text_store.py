"""Texts of a genome in the making: in memory while they are few, beyond that in a file, so that a large genome needs no memory
for its text.

The file lies beside the genome (`scratch.py`). Where other machines look through the texts, all of them lie in it, and it has a
name: who reaches it reads there what it is told to look at. What is read from it is hashed again: a document that is sealed is
what its doc_id says.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from chrysalis_ray.core.errors import GenomeCorrupt
from chrysalis_ray.genome.documents import Document
from chrysalis_ray.genome.scratch import Scratch

IN_MEMORY = 256_000_000  # bytes of text

From = TypeVar("From")
Read = Callable[[From, Path, Counter[str], dict[str, Any]], Iterable[Document]]


class Piece(NamedTuple):
    """Where the text of a document lies: so many bytes of a file."""

    file: str
    begin: int
    size: int


class TextStore:
    """Keeps the texts of documents; what does not fit into `in_memory` bytes goes to a file in `folder`, or in the nearest
    folder above it that is there. A `shared` one keeps all of them in a file that others find."""

    def __init__(self, folder: Path, in_memory: int | None = None, shared: bool = False) -> None:
        self._room = 0 if shared else IN_MEMORY if in_memory is None else in_memory
        self.scratch = Scratch(folder, "texts" if shared else None)

    def keep(self, document: Document) -> Document:
        """`document`, or the same with its text in the file. Raises GenomeError when the disk is full."""
        if isinstance(document, StoredDocument):
            return document
        if document.size <= self._room:
            self._room -= document.size
            return document
        content = document.content
        return StoredDocument(document, self, self.scratch.append(content), len(content), len(document.text))

    def keeping(self, read: Read[From]) -> Read[From]:
        """`read`, with what it gives kept here."""

        def kept(source: From, relative_to: Path, skipped: Counter[str], facts: dict[str, Any]) -> Iterator[Document]:
            return map(self.keep, read(source, relative_to, skipped, facts))

        return kept

    def content(self, begin: int, size: int, doc_id: str) -> bytes:
        """The bytes of a document. Raises GenomeCorrupt when the disk gives others than were written."""
        found = self.scratch.read(begin, size)
        if hashlib.sha256(found).hexdigest() != doc_id:
            raise GenomeCorrupt(
                f"a text stored near {self.scratch.folder} comes back changed ({doc_id[:16]})", "check that disk"
            )
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

    @property
    def piece(self) -> Piece | None:
        """Where others may find the text; None where its file has no name."""
        store, begin, size, _ = self._where
        return None if store.scratch.path is None else Piece(str(store.scratch.path.absolute()), begin, size)

    def settle(self) -> None:
        """Let other machines see the file that the text lies in."""
        self._where[0].scratch.settle()

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
