"""What scanning found in documents that were there before: their marks and kept shingles. A cache, never evidence.

    scan/<rules>-<sha256>.arrow    a segment: key, marks (JSON) and shingles of some documents, in Arrow's file format

A key stands for everything that a scan depends on: the document's bytes, how they are read, the name of its file; `rules`, in
the segment's name, for the versions of marks and sketches. A segment is named by the hash of its bytes and is not believed when
it has another. What is new goes into a segment of its own, so that one changed file does not write all of them again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from chrysalis_ray.core.records import canonical_json, write_bytes
from chrysalis_ray.genome import marks, similarity
from chrysalis_ray.genome.columns import digests, strings
from chrysalis_ray.genome.documents import Document

RULES = f"{marks.VERSION}.{similarity.VERSION}"
MOST_SEGMENTS = 16
SCHEMA = pa.schema([("key", pa.binary(32)), ("marks", pa.string()), ("shingles", pa.large_list(pa.uint64()))])


class Seen(NamedTuple):
    """What was found in one document."""

    marks: dict[str, str]
    hashes: similarity.Hashes


def key_of(document: Document) -> bytes:
    """What the scan of `document` depends on."""
    told = f"{document.doc_id}\0{document.encoding}\0{document.path.rpartition('/')[2]}"
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).digest()


class ScanCache:
    """The segments in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[bytes, Seen] = {}
        self._segment_of: dict[bytes, Path] = {}
        for path in sorted(folder.glob(f"{RULES}-*.arrow")):
            for key, seen in _read(path):
                self._seen[key], self._segment_of[key] = seen, path

    def get(self, key: bytes) -> Seen | None:
        """What is known of a document, None where nothing is."""
        return self._seen.get(key)

    def keep(self, seen: Mapping[bytes, Seen]) -> None:
        """Hold `seen` and nothing else. Segments stay as they are while at least half of what is in them does."""
        segments: dict[Path, tuple[list[bytes], list[bytes]]] = {}
        for key, path in self._segment_of.items():
            segments.setdefault(path, ([], []))[key not in seen].append(key)
        kept = {path for path, (live, dead) in segments.items() if len(live) >= len(dead)}
        if len(kept) >= MOST_SEGMENTS:
            kept = set()
        fresh = [key for key in seen if self._segment_of.get(key) not in kept]
        if fresh:
            kept.add(_write(self._folder, fresh, [seen[key] for key in fresh]))
        for path in self._folder.glob("*") if self._folder.is_dir() else ():
            if path not in kept:
                path.unlink()


def _write(folder: Path, keys: Sequence[bytes], seen: Sequence[Seen]) -> Path:
    offsets = np.r_[0, np.cumsum([len(each.hashes) for each in seen])].astype(np.int64)
    shingles = pa.LargeListArray.from_arrays(offsets, np.concatenate([each.hashes for each in seen]))
    told = strings([canonical_json(each.marks).decode() if each.marks else "{}" for each in seen])
    table = pa.table([digests(keys, 32), told, shingles], SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)
    content = sink.getvalue()
    path = folder / f"{RULES}-{hashlib.sha256(content).hexdigest()}.arrow"
    write_bytes(path, content)
    return path


def _read(path: Path) -> Iterator[tuple[bytes, Seen]]:
    """Keys of a segment and what was found; nothing where it is not what its name says."""
    try:
        content = path.read_bytes()
    except OSError:
        return
    if path.name != f"{RULES}-{hashlib.sha256(content).hexdigest()}.arrow":
        return
    with pa.ipc.open_file(pa.BufferReader(content)) as reader:
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    for batch in batches:
        keys, told, shingles = batch.columns
        hashes, offsets = shingles.values.to_numpy(), shingles.offsets.to_numpy()
        for row, (key, found) in enumerate(zip(keys.to_pylist(), told.to_pylist(), strict=True)):
            yield key, Seen(json.loads(found), hashes[offsets[row] : offsets[row + 1]])
