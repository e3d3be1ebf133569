"""Build, open and verify a genome: an immutable folder that says by its id what is in it.

    manifest.json                  written last; without it there is no genome
    shards/<domain>-<split>.parquet   doc_id, path, source_key, licence, text; zstd; rows by doc_id

`manifest.json` holds ``genome_id``, ``created`` (time), ``shards`` (name -> sha256, bytes, rows) and ``content``: format,
recipe and its sha256, Merkle root, totals per domain and split, what was skipped and why, licences per domain, and one line per
document (doc_id = sha256, domain, path, split, bytes, licence). ``genome_id`` is the sha256 of the canonical JSON of
``content``: neither the time nor the compressor's version changes it, and no epigenome can.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chrysalis_ray.config.experiment import GenomeSpec, PythonSource
from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.core.records import read_json, sha256_of, write_bytes
from chrysalis_ray.genome.documents import SPLITS, Document
from chrysalis_ray.genome.python_text import python_identity
from chrysalis_ray.genome.sealing import (
    REBUILD,
    check_documents,
    check_shards,
    read_shard,
    root_of_documents,
    shard_name,
    write_shard,
)
from chrysalis_ray.genome.sources import read_source
from chrysalis_ray.genome.splits import assign_splits, kin_groups

FORMAT = 1


@dataclass(frozen=True)
class Genome:
    """A sealed genome on disk. Nothing in it changes; how strongly it is expressed is the epigenome's matter."""

    folder: Path
    genome_id: str
    manifest: dict[str, Any]

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, sorted."""
        return tuple(sorted(self.manifest["content"]["totals"]))

    @property
    def chats(self) -> frozenset[str]:
        """Domains whose documents are conversations (`chat.py`)."""
        sources = self.manifest["content"]["recipe"]["sources"]
        return frozenset(source["domain"] for source in sources if source.get("messages_key") is not None)

    def documents(self, domain: str, split: str) -> Iterator[Document]:
        """Documents of one domain and split, by doc_id. Raises GenomeError for a domain or split that does not exist."""
        if domain not in self.manifest["content"]["totals"] or split not in SPLITS:
            raise GenomeError(
                f"the genome has no {split!r} split of a domain {domain!r}",
                f"domains: {', '.join(self.domains)}; splits: {', '.join(SPLITS)}",
            )
        return read_shard(self.folder / shard_name(domain, split), domain)

    def licences(self) -> dict[str, str]:
        """domain -> SPDX expression of its documents' licences."""
        return dict(self.manifest["content"]["licences"])

    def totals(self) -> dict[str, dict[str, dict[str, int]]]:
        """domain -> split -> {documents, bytes}."""
        return self.manifest["content"]["totals"]


def build_genome(spec: GenomeSpec, folder: Path, relative_to: Path) -> Genome:
    """Seal the sources of `spec` into `folder`; paths in `spec` are relative to `relative_to`, the experiment's folder.

    A genome of the same recipe that is already there is checked and returned; one of another recipe is replaced. The order of
    the sources does not matter. Raises GenomeError when a source is missing, malformed or empty, or too small to be split.
    """
    recipe = recipe_of(spec)
    if (folder / "manifest.json").is_file():
        existing = read_manifest(folder)
        if existing["content"]["recipe_sha256"] == sha256_of(recipe):
            return open_genome(folder)
    documents, skipped = _collect(spec, relative_to)
    splits = _split_of_documents(documents, spec)
    (folder / "manifest.json").unlink(missing_ok=True)
    if (folder / "shards").is_dir():
        shutil.rmtree(folder / "shards")
    by_shard: dict[tuple[str, str], list[Document]] = defaultdict(list)
    for document in documents:
        by_shard[document.domain, splits[document.doc_id]].append(document)
    shards = {
        shard_name(domain, split): write_shard(folder / shard_name(domain, split), members)
        for (domain, split), members in sorted(by_shard.items())
    }
    content = _content(recipe, documents, splits, skipped)
    genome_id = sha256_of(content)
    manifest = {"genome_id": genome_id, "created": datetime.now(UTC).isoformat(), "shards": shards, "content": content}
    write_bytes(folder / "manifest.json", _manifest_text(manifest).encode())
    return Genome(folder, genome_id, manifest)


def open_genome(folder: Path) -> Genome:
    """The genome sealed in `folder`, its manifest and shard hashes checked.

    Raises GenomeError when there is none, GenomeCorrupt when the manifest or a shard changed since it was sealed.
    """
    manifest = read_manifest(folder)
    check_shards(folder, manifest["shards"])
    return Genome(folder, manifest["genome_id"], manifest)


def verify_genome(folder: Path) -> Genome:
    """`open_genome`, and every document's own hash and the Merkle root computed again from the text.

    Raises GenomeCorrupt naming the shard or document that differs.
    """
    manifest = read_manifest(folder)
    rows = manifest["content"]["documents"]
    if root_of_documents(rows) != manifest["content"]["merkle_root"]:
        raise GenomeCorrupt(f"{folder / 'manifest.json'}: the Merkle root does not follow from the documents", REBUILD)
    check_documents(folder, rows)
    check_shards(folder, manifest["shards"])
    return Genome(folder, manifest["genome_id"], manifest)


def recipe_of(spec: GenomeSpec) -> dict[str, Any]:
    """What the genome is made of, whatever the order of the sources; with the Python version where its text is a source."""
    sources = [source.model_dump(mode="json") for source in spec.sources]
    for source in sources:
        if source["type"] == "python":
            source["domains"] = sorted(source["domains"])
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "sources": sorted(sources, key=sha256_of),
        "split": spec.split.model_dump(mode="json"),
    }
    if any(isinstance(source, PythonSource) for source in spec.sources):
        recipe["python"] = python_identity()
    return recipe


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, its id checked against its content."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise GenomeError(f"no genome in {folder}: there is no manifest.json", "build it with `chrysalis run`")
    try:
        manifest = read_json(path)
        intact = manifest["content"]["format"] == FORMAT and sha256_of(manifest["content"]) == manifest["genome_id"]
        intact = intact and isinstance(manifest["shards"], dict)
    except (ValueError, KeyError, TypeError) as error:
        raise GenomeCorrupt(f"{path}: not a genome manifest ({error})", REBUILD) from error
    if not intact:
        raise GenomeCorrupt(
            f"{path}: its content does not match its genome_id {str(manifest['genome_id'])[:16]}",
            REBUILD,
        )
    return manifest


# parts of a build ---------------------------------------------------------------------------------------------------


def _collect(spec: GenomeSpec, relative_to: Path) -> tuple[list[Document], dict[str, int]]:
    """All documents by (domain, path, doc_id), each text once, and what was left out by reason."""
    skipped: Counter[str] = Counter()
    found = [document for source in spec.sources for document in _with_reasons(source, relative_to, skipped)]
    found.sort(key=lambda document: (document.domain, document.path, document.doc_id))
    unique: dict[str, Document] = {}
    for document in found:
        if document.doc_id in unique:
            skipped["duplicate"] += 1
        else:
            unique[document.doc_id] = document
    lost = sorted({document.domain for document in found} - {document.domain for document in unique.values()})
    if lost:
        raise GenomeError(
            f"domain {lost[0]!r} holds nothing that no other domain holds already",
            "remove it, or add other text",
        )
    return list(unique.values()), dict(sorted(skipped.items()))


def _with_reasons(source: Any, relative_to: Path, skipped: Counter[str]) -> Iterator[Document]:
    """The documents of one source, its own counts added to `skipped`."""
    own: Counter[str] = Counter()
    yield from read_source(source, relative_to, own)
    skipped.update(own)


def _split_of_documents(documents: Sequence[Document], spec: GenomeSpec) -> dict[str, str]:
    groups = kin_groups(documents)
    splits = assign_splits(documents, groups, spec.split.select, spec.split.report)
    return {document.doc_id: splits[groups[document.source_key]] for document in documents}


def _content(
    recipe: Mapping[str, Any], documents: Sequence[Document], splits: Mapping[str, str], skipped: Mapping[str, int]
) -> dict[str, Any]:
    """The hashed part of the manifest."""
    rows: list[dict[str, Any]] = [
        {
            "doc_id": document.doc_id,
            "domain": document.domain,
            "path": document.path,
            "split": splits[document.doc_id],
            "bytes": document.size,
            "licence": document.licence,
        }
        for document in documents
    ]
    totals: dict[str, dict[str, dict[str, int]]] = {}
    licences: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        of_domain = totals.setdefault(row["domain"], {split: {"documents": 0, "bytes": 0} for split in SPLITS})
        of_domain[row["split"]]["documents"] += 1
        of_domain[row["split"]]["bytes"] += row["bytes"]
        licences[row["domain"]].add(row["licence"])
    return {
        "format": FORMAT,
        "recipe": recipe,
        "recipe_sha256": sha256_of(recipe),
        "merkle_root": root_of_documents(rows),
        "totals": totals,
        "licences": {domain: " AND ".join(sorted(names)) for domain, names in licences.items()},
        "skipped": dict(skipped),
        "documents": rows,
    }


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    """JSON for people: indented, but one line per document."""
    rows = manifest["content"]["documents"]
    mark = "documents go here"
    shell = {**manifest, "content": {**manifest["content"], "documents": mark}}
    text = json.dumps(shell, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    lines = ",\n".join("      " + json.dumps(row, sort_keys=True, ensure_ascii=False) for row in rows)
    return text.replace(f'"documents": "{mark}"', f'"documents": [\n{lines}\n    ]', 1) + "\n"
