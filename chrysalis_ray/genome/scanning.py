"""Marks and sketches of many documents, in one process or in several: what comes out is the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

from chrysalis_ray.genome.documents import Document
from chrysalis_ray.genome.marks import marks_of
from chrysalis_ray.genome.similarity import Sketches, joined, sketch

BATCH_CHARACTERS = 1_000_000
ALONE_BELOW = 64_000_000  # characters; starting processes costs more than they save


def scan(documents: Sequence[Document], processes: int | None = None) -> tuple[list[Document], Sketches]:
    """`documents` with their marks, and their sketches, in order. `processes` is chosen by the work and the machine if None."""
    if processes is None:
        large = sum(len(document.text) for document in documents) >= ALONE_BELOW
        processes = len(os.sched_getaffinity(0)) if large else 1
    batches = list(_batches(documents))
    if processes == 1 or len(batches) < 2:
        scanned = [_scan(batch) for batch in batches]
    else:
        with ProcessPoolExecutor(min(processes, len(batches)), get_context("spawn")) as pool:
            scanned = list(pool.map(_scan, batches))
    marks = [mark for of_batch, _ in scanned for mark in of_batch]
    marked = [replace(document, marks=mark) if mark else document for document, mark in zip(documents, marks, strict=True)]
    return marked, joined([sketches for _, sketches in scanned])


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _scan(documents: Sequence[Document]) -> tuple[list[dict[str, str]], Sketches]:
    return [marks_of(document) for document in documents], sketch([document.text for document in documents])
