"""What a genome is made of: a document, its order, and the cap of a domain."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

SPLITS = ("train", "select", "report")
MISFITS_BEFORE_STOP = 24


@dataclass(frozen=True)
class Document:
    """One text of one domain.

    `doc_id` is the sha256 of the UTF-8 bytes. `path` is for people and is unique enough to find the text again. `source_key`
    is what the split hashes: all documents made from one source file share it, so that they share a split.
    """

    doc_id: str
    path: str
    source_key: str
    domain: str
    text: str
    licence: str

    @property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())


def make_document(text: str, path: str, source_key: str, domain: str, licence: str) -> Document:
    """A document named by its content. Raises UnicodeEncodeError when `text` holds a lone surrogate."""
    return Document(hashlib.sha256(text.encode()).hexdigest(), path, source_key, domain, text, licence)


def hash_order(name: str) -> str:
    """Sort key that spreads names evenly: a prefix of the sorted list is a fair sample, not the alphabet's start."""
    return hashlib.sha256(b"order\0" + name.encode("utf-8", "surrogateescape")).hexdigest()


def capped(documents: Iterable[Document], max_bytes: int | None, skipped: Counter[str]) -> Iterator[Document]:
    """Documents in order until `max_bytes` are full; what does not fit any more is passed over and counted as ``over_cap``.

    Stops after `MISFITS_BEFORE_STOP` misfits in a row, so that a full domain costs no further work.
    """
    total = misfits = 0
    for document in documents:
        size = document.size
        if max_bytes is None or total + size <= max_bytes:
            total, misfits = total + size, 0
            yield document
        else:
            skipped["over_cap"] += 1
            misfits += 1
            if misfits == MISFITS_BEFORE_STOP:
                return


def pieces(text: str, limit: int) -> list[str]:
    """Cut `text` into pieces of at most about `limit` characters, whose concatenation is `text`.

    Cuts fall before an unindented line after a blank one (a definition, a paragraph) from half of `limit` on, after any blank
    line from three quarters on, and before the line that would pass `limit`. A line longer than `limit` stays whole.
    """
    found: list[str] = []
    lines: list[str] = []
    size = 0
    blank = False
    for line in text.splitlines(keepends=True):
        boundary = blank and (size >= limit * 3 // 4 or (size >= limit // 2 and not line[0].isspace()))
        if lines and (boundary or size + len(line) > limit):
            found.append("".join(lines))
            lines, size = [], 0
        lines.append(line)
        size += len(line)
        blank = not line.strip()
    if lines:
        found.append("".join(lines))
    return found
