"""What scanning found in documents that were there before: their marks and kept shingles. A cache, never evidence.

    scan/<rules>-<sha256>.arrow    a segment: key, marks (JSON) and shingles of some documents, in Arrow's file format

A key stands for everything that a scan depends on: the document's bytes, how they are read, the name of its file; `rules`, in
the segment's name, for the versions of marks and sketches. A segment is named by the hash of its bytes and is not believed when
it has another. What is new goes into a segment of its own, so that one changed file does not write all of them again. Segments
are written and read a batch of documents at a time: neither costs memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from chrysalis_ray.core.records import canonical_json, sha256_of_file, sync_folder
from chrysalis_ray.genome import marks, similarity
from chrysalis_ray.genome.columns import digests, strings
from chrysalis_ray.genome.documents import Document

RULES = f"{marks.VERSION}.{similarity.VERSION}"
MOST_SEGMENTS = 16
SHINGLES_AT_ONCE, DOCUMENTS_AT_ONCE = 500_000, 4096  # of a segment, written together
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
    """The segments in `folder`; what they hold stays on disk until it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[bytes, tuple[_Columns, int]] = {}
        for path in sorted(folder.glob(f"{RULES}-*.arrow")):
            for columns in _read(path):
                self._places |= {key: (columns, row) for row, key in enumerate(columns.keys.to_pylist())}

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def get(self, key: bytes) -> Seen | None:
        """What is known of a document, None where nothing is."""
        if key not in self._places:
            return None
        columns, row = self._places[key]
        return Seen(json.loads(columns.told[row].as_py()), columns.hashes[columns.offsets[row] : columns.offsets[row + 1]])

    def renewed(self, keys: Sequence[bytes], found: Iterator[Seen]) -> Iterator[Seen]:
        """What is known of each of `keys`, in order; of those of which nothing is, the next of `found`. Afterwards the cache
        holds them and nothing else. Segments stay as they are while at least half of what is in them does."""
        kept = self._lasting(set(keys))
        with _Segment(self._folder) as fresh:
            for key in keys:
                seen = self.get(key)
                if seen is None:
                    seen = next(found)
                if key not in self._places or self._places[key][0].path not in kept:
                    fresh.add(key, seen)
                yield seen
        if fresh.path is not None:
            kept.add(fresh.path)
        for path in self._folder.glob("*") if self._folder.is_dir() else ():
            if path not in kept:
                path.unlink(missing_ok=True)  # another build into this folder may clear it, too

    def _lasting(self, wanted: Set[bytes]) -> set[Path]:
        """Segments that are worth keeping as they are."""
        told: dict[Path, list[int]] = {}
        for key, (columns, _) in self._places.items():
            told.setdefault(columns.path, [0, 0])[key not in wanted] += 1
        kept = {path for path, (live, dead) in told.items() if live >= dead}
        return kept if len(kept) < MOST_SEGMENTS else set()


class _Segment:
    """A segment being written, a batch of documents at a time. `path` is where it lies in the end, None where it is empty or
    was not ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path: Path | None = None
        self._draft: Path | None = None
        self._open = ExitStack()
        self._keys: list[bytes] = []
        self._seen: list[Seen] = []
        self._shingles = 0

    def add(self, key: bytes, seen: Seen) -> None:
        self._keys.append(key)
        self._seen.append(seen)
        self._shingles += len(seen.hashes)
        if self._shingles >= SHINGLES_AT_ONCE or len(self._keys) == DOCUMENTS_AT_ONCE:
            self._write()

    def __enter__(self) -> _Segment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        try:
            if kind is None and self._keys:
                self._write()
            self._open.close()
            if kind is None and self._draft is not None:
                with suppress(FileNotFoundError):  # cleared by another build into this folder; what it held is looked for again
                    self._keep(self._draft)
        except OSError:
            if kind is None:  # else the disk that has no room for the end of a segment had none for the rest of it
                raise
        finally:
            if self._draft is not None:
                self._draft.unlink(missing_ok=True)  # where it has no name of its own by now

    def _keep(self, draft: Path) -> None:
        """Give a draft that is whole its name."""
        path = self._folder / f"{RULES}-{sha256_of_file(draft)}.arrow"
        with draft.open("rb") as stream:
            os.fsync(stream.fileno())
        draft.replace(path)
        sync_folder(self._folder)
        self.path = path

    def _write(self) -> None:
        if self._draft is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, draft = tempfile.mkstemp(dir=self._folder, prefix=".segment.")
            os.close(descriptor)
            self._draft = Path(draft)
            sink = self._open.enter_context(pa.OSFile(draft, "wb"))
            self._writer = self._open.enter_context(pa.ipc.new_file(sink, SCHEMA))
        self._writer.write_table(_table(self._keys, self._seen))
        self._keys, self._seen, self._shingles = [], [], 0


def _table(keys: Sequence[bytes], seen: Sequence[Seen]) -> pa.Table:
    offsets = np.r_[0, np.cumsum([len(each.hashes) for each in seen])].astype(np.int64)
    shingles = pa.LargeListArray.from_arrays(offsets, np.concatenate([each.hashes for each in seen]))
    told = strings([canonical_json(each.marks).decode() if each.marks else "{}" for each in seen])
    return pa.table([digests(keys, 32), told, shingles], SCHEMA)


class _Columns(NamedTuple):
    """A batch of a segment, as it lies on disk."""

    path: Path
    keys: pa.FixedSizeBinaryArray
    told: pa.StringArray
    offsets: NDArray[np.int64]
    hashes: similarity.Hashes


def _read(path: Path) -> Iterator[_Columns]:
    """The batches of a segment; nothing where it is not what its name says."""
    try:
        if path.name != f"{RULES}-{sha256_of_file(path)}.arrow":
            return
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except OSError:
        return
    for number in range(reader.num_record_batches):
        keys, told, shingles = reader.get_batch(number).columns
        yield _Columns(path, keys, told, shingles.offsets.to_numpy(), shingles.values.to_numpy())
