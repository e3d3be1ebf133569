"""Names that Software Heritage gives to content, and so does git (ISO/IEC 18670): a document that an archive of the world's
code holds can be found there by what is in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import chain
from typing import Any

from chrysalis_ray.core.errors import GenomeCorrupt
from chrysalis_ray.genome.build import Genome
from chrysalis_ray.genome.documents import Document
from chrysalis_ray.genome.sealing import REBUILD, read_shard, shard_of, shards_of


def swhid_of(content: bytes) -> str:
    """``swh:1:cnt:`` and the id that git gives a file of these bytes."""
    header = f"blob {len(content)}\0".encode()
    return f"swh:1:cnt:{hashlib.sha1(header + content, usedforsecurity=False).hexdigest()}"


def sealed_document(genome: Genome, row: Mapping[str, Any]) -> Document:
    """The document that `row` of the manifest tells of. Raises GenomeCorrupt where its shard lacks it."""
    domain, part, doc_id = row["domain"], row["split"], row["doc_id"]
    name = shard_of(domain, part, doc_id, genome.totals()[domain][part]["bytes"])
    names = [name] if name in genome.manifest["shards"] else shards_of(domain, part, genome.manifest["shards"])
    for document in chain.from_iterable(read_shard(genome.folder / name, domain) for name in names):
        if document.doc_id == doc_id:
            return document
    raise GenomeCorrupt(f"{genome.folder}: document {doc_id[:16]} is missing", REBUILD)
