"""Forgetting: a new genome without some documents of an old one. The old one stays as it is: a genome never changes.

Nothing but the manifest and the shards is read, so that a genome can forget when its sources are gone. What stays keeps its
split and its marks, and has a new Merkle root and new proofs; what went has a tombstone. The result is the genome, id and all,
that a build from the same sources gives with these tombstones.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.lock import sole_owner
from chrysalis_ray.genome.build import Genome, content_of, write_genome
from chrysalis_ray.genome.documents import PARTS, Document
from chrysalis_ray.genome.sources.git_source import name_of
from chrysalis_ray.genome.text_store import TextStore
from chrysalis_ray.genome.tombstones import Tombstone, checked_date, united

Row = Mapping[str, Any]


def forget(genome: Genome, rows: Sequence[Row], folder: Path, reason: str, day: str) -> Genome:
    """Seal `genome` without the documents of `rows` into `folder`, which must hold no genome yet; `day` is written YYYY-MM-DD.

    Raises GenomeError where there is nothing to forget, no reason, or where what is left could not train and judge any more.
    """
    _check_free(folder)
    if not rows:
        raise GenomeError("no document was named: there is nothing to forget", "name documents, a source or a licence")
    if not reason.strip():
        raise GenomeError("a tombstone needs a reason", 'write --reason "..."')
    checked_date(day, "the day")
    old = genome.manifest["content"]
    stones = [tombstone(row, genome.genome_id, reason, day) for row in rows]
    order = {row["doc_id"]: place for place, row in enumerate(old["documents"])}
    documents = sorted(map(TextStore(folder).keep, all_documents(genome)), key=lambda document: order[document.doc_id])
    parts = {row["doc_id"]: row["split"] for row in old["documents"]}
    tombstones = united(old.get("forgotten", ()), stones)
    content = content_of(old["recipe"], documents, parts, old["sources"], tombstones)
    with sole_owner(folder / ".lock"):  # from here on something is written
        _check_free(folder)
        return write_genome(folder, {**content, "skipped": old["skipped"]}, documents, {})


def _check_free(folder: Path) -> None:
    if (folder / "manifest.json").exists():
        raise GenomeError(f"there is a genome in {folder} already, and a genome never changes", "give --out another folder")


def tombstone(row: Row, genome_id: str, reason: str, day: str) -> Tombstone:
    """What stays of a document."""
    kept = {key: row[key] for key in ("doc_id", "path", "domain", "bytes", "licence")}
    return {**kept, "genome_id": genome_id, "reason": reason, "date": day}


def all_documents(genome: Genome) -> Iterator[Document]:
    """Every document, those that train nothing too."""
    for domain in genome.domains:
        for part in PARTS:
            yield from genome.documents(domain, part)


def near_duplicates(rows: Sequence[Row], doc_ids: Collection[str]) -> list[Row]:
    """Rows, not among `doc_ids`, that stand in one cluster of near-duplicates with a document of `doc_ids`."""
    original = {row["doc_id"]: row.get("marks", {}).get("near_duplicate", row["doc_id"]) for row in rows}
    clusters = {original[doc_id] for doc_id in doc_ids if doc_id in original}
    return [row for row in rows if row["doc_id"] not in doc_ids and original[row["doc_id"]] in clusters]


# choosing -----------------------------------------------------------------------------------------------------------


def of_licence(genome: Genome, pattern: str) -> list[Row]:
    """Documents whose SPDX expression is `pattern`, in which ``*`` stands for anything. Raises GenomeError for none."""
    rows = genome.manifest["content"]["documents"]
    found = [row for row in rows if fnmatchcase(row["licence"], pattern)]
    if not found:
        there = ", ".join(sorted({row["licence"] for row in rows})[:12])
        raise GenomeError(f"no document has the licence {pattern!r}", f"there are {there}; * stands for anything")
    return found


def of_source(genome: Genome, name: str) -> list[Row]:
    """Documents that the source written as `name` (its url, its path, a package's name, or ``python``) gave. What several
    sources hold belongs to the one it stands under. Raises GenomeError for a name that is none, and for a source of nothing."""
    content = genome.manifest["content"]
    named = [recipe for recipe in content["recipe"]["sources"] if name in names_of(recipe)]
    if not named:
        there = sorted({known for recipe in content["recipe"]["sources"] for known in names_of(recipe)})
        raise GenomeError(f"the genome has no source {name!r}", f"its sources: {', '.join(there[:12])}")
    given = {
        document.doc_id
        for document in all_documents(genome)
        if any(_gave(recipe, name, document) or _below(recipe, document, content) for recipe in named)
    }  # fmt: skip
    if not given:
        raise GenomeError(f"no document of the source {name!r} is in the genome", "it was forgotten, or others hold it all")
    return [row for row in content["documents"] if row["doc_id"] in given]


def names_of(recipe: Mapping[str, Any]) -> list[str]:
    """What a person may call a source."""
    if recipe["type"] == "python":
        return ["python"]
    if recipe["type"] == "packages":
        return ["packages"] if recipe["names"] == "all" else ["packages", *recipe["names"]]
    return [recipe.get("url") or recipe["path"]]


def _gave(recipe: Mapping[str, Any], name: str, document: Document) -> bool:
    """Whether a document came from the source: by its domain, and by how its reader names documents."""
    if document.domain not in _domains(recipe):
        return False
    kind = recipe["type"]
    if kind == "python":
        return document.path.startswith("python/")
    if kind == "packages":
        package = "" if name == "packages" else re.sub(r"[-_.]+", "-", name).lower() + "/"
        return document.source_key.startswith(f"packages/{package}")
    if kind in ("jsonl", "records"):
        return document.path.startswith(f"{PurePosixPath(recipe['path'])}#")
    if kind == "dataset":
        return document.path.startswith(f"{recipe['path']}#")
    if kind == "folder":
        return document.source_key.startswith(f"{PurePosixPath(recipe['path'])}/")
    return document.source_key.startswith(f"{recipe.get('url') or recipe['path']}/")


def _below(recipe: Mapping[str, Any], document: Document, content: Mapping[str, Any]) -> bool:
    """Whether a document came from a submodule that was followed from the source."""
    if recipe.get("submodules") != "follow" or document.domain not in _domains(recipe):
        return False
    followed = [module for line in content["sources"] if line["recipe"] == recipe for module in line["followed"]]
    return any(
        document.source_key.startswith(f"{module['url']}/")
        and document.path.startswith(f"{name_of(recipe['url'])}/{module['path']}/")
        for module in followed
    )


def _domains(recipe: Mapping[str, Any]) -> set[str]:
    if recipe["type"] == "python":
        return set(recipe["domains"])
    if recipe["type"] == "history":
        return {f"{recipe['domain']}-{number:03d}" for number in range(len(recipe["snapshots"]))}
    by_glob = {entry["domain"] for entry in recipe.get("domains_by", ())}
    return by_glob or {recipe["domain"]}
