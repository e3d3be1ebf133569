"""What was read from each source the last time: one that still looks the same is not read again. A cache, never evidence.

    readings/<what>-<sha256>.parquet    a source: everything of its documents but their texts, and what was skipped

`what` stands for the source as written, how it looked (`fingerprints`) and the version of this program; the hash is that of the
file, which is not believed when it has another. The texts are in the shards of the genome that was made from them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from chrysalis_ray import __version__
from chrysalis_ray.config.experiment import Source
from chrysalis_ray.core.errors import GenomeCorrupt
from chrysalis_ray.core.records import canonical_json, sha256_of, write_bytes
from chrysalis_ray.genome.columns import strings
from chrysalis_ray.genome.documents import Document
from chrysalis_ray.genome.sealing import check_shards, read_shard
from chrysalis_ray.genome.sources.sources import read_source

VERSION = 2  # of how sources are read: raise it when the same bytes give other documents
FIELDS = ("doc_id", "path", "source_key", "domain", "licence", "encoding", "evidence")
SCHEMA = pa.schema([(name, pa.string()) for name in FIELDS])
TOLD = b"told"  # key of the metadata: skipped, facts


class Readings:
    """The sources of the genome in `folder`, whose `shards` are those of its manifest, as they were read. `looks` tells how
    each source looks now, None where that cannot be said without reading it. Every text read goes through `keep_text`."""

    def __init__(
        self, folder: Path, shards: Mapping[str, Any], looks: Sequence[str | None], keep_text: Callable[[Document], Document]
    ) -> None:
        self._folder, self._shards, self._keep_text = folder, shards, keep_text
        self._kept: set[Path] = set()
        self._whats = iter([None if look is None else sha256_of([look, __version__, VERSION]) for look in looks])
        self._loaded: dict[str, Document] | None = None
        self._fresh: dict[str, tuple[list[Document], dict[str, Any]]] = {}

    def read(self, source: Source, relative_to: Path, skipped: Counter[str], facts: dict[str, Any]) -> list[Document]:
        """`read_source`, or what it gave the last time; to be called for every source, in the order of `looks`."""
        what = next(self._whats)
        if what is None:
            return [self._keep_text(document) for document in read_source(source, relative_to, skipped, facts)]
        for path in sorted((self._folder / "readings").glob(f"{what}-*.parquet")):
            recalled = self._recalled(path, what, skipped, facts)
            if recalled is not None:
                self._kept.add(path)
                return recalled
        documents = [self._keep_text(document) for document in read_source(source, relative_to, skipped, facts)]
        told = {"skipped": {key: count for key, count in skipped.items() if count}, "facts": dict(facts)}
        more = any(document.marks or document.record for document in documents)  # than FIELDS hold: so it is read again
        if not more:
            self._fresh[what] = (documents, told)
        return documents

    def keep(self) -> None:
        """Hold what was read now, and nothing else. To be called when the genome that was made of it is sealed."""
        self._kept |= {_write(self._folder / "readings", what, *read) for what, read in self._fresh.items()}
        for path in (self._folder / "readings").glob("*"):
            if path not in self._kept:
                path.unlink()

    def _recalled(self, path: Path, what: str, skipped: Counter[str], facts: dict[str, Any]) -> list[Document] | None:
        """The documents that `path` tells of, None where it or the genome is not what it was."""
        content = path.read_bytes()
        if path.name != f"{what}-{hashlib.sha256(content).hexdigest()}.parquet":
            return None
        table = pq.read_table(pa.BufferReader(content))
        texts = self._texts()
        rows = table.to_pylist()
        if not all(row["doc_id"] in texts for row in rows):
            return None
        told = json.loads(table.schema.metadata[TOLD])
        skipped.update(told["skipped"])
        facts.update(told["facts"])
        return [self._as_read(texts[row["doc_id"]], row) for row in rows]

    def _as_read(self, sealed: Document, row: Mapping[str, str]) -> Document:
        """The sealed document as another source, of which `row` tells, read the same bytes."""
        if row["encoding"] == sealed.encoding:
            return sealed.changed(
                marks={}, record="", **{name: row[name] for name in FIELDS if name not in ("doc_id", "encoding")}
            )
        return self._keep_text(sealed.changed(marks={}, record="", text=sealed.content.decode(row["encoding"]), **row))

    def _texts(self) -> dict[str, Document]:
        """doc_id -> document, for every one of the genome; nothing where a shard is not as it was sealed."""
        if self._loaded is None:
            try:
                check_shards(self._folder, self._shards)
                shards = [read_shard(self._folder / name, "") for name in self._shards]
                self._loaded = {document.doc_id: self._keep_text(document) for shard in shards for document in shard}
            except GenomeCorrupt:
                self._loaded = {}
        return self._loaded


def _write(folder: Path, what: str, documents: Sequence[Document], told: Mapping[str, Any]) -> Path:
    columns = [strings([getattr(document, name) for document in documents]) for name in FIELDS]
    table = pa.table(columns, SCHEMA.with_metadata({TOLD: canonical_json(told)}))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_statistics=False)
    content = sink.getvalue().to_pybytes()
    path = folder / f"{what}-{hashlib.sha256(content).hexdigest()}.parquet"
    write_bytes(path, content)
    return path
