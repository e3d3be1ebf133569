"""Marks and sketches of many documents: in one process, in several, or by Ray Data; what comes out is the same.

A batch of documents is scanned in one go, small enough to stay in a processor's cache. What was scanned before, under the same
rules, is taken from a cache where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.config.genome import GenomeBuild
from chrysalis_ray.genome.documents import Document
from chrysalis_ray.genome.marks import marks_of
from chrysalis_ray.genome.scan_cache import ScanCache, Seen, key_of
from chrysalis_ray.genome.similarity import MOST_AT_ONCE, Hashes, Sketches, in_one, kept_shingles, sketches_of

BATCH_CHARACTERS = 200_000
SENT_TOGETHER = 40  # batches, to another process
ROOM_FOR_ONE = 8  # characters a kept shingle: real text has twenty; room that is not used takes no memory
ALONE_BELOW = 400_000_000  # characters; starting processes costs more than they save


@dataclass(frozen=True)
class Scanned:
    """What was found in a batch of documents: the marks of each, all kept shingles, and how many each document has."""

    marks: Sequence[dict[str, str]]
    hashes: Hashes
    sizes: NDArray[np.int64]

    def each(self) -> Iterator[Seen]:
        """What was found in each document."""
        return map(Seen, self.marks, np.split(self.hashes, np.cumsum(self.sizes)[:-1]))


def scan(
    documents: Sequence[Document], how: GenomeBuild | None = None, cache: ScanCache | None = None
) -> tuple[list[Document], Sketches]:
    """`documents` with their marks, and their sketches, in order. What `cache` holds of them is not computed, and it holds
    exactly them afterwards."""
    marks: list[dict[str, str]] = []
    sizes = [np.empty(0, np.int64)]
    hashes, filled = np.empty(sum(document.characters for document in documents) // ROOM_FOR_ONE + 1, np.uint64), 0
    how = how or GenomeBuild()
    for batch in _scan_all(documents, how) if cache is None else _recalled(documents, how, cache):
        begin, filled = filled, filled + len(batch.hashes)
        if filled > len(hashes):
            hashes.resize(2 * filled, refcheck=False)
        hashes[begin:filled] = batch.hashes
        sizes.append(batch.sizes)
        marks += batch.marks
    marked = [document.changed(marks=found) if found else document for document, found in zip(documents, marks, strict=True)]
    return marked, sketches_of(hashes[:filled], np.concatenate(sizes))


def _recalled(documents: Sequence[Document], how: GenomeBuild, cache: ScanCache) -> Iterator[Scanned]:
    """What is found in `documents`, computed only where `cache` does not know it."""
    keys = [key_of(document) for document in documents]
    seen = [cache.get(key) for key in keys]
    missing = [index for index, known in enumerate(seen) if known is None]
    found = (each for batch in _scan_all([documents[index] for index in missing], how) for each in batch.each())
    for index, fresh in zip(missing, found, strict=True):
        seen[index] = fresh
    known = [each for each in seen if each is not None]
    cache.keep(dict(zip(keys, known, strict=True)))
    return (Scanned([each.marks], each.hashes, np.array([len(each.hashes)], np.int64)) for each in known)


def _scan_all(documents: Sequence[Document], how: GenomeBuild) -> Iterable[Scanned]:
    """All of `documents`, batch by batch, in order."""
    if how.engine == "ray":
        from chrysalis_ray.genome.ray_scan import scan_by_ray

        return scan_by_ray(list(batches(documents)), how.processes)
    processes = how.processes or processes_for(documents)
    parts = list(batches(documents))
    if processes == 1 or len(parts) < 2:
        return map(scan_batch, parts)
    return _scan_apart(parts, min(processes, len(parts)))


def _scan_apart(parts: Sequence[Sequence[Document]], processes: int) -> Iterator[Scanned]:
    together = max(1, min(SENT_TOGETHER, len(parts) // processes))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(scan_batch, parts, chunksize=together)


def processes_for(documents: Sequence[Document]) -> int:
    """How many processes pay for themselves on this machine."""
    large = sum(document.characters for document in documents) >= ALONE_BELOW
    return len(os.sched_getaffinity(0)) if large else 1


def batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """`documents` in order, about `BATCH_CHARACTERS` together."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.characters
        if size >= BATCH_CHARACTERS or len(batch) == MOST_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def scan_batch(documents: Sequence[Document]) -> Scanned:
    """One batch, in this process."""
    read = [document.in_memory() for document in documents]
    contents = [document.text.encode("utf-8", "surrogatepass") for document in read]
    return Scanned([marks_of(document) for document in read], *kept_shingles(*in_one(contents)))
