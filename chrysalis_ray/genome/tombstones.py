"""Tombstones: which documents a genome must not hold any more, since when, and why. Never their text.

A tombstone is a JSON object: ``doc_id`` (sha256 of the document's bytes), ``reason`` and ``date`` (YYYY-MM-DD); where the
document was sealed once, also its ``path``, ``domain``, ``bytes`` and ``licence``, and the ``genome_id`` it was taken out of. A
genome that was made to forget has them in its manifest (``forgotten``) and, one a line, in ``forgotten.jsonl`` beside it, which
``genome.forget`` of an experiment can name. Whoever builds into that folder again, or with that list, builds without these
documents: their sources may still hold them. They take part in what decides the splits, so that nothing else moves.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.core.records import canonical_json, write_bytes
from chrysalis_ray.genome.documents import SPLITS

FILE = "forgotten.jsonl"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHAPE = '{"doc_id": "<sha256>", "reason": "...", "date": "YYYY-MM-DD"}'

Tombstone = Mapping[str, Any]


def read_tombstones(path: Path) -> list[Tombstone]:
    """The tombstones of a file, one a line. Raises GenomeError naming file and line for one that is none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise GenomeError(
            f"the forget list {path} cannot be read: {error.strerror}", "paths are relative to the experiment file"
        ) from error
    return [_tombstone(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _tombstone(line: bytes, where: str) -> Tombstone:
    try:
        read = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise GenomeError(f"{where}: not a line of JSON ({type(error).__name__})", _SHAPE) from error
    if not isinstance(read, dict) or not _SHA256.fullmatch(str(read.get("doc_id"))):
        raise GenomeError(f"{where}: no tombstone: its doc_id is no sha256", _SHAPE)
    if not isinstance(read.get("reason"), str) or not read["reason"].strip():
        raise GenomeError(f"{where}: the tombstone of {read['doc_id'][:16]} gives no reason", _SHAPE)
    checked_date(read.get("date"), where)
    if "text" in read:
        raise GenomeError(f"{where}: a tombstone holds no text", _SHAPE)
    return read


def checked_date(written: object, where: str) -> str:
    """`written` if it is a day such as 2026-01-31. Raises GenomeError."""
    try:
        day = date.fromisoformat(str(written)).isoformat()
        if day == written:  # ISO 8601 has other ways to write it, which sort otherwise
            return day
    except ValueError:
        pass
    raise GenomeError(f"{where}: {written!r} is no date", "write YYYY-MM-DD")


def united(*lists: Iterable[Tombstone]) -> list[Tombstone]:
    """One tombstone per document, by doc_id; of several that of the earliest date."""
    ordered = sorted((stone for stones in lists for stone in stones), key=lambda stone: (stone["date"], canonical_json(stone)))
    first: dict[str, Tombstone] = {}
    for stone in ordered:
        first.setdefault(stone["doc_id"], stone)
    return [first[doc_id] for doc_id in sorted(first)]


def standing(folder: Path, content: Mapping[str, Any], forget_list: Path | None) -> list[Tombstone]:
    """What a build into `folder` must leave out: what was forgotten there before (`content` is that of the manifest that is
    there, if one is), and what the experiment's own list names."""
    kept = folder / FILE
    return united(
        content.get("forgotten", ()),
        read_tombstones(kept) if kept.is_file() else (),
        read_tombstones(forget_list) if forget_list is not None else (),
    )


def write_tombstones(folder: Path, tombstones: Sequence[Tombstone]) -> None:
    """Keep the tombstones beside the manifest; no file where there are none."""
    if tombstones:
        write_bytes(folder / FILE, b"".join(canonical_json(stone) + b"\n" for stone in tombstones))


def check_left(rows: Sequence[Mapping[str, Any]], forgotten: Sequence[Tombstone]) -> None:
    """Raises GenomeError where what is left of a genome cannot train and judge any more: nothing at all, or a domain that lost
    the whole of a split. A domain that is gone altogether is no error."""
    if not rows:
        raise GenomeError("every document would be forgotten: no genome is left", "delete its folder instead")
    counts = Counter((row["domain"], row["split"]) for row in rows)
    for domain in sorted({row["domain"] for row in rows}):
        empty = [split for split in SPLITS if not counts[domain, split]]
        if empty:
            lost = sum(stone.get("domain") == domain for stone in forgotten)
            raise GenomeError(
                f"domain {domain!r} would have no {empty[0]!r} document left ({lost} of it forgotten)",
                "forget the whole domain, or take the documents out of its source and build a genome in another folder",
            )


def check_gone(content: Mapping[str, Any]) -> None:
    """Raises GenomeCorrupt where a document has both a line and a tombstone."""
    forgotten = {stone["doc_id"] for stone in content.get("forgotten", ())}
    back = [row["path"] for row in content["documents"] if row["doc_id"] in forgotten]
    if back:
        raise GenomeCorrupt(f"{back[0]!r} was forgotten and is among the documents", "build the genome again")
