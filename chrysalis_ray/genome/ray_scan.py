"""Scanning by Ray Data: the one door to it.

The driver reads and pins the sources; their texts go to a file in the genome's folder (`text_store`). Tasks of Ray Data are
told where in it the texts of a batch lie, read them there and hash them; marks and shingles come back, in order, a few at a
time. A task that does not reach that file (another machine, no shared folder), or finds other bytes there, says so: from then
on texts are handed over, so many at once that they fit into a corner of the object store, and the next when those are done.

The function that scans a batch is that of all engines (`batch.py`): the genome is the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import canonical_json
from chrysalis_ray.genome.batch import Scanned, scan_batch
from chrysalis_ray.genome.documents import Document
from chrysalis_ray.genome.text_store import StoredDocument

BATCHES_PER_BLOCK = 40  # of a block, which one task takes
TOLD_AT_ONCE = 1_000_000  # documents of which tasks are told where they lie: some 200 MB
HANDED_AT_ONCE = 64_000_000  # characters

Part = Sequence[Document]

PIECES = pa.schema(
    [("batch", pa.int64()), ("path", pa.string()), ("encoding", pa.string()), ("doc_id", pa.string()), ("file", pa.string()),
     ("begin", pa.int64()), ("size", pa.int64())]
)  # fmt: skip
TEXTS = pa.schema([("batch", pa.int64()), ("path", pa.string()), ("encoding", pa.string()), ("text", pa.large_string())])
FOUND = pa.schema([("batch", pa.int64()), ("marks", pa.string()), ("shingles", pa.large_list(pa.uint64()))])


def scan_by_ray(parts: Sequence[Part], processes: int | None) -> Iterator[Scanned]:
    """What is found in each of `parts`, in order; by at most so many `processes` of the cluster at a time. Uses the Ray that
    this process is connected to, or the one that ``RAY_ADDRESS`` names, or starts one on this machine and ends it after."""
    if not parts:
        return
    with _connected():
        done = 0
        for told in _windows(parts[: _placed(parts)], TOLD_AT_ONCE, len):
            for scanned in _scanned(told, _pieces, scan_pieces, processes):
                if scanned is None:
                    break
                done += 1
                yield scanned
            else:
                continue
            break
        for handed in _windows(parts[done:], HANDED_AT_ONCE, _characters):
            for scanned in _scanned(handed, _texts, scan_texts, processes):
                assert scanned is not None
                yield scanned


@contextmanager
def _connected() -> Iterator[None]:
    """Inside this block there is a Ray."""
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    heeded = signal.getsignal(signal.SIGTERM)
    ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    if callable(heeded) and threading.current_thread() is threading.main_thread():
        # whoever heeds SIGTERM here goes on doing so: Ray's own handler leaves nobody time to tidy up
        signal.signal(signal.SIGTERM, heeded)
    try:
        yield
    finally:
        ray.shutdown()


def _scanned(
    parts: Sequence[Part],
    told: Callable[[int, Part], pa.Table],
    scan_table: Callable[[pa.Table], pa.Table],
    processes: int | None,
) -> Iterator[Scanned | None]:
    """What `scan_table` finds in what is `told` of each of `parts`, in order; None where a task did not reach the text. Raises
    GenomeError unless every part comes back whole."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # Ray Data speaks for itself
    blocks = [range(begin, min(begin + BATCHES_PER_BLOCK, len(parts))) for begin in range(0, len(parts), BATCHES_PER_BLOCK)]
    given = ray.data.from_arrow([pa.concat_tables(told(number, parts[number]) for number in block) for block in blocks])
    given.context.enable_progress_bars = False
    given.context.execution_options.preserve_order = True
    pool = ray.data.TaskPoolStrategy(processes and min(processes, len(blocks)))
    scanned = given.map_batches(scan_table, batch_format="pyarrow", batch_size=None, compute=pool)
    tables = scanned.iter_batches(batch_format="pyarrow", batch_size=None)
    whole = 0
    for number, rows in ((number, rows) for table in tables for number, rows in _groups(table)):
        if number != whole or len(rows) != len(parts[number]):
            break
        whole += 1
        yield _of_rows(rows)
    if whole != len(parts):
        raise GenomeError(f"Ray Data gave {whole} of {len(parts)} batches back whole", "build with `engine: processes`")


def _windows(parts: Sequence[Part], most: int, size: Callable[[Part], int]) -> Iterator[Sequence[Part]]:
    """`parts` in order, some at a time: at most so many together, of what `size` counts, or one."""
    begin = together = 0
    for number, part in enumerate(parts):
        together += size(part)
        if together > most and number > begin:
            yield parts[begin:number]
            begin, together = number, size(part)
    if begin < len(parts):
        yield parts[begin:]


def _characters(part: Part) -> int:
    return sum(document.characters for document in part)


# what tasks are told ------------------------------------------------------------------------------------------------


def _placed(parts: Sequence[Part]) -> int:
    """How many of `parts`, from the first on, lie in a file that has a name; what was written there can be seen by others."""
    placed = [all(isinstance(document, StoredDocument) and document.piece for document in part) for part in parts]
    for document in parts[0]:
        if isinstance(document, StoredDocument):
            document.settle()
    return placed.index(False) if False in placed else len(placed)


def _pieces(number: int, documents: Part) -> pa.Table:
    rows = [
        (number, document.path, document.encoding, document.doc_id, *document.piece)
        for document in documents
        if isinstance(document, StoredDocument) and document.piece is not None
    ]
    return pa.table([list(column) for column in zip(*rows, strict=True)], PIECES)


def _texts(number: int, documents: Part) -> pa.Table:
    columns = [[number] * len(documents), *([getattr(document, name) for document in documents] for name in TEXTS.names[1:])]
    return pa.table(columns, TEXTS)


# what tasks do, in processes of Ray's -------------------------------------------------------------------------------


def scan_texts(texts: pa.Table) -> pa.Table:
    """The marks and shingles of a table of texts."""
    return _each_batch(texts, lambda rows: [_document(row, row["text"]) for row in rows])


def scan_pieces(pieces: pa.Table) -> pa.Table:
    """The marks and shingles of texts that lie where a table says; of a batch that does not, no marks."""
    return _each_batch(pieces, _read)


def _each_batch(table: pa.Table, read: Callable[[Sequence[dict[str, Any]]], list[Document] | None]) -> pa.Table:
    found = [FOUND.empty_table()]
    for number, rows in _groups(table):
        documents = read(rows.to_pylist())
        if documents is None:
            found.append(pa.table([[number] * len(rows), [None] * len(rows), [[]] * len(rows)], FOUND))
            continue
        scanned = scan_batch(documents)
        told = [canonical_json(marks).decode() for marks in scanned.marks]
        shingles = pa.LargeListArray.from_arrays(np.r_[0, np.cumsum(scanned.sizes)].astype(np.int64), scanned.hashes)
        found.append(pa.table([[number] * len(told), told, shingles], FOUND))
    return pa.concat_tables(found)


def _read(rows: Sequence[dict[str, Any]]) -> list[Document] | None:
    """The documents of a batch, None where one of them is not where it should be."""
    documents = []
    try:
        for file, pieces in groupby(rows, lambda row: row["file"]):
            with open(file, "rb", buffering=0) as stream:
                for row in pieces:
                    content = os.pread(stream.fileno(), row["size"], row["begin"])
                    if hashlib.sha256(content).hexdigest() != row["doc_id"]:
                        return None
                    documents.append(_document(row, content.decode(row["encoding"])))
    except OSError:
        return None
    return documents


def _document(row: dict[str, Any], text: str) -> Document:
    return Document("", row["path"], "", "", text, "", row["encoding"])


# what comes back ----------------------------------------------------------------------------------------------------


def _of_rows(rows: pa.Table) -> Scanned | None:
    """What was found in a batch, None where its texts were not reached."""
    if rows["marks"].null_count:
        return None
    shingles = rows["shingles"].combine_chunks()
    marks = [json.loads(told) for told in rows["marks"].to_pylist()]
    return Scanned(marks, shingles.flatten().to_numpy(), np.diff(shingles.offsets.to_numpy()))


def _groups(table: pa.Table) -> Iterator[tuple[int, Any]]:
    """Runs of rows of one batch: Ray may lay blocks together, but does not cut or stir them."""
    numbers = table["batch"].to_numpy()
    begins = np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]]) if len(numbers) else numbers
    for begin, end in zip(begins, [*begins[1:], len(numbers)], strict=True):
        yield int(numbers[begin]), table.slice(begin, end - begin)
