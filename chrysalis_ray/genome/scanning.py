"""Marks and sketches of many documents: in one process, in several, or by Ray Data; what comes out is the same.

What was scanned before, under the same rules, is taken from a cache where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from chrysalis_ray.config.genome import GenomeBuild
from chrysalis_ray.genome.batch import Scanned, batches, scan_batch
from chrysalis_ray.genome.documents import Document
from chrysalis_ray.genome.native import kernel
from chrysalis_ray.genome.pools import deaf_to_ctrl_c, process_pool
from chrysalis_ray.genome.scan_cache import ScanCache, key_of
from chrysalis_ray.genome.similarity import Sketches
from chrysalis_ray.genome.sketch_store import SketchStore

SENT_TOGETHER = 40  # batches, to another process
ALONE_BELOW = 400_000_000  # characters; starting processes costs more than they save
FEWEST_BESIDE_KERNEL = 4  # processes


def scan(
    documents: Sequence[Document],
    how: GenomeBuild | None = None,
    cache: ScanCache | None = None,
    folder: Path | None = None,
) -> tuple[list[Document], Sketches]:
    """`documents` with their marks, and their sketches, in order. What `cache` holds of them is not computed, and it holds
    exactly them afterwards. Sketches that are large go to a file in `folder`."""
    how = how or GenomeBuild()
    marks: list[dict[str, str]] = []
    store = SketchStore(folder, len(documents), sum(document.characters for document in documents))
    for batch in _scan_all(documents, how) if cache is None else _recalled(documents, how, cache):
        store.add(batch.hashes, batch.sizes)
        marks += batch.marks
    marked = [document.changed(marks=found) if found else document for document, found in zip(documents, marks, strict=True)]
    return marked, store.sketches()


def _recalled(documents: Sequence[Document], how: GenomeBuild, cache: ScanCache) -> Iterator[Scanned]:
    """What is found in `documents`, computed only where `cache` does not know it."""
    keys = [key_of(document) for document in documents]
    missing = [document for document, key in zip(documents, keys, strict=True) if key not in cache]
    found = (each for batch in _scan_all(missing, how) for each in batch.each())
    for seen in cache.renewed(keys, found):
        yield Scanned([seen.marks], seen.hashes, np.array([len(seen.hashes)], np.int64))


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
    with process_pool(processes) as pool:
        with deaf_to_ctrl_c():
            found = pool.map(scan_batch, parts, chunksize=together)
        yield from found


def processes_for(documents: Sequence[Document]) -> int:
    """How many processes pay for themselves on this machine. With the kernel a text is scanned about as soon as it is sent, so
    that two or three would save nothing."""
    cores = len(os.sched_getaffinity(0))
    large = sum(document.characters for document in documents) >= ALONE_BELOW
    return cores if large and (kernel is None or cores >= FEWEST_BESIDE_KERNEL) else 1
