"""What a genome is made of: a document, its order, and the cap of a domain."""

from __future__ import annotations

import codecs
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

SPLITS = ("train", "select", "report")
EXCLUDED = "excluded"  # the part of documents that are kept and sealed, but neither train nor judge
PARTS = (*SPLITS, EXCLUDED)
ENCODINGS = ("utf-8", "utf-8-sig", "latin-1")
MISFITS_BEFORE_STOP = 24


@dataclass(frozen=True)
class Document:
    """One text of one domain.

    `doc_id` is the sha256 of the bytes that were read. They come back as ``text.encode(encoding)``: ``utf-8``; ``utf-8-sig``
    where they began with a byte order mark; ``latin-1``, which loses nothing, where they were no UTF-8. `path` is for people
    and is unique enough to find the text again. `source_key` is what the split hashes: all documents made from one source
    file share it, so that they share a split. `evidence` says why the licence is thought to be what it is. `marks` maps what
    was noticed (`chrysalis_ray.genome.marks`) to a few words about it. `record` is the JSON that the text was told from, where
    it was told from any: a line per record; it is kept and proven beside the text, and nothing is trained on it.
    """

    doc_id: str
    path: str
    source_key: str
    domain: str
    text: str
    licence: str
    encoding: str = "utf-8"
    evidence: str = "declared"
    marks: Mapping[str, str] = field(default_factory=dict)
    record: str = ""

    @property
    def content(self) -> bytes:
        """The bytes that were read."""
        return self.text.encode(self.encoding)

    @cached_property
    def size(self) -> int:
        """How many bytes were read. Asked for many times, and not known without all of the text where that is not ASCII."""
        plain = self.text.isascii() and self.encoding != "utf-8-sig"
        return len(self.text) if plain else len(self.content)

    @property
    def characters(self) -> int:
        """How many characters the text has."""
        return len(self.text)

    def in_memory(self) -> Document:
        """The document with its text at hand, to be looked at more than once (`text_store`)."""
        return self

    def changed(self, **changes: Any) -> Document:
        """The document with other fields."""
        other = replace(self, **changes)
        if "size" in self.__dict__ and not changes.keys() & {"text", "encoding"}:
            other.__dict__["size"] = self.size
        return other


def make_document(
    text: str,
    path: str,
    source_key: str,
    domain: str,
    licence: str,
    encoding: str = "utf-8",
    evidence: str = "declared",
    content: bytes | None = None,
) -> Document:
    """A document named by its content: ``text.encode(encoding)``, which may be given as `content` where it is at hand. Raises
    UnicodeEncodeError when `text` holds a lone surrogate."""
    if content is None:
        content = text.encode(encoding)
    doc_id = hashlib.sha256(content).hexdigest()
    document = Document(doc_id, path, source_key, domain, text, licence, encoding, evidence)
    document.__dict__["size"] = len(content)
    return document


def decoded(content: bytes) -> tuple[str, str] | None:
    """(text, encoding) such that ``text.encode(encoding) == content``, newlines untouched. None where the bytes hold a NUL:
    no text file does."""
    if b"\0" in content:
        return None
    if content.startswith(codecs.BOM_UTF8):
        try:
            return content.decode("utf-8-sig"), "utf-8-sig"
        except UnicodeDecodeError:
            return content.decode("latin-1"), "latin-1"
    try:
        return content.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        return content.decode("latin-1"), "latin-1"


def shown_path(name: bytes) -> str:
    """A file name as text. One that is no UTF-8 is written with ``\\xNN``, and then a backslash of its own too: the bytes can
    be had back."""
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.replace(b"\\", b"\\x5c").decode("utf-8", "backslashreplace")


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
