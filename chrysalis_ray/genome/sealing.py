"""Sealing: a Merkle root over every document, parquet shards with their hashes, and what checks them again.

The tree is that of RFC 6962, section 2.1 (Certificate Transparency): ``leaf = H(0x00 | path NUL sha256 NUL size)``,
``node = H(0x01 | left | right)``, a list of n > 1 leaves split at the largest power of two below n, ``root of nothing = H()``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from chrysalis_ray.core.errors import GenomeCorrupt
from chrysalis_ray.core.records import canonical_json, sha256_of, sha256_of_file, sync_folder
from chrysalis_ray.genome.documents import ENCODINGS, PARTS, Document

ROWS_PER_GROUP = 4096
DRAFT = ".draft"
REBUILD = "delete the genome folder and build it again from its sources"
SCHEMA = pa.schema(
    [
        ("doc_id", pa.string()),
        ("path", pa.string()),
        ("source_key", pa.string()),
        ("licence", pa.string()),
        ("evidence", pa.string()),
        ("encoding", pa.string()),
        ("marks", pa.string()),  # canonical JSON
        ("text", pa.large_string()),
    ]
)

# Merkle tree --------------------------------------------------------------------------------------------------------


def leaf_hash(path: str, sha256: str, size: int) -> bytes:
    """Hash of one document's leaf."""
    return hashlib.sha256(b"\0" + f"{path}\0{sha256}\0{size}".encode()).digest()


def merkle_root(leaves: Sequence[bytes]) -> str:
    """Hex root over leaf hashes. Neighbours are joined level by level, an odd last one rises as it is: the same tree as the
    recursive definition, without its recursion."""
    if not leaves:
        return hashlib.sha256(b"").hexdigest()
    level = list(leaves)
    while len(level) > 1:
        joined = [hashlib.sha256(b"\1" + level[at] + level[at + 1]).digest() for at in range(0, len(level) - 1, 2)]
        level = joined + level[len(level) - len(level) % 2 :]
    return level[0].hex()


def root_of_documents(rows: Sequence[Mapping[str, Any]]) -> str:
    """Root over manifest rows (`path`, `doc_id`, `bytes`), leaves in the order of the rows."""
    return merkle_root([leaf_hash(row["path"], row["doc_id"], row["bytes"]) for row in rows])


# shards -------------------------------------------------------------------------------------------------------------


def shard_name(domain: str, split: str) -> str:
    return f"shards/{domain}-{split}.parquet"


def write_shard(path: Path, documents: Sequence[Document], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write `documents`, sorted by doc_id, as zstd parquet; equal documents give equal bytes. Returns {sha256, bytes, rows,
    rows_sha256}, the last over everything but the texts, which their doc_ids name. The file is written as a draft, which
    `place_shards` puts in its place. `before` is what was returned for the file that is there: if it holds these documents and
    is still as it was, it is left alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(documents, key=lambda document: document.doc_id)
    named = [name for name in SCHEMA.names if name != "text"]
    rows_sha256 = sha256_of([SCHEMA.names, *([_cell(document, name) for name in named] for document in ordered)])
    same = before is not None and before.get("rows_sha256") == rows_sha256 and path.is_file()
    if before is not None and same and sha256_of_file(path) == before["sha256"]:
        return dict(before)
    draft = path.with_name(path.name + DRAFT)
    with pq.ParquetWriter(draft, SCHEMA, compression="zstd", write_statistics=False) as writer:
        for start in range(0, len(ordered), ROWS_PER_GROUP):
            part = ordered[start : start + ROWS_PER_GROUP]
            columns = [[_cell(document, name) for document in part] for name in SCHEMA.names]
            writer.write_table(pa.table(columns, schema=SCHEMA))
    with draft.open("rb") as stream:
        os.fsync(stream.fileno())
    size = draft.stat().st_size
    return {"sha256": sha256_of_file(draft), "bytes": size, "rows": len(ordered), "rows_sha256": rows_sha256}


def place_shards(folder: Path, names: Collection[str]) -> None:
    """Put the drafts of `names` in their places and remove every other file from ``shards``."""
    for name in sorted(names):
        draft = folder / f"{name}{DRAFT}"
        if draft.is_file():
            draft.replace(folder / name)
    for stale in (folder / "shards").iterdir():
        if f"shards/{stale.name}" not in names:
            stale.unlink()
    sync_folder(folder / "shards")


def _cell(document: Document, name: str) -> str:
    return canonical_json(dict(document.marks)).decode() if name == "marks" else getattr(document, name)


def read_shard(path: Path, domain: str) -> Iterator[Document]:
    """Documents of a shard in doc_id order; one of format 1 has no marks and UTF-8 only. Raises GenomeCorrupt when it cannot be
    read as one."""
    try:
        with pq.ParquetFile(path) as shard:
            for batch in shard.iter_batches(batch_size=512):
                for row in batch.to_pylist():
                    marks = json.loads(row.pop("marks", "{}"))
                    if row.get("encoding", "utf-8") not in ENCODINGS:
                        raise ValueError(f"unknown encoding {row['encoding']!r}")
                    yield Document(domain=domain, marks=marks, **row)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise GenomeCorrupt(f"{path}: cannot be read as a shard ({error})", REBUILD) from error


def check_shards(folder: Path, shards: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise GenomeCorrupt naming the first shard that is missing or whose bytes changed."""
    for name, expected in sorted(shards.items()):
        path = folder / name
        found = sha256_of_file(path) if path.is_file() else "nothing"
        if found != expected["sha256"]:
            raise GenomeCorrupt(
                f"{path}: sha256 is {found[:16]}, sealed as {expected['sha256'][:16]}",
                REBUILD,
            )


def check_documents(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise GenomeCorrupt naming the first document whose text, place or presence differs from the manifest rows."""
    expected: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        expected.setdefault((row["domain"], row["split"]), {})[row["doc_id"]] = row
    for (domain, split), wanted in sorted(expected.items(), key=lambda item: (item[0][0], PARTS.index(item[0][1]))):
        path = folder / shard_name(domain, split)
        left = dict(wanted)
        for document in read_shard(path, domain):
            sealed = left.pop(document.doc_id, None)
            actual = hashlib.sha256(document.content).hexdigest()
            told = (actual, document.path, document.size, dict(document.marks), document.licence)
            if sealed is None or told != (
                document.doc_id,
                sealed["path"],
                sealed["bytes"],
                sealed.get("marks", {}),
                sealed["licence"],
            ):
                raise GenomeCorrupt(
                    f"{path}: document {document.doc_id[:16]} ({document.path}) is not as sealed; its text is {actual[:16]}",
                    REBUILD,
                )
        if left:
            missing = wanted[next(iter(left))]
            raise GenomeCorrupt(f"{path}: document {missing['doc_id'][:16]} ({missing['path']}) is missing", REBUILD)
