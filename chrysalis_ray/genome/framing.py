r"""A genome as one text, and back: the ancestor's frames, but reversible.

    <|genome_start|>{"documents": .., "format": 1, "genome_id": "..", "merkle_root": ".."}
    <|repo_start|>"domain"
    <|file_start|>{"path": .., "sha256": .., "bytes": .., "split": .., "licence": ..}
    the text, and after it a line break of the frame's own
    <|file_end|>
    <|file_silent|>{"path": .., "sha256": .., "bytes": .., "split": "excluded", "marks": ..}
    <|repo_end|>
    <|genome_end|>

The file is UTF-8 with ``\n`` between lines; no line break inside a text is altered. A line of a text that begins with a frame
token, or with backslashes and one, gets one more backslash, which reading takes away: no text can close its own frame. A
text that is not plain UTF-8 names its ``encoding``: encoded so, it is the bytes that were read. Documents that ``exclude``
keeps away are named, not shown. Documents stand in the manifest's order, so that their heads alone give the Merkle root.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from chrysalis_ray.core.errors import GenomeCorrupt
from chrysalis_ray.core.records import sync_folder
from chrysalis_ray.genome.build import Genome
from chrysalis_ray.genome.documents import ENCODINGS, EXCLUDED, PARTS, Document
from chrysalis_ray.genome.sealing import root_of_documents

FORMAT = 1
FRAME = re.compile(rb"^(\\*<\|(?:genome|repo|file)_(?:start|end|silent)\|>)", re.MULTILINE)
ESCAPED = re.compile(rb"^\\(\\*<\|(?:genome|repo|file)_(?:start|end|silent)\|>)", re.MULTILINE)
GENOME_START, GENOME_END = b"<|genome_start|>", b"<|genome_end|>"
REPO_START, REPO_END = b"<|repo_start|>", b"<|repo_end|>"
FILE_START, FILE_END, FILE_SILENT = b"<|file_start|>", b"<|file_end|>", b"<|file_silent|>"


@dataclass(frozen=True)
class FramedDocument:
    """One document of a framed text: its head, its domain and its bytes (None where it is named only)."""

    head: dict[str, Any]
    domain: str
    content: bytes | None


def escaped(content: bytes) -> bytes:
    """`content` with a backslash before every line that could be taken for a frame."""
    return FRAME.sub(rb"\\\1", content)


def unescaped(content: bytes) -> bytes:
    """What `escaped` was given."""
    return ESCAPED.sub(rb"\1", content)


def write_text(genome: Genome, path: Path) -> str:
    """Write `genome` as one framed text at `path`, whole or not at all; returns the file's sha256."""
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            digest = hashlib.sha256()
            for piece in _pieces(genome):
                stream.write(piece)
                digest.update(piece)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return digest.hexdigest()


def _pieces(genome: Genome) -> Iterator[bytes]:
    content = genome.manifest["content"]
    told = {"format": FORMAT, "genome_id": genome.genome_id, "merkle_root": content["merkle_root"]}
    yield _line(GENOME_START, {**told, "documents": len(content["documents"])})
    for domain in dict.fromkeys(row["domain"] for row in content["documents"]):
        yield _line(REPO_START, domain)
        texts = {document.doc_id: document for part in PARTS for document in genome.documents(domain, part)}
        for row in content["documents"]:
            if row["domain"] == domain:
                yield from _frame(row, texts[row["doc_id"]])
        yield REPO_END + b"\n"
    yield GENOME_END + b"\n"


def _frame(row: dict[str, Any], document: Document) -> Iterator[bytes]:
    head: dict[str, Any] = {key: row[key] for key in ("path", "bytes", "split", "licence", "encoding", "marks") if key in row}
    head["sha256"] = row["doc_id"]
    if row["split"] == EXCLUDED:
        yield _line(FILE_SILENT, head)
        return
    yield _line(FILE_START, head)
    yield escaped(document.text.encode())
    yield b"\n" + FILE_END + b"\n"


def _line(frame: bytes, head: Any) -> bytes:
    return frame + json.dumps(head, sort_keys=True).encode() + b"\n"


# and back -----------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> Iterator[FramedDocument]:
    """The documents of a framed text, each checked against the sha256 of its head, and at the end all heads against the Merkle
    root. Raises GenomeCorrupt with the line where the text is not what was written."""
    with path.open("rb") as stream:
        lines = _Lines(stream, path)
        told = lines.head(GENOME_START, dict)
        rows: list[dict[str, Any]] = []
        while (line := lines.next()) != GENOME_END:
            domain = lines.head_of(line, REPO_START, str)
            while (line := lines.next()) != REPO_END:
                silent = line.startswith(FILE_SILENT)
                head = lines.head_of(line, FILE_SILENT if silent else FILE_START, dict)
                if not (isinstance(head.get("path"), str) and isinstance(head.get("sha256"), str) and "bytes" in head):
                    raise lines.wrong("a head that names no document")
                rows.append({"path": head["path"], "doc_id": head["sha256"], "bytes": head["bytes"]})
                yield FramedDocument(head, domain, None if silent else lines.content(head))
        if root_of_documents(rows) != told.get("merkle_root") or stream.read(1):
            raise lines.wrong(f"{len(rows)} documents, whose Merkle root is not {str(told.get('merkle_root'))[:16]}")


class _Lines:
    """The lines of a framed text, counted."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self._stream, self._path = stream, path
        self.number = 0

    def next(self) -> bytes:
        line = self._stream.readline()
        self.number += 1
        if not line.endswith(b"\n"):
            raise self.wrong("the end of the file in the middle of a genome")
        return line[:-1]

    def head(self, frame: bytes, kind: type) -> Any:
        return self.head_of(self.next(), frame, kind)

    def head_of(self, line: bytes, frame: bytes, kind: type) -> Any:
        """The JSON that follows `frame` on `line`."""
        try:
            value = json.loads(line.removeprefix(frame)) if line.startswith(frame) else None
        except ValueError as error:
            raise self.wrong(f"a head that is no JSON ({error})") from error
        if not isinstance(value, kind):
            raise self.wrong(f"{line[:40]!r} where {frame.decode()} was due")
        return value

    def content(self, head: dict[str, Any]) -> bytes:
        """The bytes of a document, up to its end, checked."""
        lines = []
        while (line := self.next()) != FILE_END:
            lines.append(line)
        content = unescaped(b"\n".join(lines))
        encoding = head.get("encoding", "utf-8")
        try:
            content = content if encoding == "utf-8" else content.decode("utf-8").encode(ENCODINGS[ENCODINGS.index(encoding)])
        except ValueError as error:
            raise self.wrong(f"text that cannot be had back in {encoding!r}") from error
        if hashlib.sha256(content).hexdigest() != head["sha256"]:
            raise self.wrong(f"the end of {head['path']!r}, whose sha256 is not {head['sha256'][:16]}")
        return content

    def wrong(self, what: str) -> GenomeCorrupt:
        return GenomeCorrupt(f"{self._path}:{self.number}: {what}", "export the genome again")
