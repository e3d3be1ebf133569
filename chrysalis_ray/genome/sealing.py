"""Sealing: a Merkle root over every document, parquet shards with their hashes, and what checks them again.

The tree is that of RFC 6962, section 2.1 (Certificate Transparency): ``leaf = H(0x00 | path NUL sha256 NUL size)``,
``node = H(0x01 | left | right)``, a list of n > 1 leaves split at the largest power of two below n, ``root of nothing = H()``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from chrysalis_ray.core.errors import GenomeCorrupt
from chrysalis_ray.core.printable import printable
from chrysalis_ray.core.records import canonical_json, sha256_of, sha256_of_file, sync_folder
from chrysalis_ray.genome.columns import strings, texts
from chrysalis_ray.genome.documents import ENCODINGS, PARTS, Document

ROWS_PER_GROUP, BYTES_PER_GROUP = 4096, 8_000_000
SHARD_BYTES = 16_000_000  # of text; a larger part lies in several shards, so that a changed document rewrites little
MOST_SHARDS = 256  # of a part
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

WITH_RECORDS = SCHEMA.append(pa.field("record", pa.string()))  # of shards that hold a document told from records
DICTIONARIES = ["licence", "evidence", "encoding", "marks"]  # of the other columns no two rows are alike

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


def shard_of(domain: str, split: str, doc_id: str, size: int) -> str:
    """The shard that holds a document of a part of `size` bytes. Of several shards each holds the documents whose ids begin
    alike: one after another they hold them in order."""
    count = 1
    while count * SHARD_BYTES < size and count < MOST_SHARDS:
        count *= 2
    number = int(doc_id[:2], 16) * count // 256
    return f"shards/{domain}-{split}.parquet" if count == 1 else f"shards/{domain}-{split}-{number:03}-of-{count:03}.parquet"


def shards_of(domain: str, split: str, names: Iterable[str]) -> list[str]:
    """Which of `names` are shards of that part, in the order of the documents in them."""
    shard = re.compile(rf"shards/{re.escape(domain)}-{split}(-[0-9]{{3}}-of-[0-9]{{3}})?\.parquet")
    return sorted(name for name in names if shard.fullmatch(name))


def write_shard(path: Path, documents: Sequence[Document], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write `documents`, sorted by doc_id, as zstd parquet; equal documents give equal bytes. Returns {sha256, bytes, rows,
    rows_sha256}, the last over everything but the texts, which their doc_ids name. The file is written as a draft, which
    `place_shards` puts in its place. `before` is what was returned for the file that is there: if it holds these documents and
    is still as it was, it is left alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(documents, key=lambda document: document.doc_id)
    cells, records = [_cells(document) for document in ordered], [document.record for document in ordered]
    schema, records = (WITH_RECORDS, records) if any(records) else (SCHEMA, [])
    rows_sha256 = sha256_of([schema.names, *cells, *records])
    same = before is not None and before.get("rows_sha256") == rows_sha256 and path.is_file()
    if before is not None and same and sha256_of_file(path) == before["sha256"]:
        return dict(before)
    draft = path.with_name(path.name + DRAFT)
    with pq.ParquetWriter(draft, schema, compression="zstd", use_dictionary=DICTIONARIES, write_statistics=False) as writer:
        for begin, end in _groups(ordered):
            writer.write_table(_table(cells[begin:end], ordered[begin:end], schema))
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


def _groups(documents: Sequence[Document]) -> Iterator[tuple[int, int]]:
    """(begin, end) of rows that are compressed together: small enough that the memory is used again for the next."""
    begin = size = 0
    for number, document in enumerate(documents, start=1):
        size += document.characters
        if size >= BYTES_PER_GROUP or number - begin == ROWS_PER_GROUP or number == len(documents):
            yield begin, number
            begin, size = number, 0


def _table(cells: Sequence[Sequence[str]], documents: Sequence[Document], schema: pa.Schema) -> pa.Table:
    columns = [strings(column) for column in zip(*cells, strict=True)]
    columns.append(texts([document.text for document in documents]))
    if schema is WITH_RECORDS:
        columns.append(strings([document.record for document in documents]))
    return pa.table(columns, schema=schema)


def _cells(document: Document) -> tuple[str, ...]:
    """Everything of a row but its text and its record, in the order of `SCHEMA`."""
    marks = canonical_json(dict(document.marks)).decode() if document.marks else "{}"
    return (
        document.doc_id, document.path, document.source_key, document.licence, document.evidence, document.encoding, marks,
    )  # fmt: skip


def name_of_record(document: Document) -> dict[str, Any]:
    """What the manifest says of the records that a document was told from: hash and size. Nothing where there are none."""
    content = document.record.encode()
    return {"record": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}} if content else {}


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


def check_documents(folder: Path, rows: Sequence[Mapping[str, Any]], shards: Collection[str]) -> None:
    """Raise GenomeCorrupt naming the first document whose text, place or presence differs from the manifest rows."""
    expected: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        expected.setdefault((row["domain"], row["split"]), {})[row["doc_id"]] = row
    for (domain, split), wanted in sorted(expected.items(), key=lambda item: (item[0][0], PARTS.index(item[0][1]))):
        left = dict(wanted)
        for path, document in _documents(folder, shards_of(domain, split, shards), domain):
            sealed = left.pop(document.doc_id, None)
            actual = hashlib.sha256(document.content).hexdigest()
            told = (actual, document.path, document.size, dict(document.marks), document.licence, name_of_record(document))
            if sealed is None or told != (
                document.doc_id,
                sealed["path"],
                sealed["bytes"],
                sealed.get("marks", {}),
                sealed["licence"],
                {"record": sealed["record"]} if "record" in sealed else {},
            ):
                raise GenomeCorrupt(
                    f"{path}: document {document.doc_id[:16]} ({printable(document.path)}) is not as sealed; "
                    f"its text is {actual[:16]}",
                    REBUILD,
                )
        if left:
            missing = wanted[next(iter(left))]
            raise GenomeCorrupt(
                f"{folder}: document {missing['doc_id'][:16]} ({printable(missing['path'])}) is missing", REBUILD
            )


def _documents(folder: Path, names: Iterable[str], domain: str) -> Iterator[tuple[Path, Document]]:
    """Every document of the shards `names`, and the file it lies in."""
    for name in names:
        for document in read_shard(folder / name, domain):
            yield folder / name, document
