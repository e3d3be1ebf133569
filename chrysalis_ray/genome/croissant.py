"""Metadata of a genome in Croissant (MLCommons, version 1.1), which data set registries and loaders read."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chrysalis_ray import __version__
from chrysalis_ray.core.records import sha256_of_file
from chrysalis_ray.genome.build import Genome
from chrysalis_ray.genome.documents import SPLITS
from chrysalis_ray.genome.licences import joined
from chrysalis_ray.genome.sealing import shards_of

VERSION = "http://mlcommons.org/croissant/1.1"
# Appendix 1 of the specification, and what its reference loader (mlcroissant 1.1) wants beside it.
_CROISSANT_TERMS = (
    "annotation", "arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "excludes", "extract", "field",
    "fileObject", "fileProperty", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5",
    "parentField", "path", "readLines", "recordSet", "references", "regex", "repeated", "replace", "samplingRate", "sdVersion",
    "separator", "source", "subField", "transform", "unArchive", "value",
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
    "name": {"@container": "@language"},
    "description": {"@container": "@language"},
    **{term: f"cr:{term}" for term in _CROISSANT_TERMS},
}
PARQUET = "application/x-parquet"  # as the reference loader and the Hugging Face hub call it
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
    files += [_file(name, genome.folder / name, PARQUET, beside) for name in shards]
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
        "creator": {
            "@type": "sc:Organization",
            "name": f"sealed by chrysalis_ray {__version__}; its sources name their authors",
        },
        "citeAs": f"genome {genome.genome_id}, Merkle root {content['merkle_root']}",
        "license": joined(row["licence"] for row in content["documents"] if row["split"] in SPLITS),
        "distribution": [*files, _shard_set(_seen_from(beside, genome.folder / name) for name in shards)],
        "recordSet": [_records()],
    }


def _file(name: str, path: Path, kind: str, beside: Path) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": _seen_from(beside, path),
        "contentSize": f"{path.stat().st_size} B",
        "encodingFormat": kind,
        "sha256": sha256_of_file(path),
    }


def _seen_from(folder: Path, path: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _shard_set(paths: Iterable[str]) -> dict[str, Any]:
    """The shards by their names, in no container: so the reference loader finds them below the folder of the metadata."""
    return {
        "@type": "cr:FileSet",
        "@id": "shards",
        "name": "shards",
        "encodingFormat": PARQUET,
        "includes": [glob.escape(path) for path in paths],
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
