"""Documents of several snapshots of one git repository: each a domain of its own, the oldest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chrysalis_ray.config.genome import HistorySource, is_object_id
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome.documents import Document, capped
from chrysalis_ray.genome.sources.git_objects import time_of_commit
from chrysalis_ray.genome.sources.git_source import opened, read_commit


def read_history(source: HistorySource, relative_to: Path, skipped: Counter[str], facts: dict[str, Any]) -> Iterator[Document]:
    """What every snapshot brought that no earlier one holds, snapshot by snapshot.

    Counts what git sources count, and ``unchanged``. Puts into `facts` what every snapshot was pinned to and when it was
    committed. Paths name the snapshot. Raises GenomeError for a snapshot that cannot be had, is older than the one before it,
    or brings nothing.
    """
    told: list[dict[str, Any]] = []
    seen: set[str] = set()
    facts["snapshots"] = told
    limit = None if source.max_megabytes is None else int(source.max_megabytes * 1_000_000)
    for number, snapshot in enumerate(source.snapshots):
        at: dict[str, Any] = {}
        git = source.at(number)
        with opened(git, relative_to) as (reader, commit):
            committed = time_of_commit(reader, commit)
            _check_order(source, number, told, committed)
            fresh = _fresh(read_commit(reader, commit, git, skipped, at), seen, skipped)
            name = commit[:12] if is_object_id(snapshot) else snapshot
            count = 0
            for document in capped(fresh, limit, skipped):
                repository, _, path = document.path.partition("/")
                count += 1
                yield replace(document, path=f"{repository}@{name}/{path}")
        if not count:
            raise GenomeError(
                f"{source.url}: the snapshot {snapshot!r} brings no document that an earlier one does not hold",
                "leave it out, or let `glob` match text that changed",
            )
        told.append({"snapshot": snapshot, "domain": source.domains[number], "committed": committed, "documents": count, **at})


def _fresh(documents: Iterator[Document], seen: set[str], skipped: Counter[str]) -> Iterator[Document]:
    for document in documents:
        if document.doc_id in seen:
            skipped["unchanged"] += 1
        else:
            seen.add(document.doc_id)
            yield document


def _check_order(source: HistorySource, number: int, told: list[dict[str, Any]], committed: int) -> None:
    if told and committed < told[-1]["committed"]:
        now, before = (datetime.fromtimestamp(at, UTC).date() for at in (committed, told[-1]["committed"]))
        raise GenomeError(
            f"{source.url}: the snapshot {source.snapshots[number]!r} ({now}) is older than the one before it, "
            f"{told[-1]['snapshot']!r} ({before})",
            "write the oldest snapshot first",
        )
