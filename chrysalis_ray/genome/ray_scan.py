"""Scanning by Ray Data: the one door to it.

The documents are read and pinned by the driver, as always; a block of texts per batch goes through ``map_batches``, and marks
and shingles come back, in whatever order, to be put in theirs. The function that scans a batch is the one of `scanning`: the
genome is the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import canonical_json
from chrysalis_ray.genome.documents import Document
from chrysalis_ray.genome.scanning import Scanned, scan_batch

TEXTS = pa.schema([("batch", pa.int64()), ("path", pa.string()), ("encoding", pa.string()), ("text", pa.large_string())])
FOUND = pa.schema([("batch", pa.int64()), ("marks", pa.string()), ("shingles", pa.large_list(pa.uint64()))])


def scan_by_ray(parts: Sequence[Sequence[Document]], processes: int | None) -> Iterator[Scanned]:
    """What is found in each of `parts`, in order; by at most so many `processes` of the cluster at a time. Uses the Ray that
    this process is connected to, or the one that ``RAY_ADDRESS`` names, or starts one on this machine and ends it after."""
    if not parts:
        return
    import ray

    with _connected():
        ray.data.DataContext.get_current().enable_progress_bars = False
        given = ray.data.from_arrow([_texts(number, part) for number, part in enumerate(parts)])
        found: dict[int, Scanned] = {}
        scanned = given.map_batches(scan_table, batch_format="pyarrow", batch_size=None, concurrency=processes)
        for table in scanned.iter_batches(batch_format="pyarrow", batch_size=None):
            found |= _by_batch(table)
    whole = sum(number in found and len(found[number].marks) == len(part) for number, part in enumerate(parts))
    if whole != len(parts):
        raise GenomeError(f"Ray Data gave {whole} of {len(parts)} batches back whole", "build with `engine: processes`")
    for number in range(len(parts)):
        yield found.pop(number)


@contextmanager
def _connected() -> Iterator[None]:
    """Inside this block there is a Ray."""
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()


def _texts(number: int, documents: Sequence[Document]) -> pa.Table:
    columns = [[number] * len(documents), *([getattr(document, name) for document in documents] for name in TEXTS.names[1:])]
    return pa.table(columns, TEXTS)


def scan_table(texts: pa.Table) -> pa.Table:
    """The marks and shingles of a table of texts. Runs in a process of Ray's."""
    found = []
    for number, rows in _groups(texts):
        documents = [Document("", row["path"], "", "", row["text"], "", row["encoding"]) for row in rows.to_pylist()]
        scanned = scan_batch(documents)
        told = [canonical_json(marks).decode() for marks in scanned.marks]
        shingles = pa.LargeListArray.from_arrays(np.r_[0, np.cumsum(scanned.sizes)].astype(np.int64), scanned.hashes)
        found.append(pa.table([[number] * len(told), told, shingles], FOUND))
    return pa.concat_tables(found) if found else FOUND.empty_table()


def _by_batch(table: pa.Table) -> dict[int, Scanned]:
    found = {}
    for number, rows in _groups(table):
        shingles = rows["shingles"].combine_chunks()
        sizes = np.diff(shingles.offsets.to_numpy())
        found[number] = Scanned([json.loads(told) for told in rows["marks"].to_pylist()], shingles.flatten().to_numpy(), sizes)
    return found


def _groups(table: pa.Table) -> Iterator[tuple[int, Any]]:
    """Runs of rows of one batch: Ray may lay blocks together, but does not cut or stir them."""
    numbers = table["batch"].to_numpy()
    begins = np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]]) if len(numbers) else numbers
    for begin, end in zip(begins, [*begins[1:], len(numbers)], strict=True):
        yield int(numbers[begin]), table.slice(begin, end - begin)
