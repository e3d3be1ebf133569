"""Metadata of a genome in Croissant (MLCommons, version 1.0), which data set registries and loaders read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from chrysalis_ray.core.records import sha256_of_file
from chrysalis_ray.genome.build import Genome
from chrysalis_ray.genome.documents import SPLITS
from chrysalis_ray.genome.licences import joined
from chrysalis_ray.genome.sealing import shards_of

VERSION = "http://mlcommons.org/croissant/1.0"
_CROISSANT_TERMS = (
    "citeAs", "column", "extract", "field", "fileProperty", "fileObject", "fileSet", "format", "includes", "isLiveDataset",
    "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex", "repeated", "replace", "separator",
    "source", "subField", "transform",
)  # fmt: skip
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _CROISSANT_TERMS},
}
COLUMNS = {
    "doc_id": "sha256 of the document's bytes",
    "path": "where the document was found",
    "licence": "SPDX expression of the document's licence",
    "text": "the document",
}


def croissant(genome: Genome, text: Path, beside: Path) -> dict[str, Any]:
    """The JSON-LD of `genome` with its framed `text` and its shards, their paths as seen from the folder `beside`. Documents
    that ``exclude`` keeps away are in no file that is named."""
    content = genome.manifest["content"]
    shards = [
        name for domain in genome.domains for split in SPLITS for name in shards_of(domain, split, genome.manifest["shards"])
    ]
    files = [_file("genome.txt", text, "text/plain", beside)]
    files += [_file(name, genome.folder / name, "application/vnd.apache.parquet", beside) for name in shards]
    heard = [split for splits in content["totals"].values() for part, split in splits.items() if part in SPLITS]
    documents, size = sum(part["documents"] for part in heard), sum(part["bytes"] for part in heard)
    told = f"{documents} documents, {size} bytes, in the domains {', '.join(genome.domains)}; sealed as {genome.genome_id}."
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": VERSION,
        "name": f"genome-{genome.genome_id[:12]}",
        "description": told,
        "url": f"urn:sha256:{genome.genome_id}",
        "version": "1.0.0",
        "datePublished": genome.manifest["created"],
        "license": joined(row["licence"] for row in content["documents"] if row["split"] in SPLITS),
        "distribution": [*files, _shard_set(shards)],
        "recordSet": [_records()],
    }


def _file(name: str, path: Path, kind: str, beside: Path) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": Path(os.path.relpath(path, beside)).as_posix(),
        "contentSize": f"{path.stat().st_size} B",
        "encodingFormat": kind,
        "sha256": sha256_of_file(path),
    }


def _shard_set(shards: list[str]) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": "shards",
        "name": "shards",
        "containedIn": [{"@id": name} for name in shards],
        "encodingFormat": "application/vnd.apache.parquet",
        "includes": "shards/*.parquet",
    }


def _records() -> dict[str, Any]:
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"documents/{column}",
            "name": column,
            "description": description,
            "dataType": "sc:Text",
            "source": {"fileSet": {"@id": "shards"}, "extract": {"column": column}},
        }
        for column, description in COLUMNS.items()
    ]
    key = {"@id": "documents/doc_id"}
    return {"@type": "cr:RecordSet", "@id": "documents", "name": "documents", "key": key, "field": fields}
