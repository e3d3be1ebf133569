"""A batch of documents, looked through in one go: what every engine does, in whatever process. A batch is small enough to stay
in a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.genome.documents import Document
from chrysalis_ray.genome.marks import marks_of
from chrysalis_ray.genome.scan_cache import Seen
from chrysalis_ray.genome.shingles import MOST_AT_ONCE, Hashes, kept_shingles

BATCH_CHARACTERS = 200_000


@dataclass(frozen=True)
class Scanned:
    """What was found in a batch of documents: the marks of each, all kept shingles, and how many each document has."""

    marks: Sequence[dict[str, str]]
    hashes: Hashes
    sizes: NDArray[np.int64]

    def each(self) -> Iterator[Seen]:
        """What was found in each document."""
        return map(Seen, self.marks, np.split(self.hashes, np.cumsum(self.sizes)[:-1]))


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
    return Scanned([marks_of(document) for document in read], *kept_shingles([document.text for document in read]))
