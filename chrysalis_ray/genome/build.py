"""Build, open and verify a genome: an immutable folder that says by its id what is in it.

    manifest.json                  written last; without it there is no genome
    shards/<domain>-<part>.parquet    a document per row, by doc_id; zstd. The part is a split, or ``excluded``; a large one
                                   lies in several, each with what begins alike (``-<number>-of-<count>``)
    state.json, readings/, scan/   caches: how the sources looked and what was read there, so that an unchanged source is not
                                   read again; what was found in the documents, so that an unchanged one is not looked through
    forgotten.jsonl                where it was made to forget: its tombstones (`tombstones.py`), which a rebuild honours

`manifest.json` holds ``genome_id``, ``created`` (time), ``shards`` (name -> sha256, bytes, rows) and ``content``: format,
recipe and its sha256, what each source was pinned to, Merkle root, totals per domain and part, what was skipped and why,
licences and marks per domain, and one line per document (doc_id = sha256, domain, path, part, bytes, licence; encoding,
evidence and marks where they are not the ordinary). ``genome_id`` is the sha256 of the canonical JSON of ``content``: neither
the time nor the compressor's version changes it, and no epigenome can.

Documents that bear a mark of ``genome.exclude`` are sealed like all others, as part ``excluded``: no split holds them, so
nothing trains on them or is judged by them. Format 1 (without marks and pinned sources) and format 2 (likeness found by other
hashes) can still be opened and verified.
"""

from __future__ import annotations

import gc
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

from chrysalis_ray.config.experiment import GenomeSpec, Source
from chrysalis_ray.config.genome import ALWAYS_EXCLUDED, GenomeBuild
from chrysalis_ray.config.histories import history_domains
from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.core.records import read_json, sha256_of, write_bytes
from chrysalis_ray.core.written_paths import written_path
from chrysalis_ray.genome.denial import denier, joined_marks, kept_denials
from chrysalis_ray.genome.documents import EXCLUDED, PARTS, SPLITS, Document
from chrysalis_ray.genome.levels import DOCUMENTS, Checked, checked_levels
from chrysalis_ray.genome.licences import joined
from chrysalis_ray.genome.recipe import FORMAT, recipe_of, recipe_of_source
from chrysalis_ray.genome.scan_cache import ScanCache
from chrysalis_ray.genome.scanning import scan
from chrysalis_ray.genome.sealing import (
    DRAFT,
    REBUILD,
    check_shards,
    name_of_record,
    place_shards,
    read_shard,
    root_of_documents,
    shard_of,
    shards_of,
    write_shard,
)
from chrysalis_ray.genome.sources.fingerprints import fingerprints, remember, unchanged
from chrysalis_ray.genome.sources.readings import Readings
from chrysalis_ray.genome.sources.sources import read_source
from chrysalis_ray.genome.splits import assign_splits, kinship, near_duplicate_marks
from chrysalis_ray.genome.text_store import TextStore
from chrysalis_ray.genome.tombstones import Tombstone, check_left, standing, write_tombstones

READABLE = (1, 2, 3)

Reader = Callable[[Source, Path, Counter[str], dict[str, Any]], Iterable[Document]]
Found = tuple[list[Document], list[dict[str, Any]]]  # documents, each content once, and a line about every source


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
        """Documents of one domain and split (or the part ``excluded``), by doc_id. Raises GenomeError for a domain or split
        that does not exist."""
        if domain not in self.manifest["content"]["totals"] or split not in PARTS:
            raise GenomeError(
                f"the genome has no {split!r} split of a domain {domain!r}",
                f"domains: {', '.join(self.domains)}; splits: {', '.join(PARTS)}",
            )
        if split not in self.manifest["content"]["totals"][domain]:
            return iter(())
        names = shards_of(domain, split, self.manifest["shards"])
        return chain.from_iterable(read_shard(self.folder / name, domain) for name in names)

    def licences(self) -> dict[str, str]:
        """domain -> SPDX expression of its documents' licences."""
        return dict(self.manifest["content"]["licences"])

    def totals(self) -> dict[str, dict[str, dict[str, int]]]:
        """domain -> split -> {documents, bytes}."""
        return self.manifest["content"]["totals"]


def build_genome(spec: GenomeSpec, folder: Path, relative_to: Path, processes: int | None = None) -> Genome:
    """Seal the sources of `spec` into `folder`; paths in `spec` are relative to `relative_to`, the experiment's folder.

    A genome of the same recipe that is already there is checked and returned; one of another recipe is replaced. Neither the
    order of the sources nor how it is built (`GenomeSpec.build`, or so many `processes`) matters. Raises GenomeError when a
    source is missing, malformed or empty, or too small to be split.
    """
    recipe = recipe_of(spec)
    if (folder / "manifest.json").is_file():
        existing = read_manifest(folder)["content"]
        forgotten = standing(folder, existing, forget_list(spec, relative_to))
        if existing["recipe_sha256"] == sha256_of(recipe) and existing.get("forgotten", []) == forgotten:
            return open_genome(folder)
    found = _collect(spec, relative_to, _texts(spec, folder).keeping(read_source))
    return _seal(spec, folder, relative_to, found, _how(spec, processes))


def refresh_genome(spec: GenomeSpec, folder: Path, relative_to: Path, processes: int | None = None) -> Genome:
    """`build_genome`, but sources that changed since are read again. Where none did, each of their files costs a stat and
    nothing is written; otherwise only sources that changed are read, only documents that changed are looked through, and only
    shards that hold a changed document are written."""
    seen = fingerprints(spec, relative_to)
    if (folder / "manifest.json").is_file():
        existing = read_manifest(folder)
        same_recipe = existing["content"]["recipe_sha256"] == sha256_of(recipe_of(spec))
        if same_recipe and unchanged(folder, existing["genome_id"], seen):
            return Genome(folder, existing["genome_id"], existing)
    readings = Readings(folder, _manifest_before(folder).get("shards", {}), seen, _texts(spec, folder).keep)
    found = _collect(spec, relative_to, readings.read)
    genome = _seal(spec, folder, relative_to, found, _how(spec, processes), ScanCache(folder / "scan"))
    readings.keep()
    remember(folder, genome.genome_id, seen)
    return genome


def _how(spec: GenomeSpec, processes: int | None) -> GenomeBuild:
    return spec.build if processes is None else GenomeBuild(processes=processes)


def _texts(spec: GenomeSpec, folder: Path) -> TextStore:
    return TextStore(folder, shared=spec.build.engine == "ray")


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector of cycles: sealing makes hundreds of thousands of records that all stay and no cycles, and the
    collector would walk over all of them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def _seal(
    spec: GenomeSpec, folder: Path, relative_to: Path, found: Found, how: GenomeBuild, cache: ScanCache | None = None
) -> Genome:
    """Write the genome of what was `found` in its sources, its manifest last. Shards that would come out the same stay as they
    are, and a genome that is there stands until all of the new one is on disk."""
    before = _manifest_before(folder)
    tombstones = standing(folder, before.get("content", {}), forget_list(spec, relative_to))
    read, sources = found
    documents, parts = _divide(read, spec, how, cache, folder)
    content = content_of(recipe_of(spec), documents, parts, sources, tombstones)
    return write_genome(folder, content, documents, before.get("shards", {}))


def write_genome(
    folder: Path, content: Mapping[str, Any], documents: Iterable[Document], shards_before: Mapping[str, Any]
) -> Genome:
    """Write the documents that `content` lists, their shards, and the manifest last."""
    parts = {row["doc_id"]: row["split"] for row in content["documents"]}
    sizes = {(domain, part): told["bytes"] for domain, of in content["totals"].items() for part, told in of.items()}
    by_shard: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        if document.doc_id in parts:  # else it was forgotten
            place = (document.domain, parts[document.doc_id])
            by_shard[shard_of(*place, document.doc_id, sizes[place])].append(document)
    for left_over in (folder / "shards").glob(f"*{DRAFT}"):  # by a build that was killed
        left_over.unlink()
    shards = {name: write_shard(folder / name, of_it, shards_before.get(name)) for name, of_it in sorted(by_shard.items())}
    write_tombstones(folder, content.get("forgotten", ()))
    (folder / "manifest.json").unlink(missing_ok=True)  # from here to the end, a moment, there is no genome
    place_shards(folder, shards)
    genome_id = sha256_of(content)
    manifest = {"genome_id": genome_id, "created": datetime.now(UTC).isoformat(), "shards": shards, "content": content}
    write_bytes(folder / "manifest.json", _manifest_text(manifest).encode())
    return Genome(folder, genome_id, manifest)


def _manifest_before(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`; empty where there is none, or none that can be believed."""
    try:
        return read_manifest(folder)
    except GenomeError:
        return {}


def forget_list(spec: GenomeSpec, relative_to: Path) -> Path | None:
    """Where the experiment's own list of tombstones lies, if it names one."""
    return None if spec.forget is None else relative_to / written_path(spec.forget)


def open_genome(folder: Path) -> Genome:
    """The genome sealed in `folder`, its manifest and shard hashes checked.

    Raises GenomeError when there is none, GenomeCorrupt when the manifest or a shard changed since it was sealed.
    """
    manifest = read_manifest(folder)
    check_shards(folder, manifest["shards"])
    return Genome(folder, manifest["genome_id"], manifest)


def verify_genome(folder: Path, deepest: int = DOCUMENTS, tell: Callable[[Checked], None] = lambda checked: None) -> Genome:
    """`open_genome`, and every document's own hash and the Merkle root computed again from the text; or as far as the level
    `deepest`, each told as it is found to hold. Raises GenomeCorrupt naming the shard or document that differs.
    """
    begun = perf_counter()
    manifest = read_manifest(folder)
    for checked in checked_levels(folder, manifest, begun, deepest):
        tell(checked)
    return Genome(folder, manifest["genome_id"], manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, its id checked against its content."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise GenomeError(
            f"no genome in {folder}: there is no manifest.json", "build it with `chrysalis genome build` or `chrysalis run`"
        )
    try:
        manifest = read_json(path)
        version = manifest["content"]["format"]
        if version not in READABLE:
            raise GenomeError(
                f"{path} is of format {version}; this version reads {', '.join(map(str, READABLE))}",
                "read it with the version that wrote it, or build it again from its sources",
            )
        intact = sha256_of(manifest["content"]) == manifest["genome_id"]
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


def _collect(spec: GenomeSpec, relative_to: Path, read: Reader) -> Found:
    """All documents by (domain, path, doc_id), each content once, and a line about every source."""
    denied = denier(spec.use_denied, relative_to)
    found: list[Document] = []
    lines = []
    for source in spec.sources:
        skipped: Counter[str] = Counter()
        facts: dict[str, Any] = {}
        documents = list(denied(read(source, relative_to, skipped, facts)))
        found += documents
        left_out = {reason: count for reason, count in sorted(skipped.items()) if count}
        told = {"recipe": recipe_of_source(source), **facts, "documents": len(documents), "skipped": left_out}
        lines.append(told)
    old = set(history_domains(spec))  # what a history shares with another source belongs to that
    found.sort(
        key=lambda document: (
            document.domain in old, document.domain, document.path, document.doc_id, document.source_key, document.licence,
            document.evidence, sorted(document.marks.items()),
        )
    )  # fmt: skip
    unique: dict[str, Document] = {}
    for document in found:
        unique[document.doc_id] = kept_denials(unique.get(document.doc_id, document), document)
    lost = sorted({document.domain for document in found} - {document.domain for document in unique.values()})
    if lost:
        raise GenomeError(
            f"domain {lost[0]!r} holds nothing that no other domain holds already",
            "remove it, or add other text",
        )
    return list(unique.values()), sorted(lines, key=sha256_of)


def _divide(
    documents: Sequence[Document], spec: GenomeSpec, how: GenomeBuild, cache: ScanCache | None, folder: Path
) -> tuple[list[Document], dict[str, str]]:
    """`documents` with their marks, and doc_id -> part. A document stays out of every split for a mark of ``exclude``
    or ``use_denied``."""
    scanned, sketches = scan(documents, how, cache, folder)
    marked = joined_marks(documents, scanned)
    barred = {*spec.exclude, *ALWAYS_EXCLUDED}
    kin = kinship(marked, sketches)
    for index, original in near_duplicate_marks(marked, kin.near_duplicates, barred).items():
        marked[index] = marked[index].changed(marks={**marked[index].marks, "near_duplicate": original})
    heard = [document for document in marked if not set(document.marks) & barred]
    silent = sorted({document.domain for document in marked} - {document.domain for document in heard})
    if silent:
        counts = Counter(mark for document in marked if document.domain == silent[0] for mark in document.marks)
        raise GenomeError(
            f"domain {silent[0]!r} has no document that `genome.exclude` leaves in: "
            + ", ".join(f"{count} {mark}" for mark, count in sorted(counts.items()) if mark in barred),
            "take a mark out of `exclude`, or give the domain other text",
        )
    splits = assign_splits(heard, kin.groups, spec.split.select, spec.split.report)
    parts = {document.doc_id: EXCLUDED for document in marked}
    parts |= {document.doc_id: splits[kin.groups[document.source_key]] for document in heard}
    return marked, parts


def content_of(
    recipe: Mapping[str, Any],
    documents: Sequence[Document],
    parts: Mapping[str, str],
    sources: Sequence[Mapping[str, Any]],
    tombstones: Sequence[Tombstone] = (),
) -> dict[str, Any]:
    """The hashed part of the manifest: of `documents` those without a tombstone."""
    gone = {stone["doc_id"] for stone in tombstones}
    rows = [row_of(document, parts[document.doc_id]) for document in documents if document.doc_id not in gone]
    if gone:
        check_left(rows, tombstones)
    totals: dict[str, dict[str, dict[str, int]]] = {}
    licences: dict[str, set[str]] = defaultdict(set)
    marks: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        of_domain = totals.setdefault(row["domain"], {split: {"documents": 0, "bytes": 0} for split in SPLITS})
        of_part = of_domain.setdefault(row["split"], {"documents": 0, "bytes": 0})
        of_part["documents"] += 1
        of_part["bytes"] += row["bytes"]
        licences[row["domain"]].add(row["licence"])
        marks[row["domain"]].update(tuple(row.get("marks", ())))
    skipped = sum((Counter(source["skipped"]) for source in sources), Counter())
    skipped["duplicate"] = sum(source["documents"] for source in sources) - len(documents)
    content = {
        "format": FORMAT,
        "recipe": recipe,
        "recipe_sha256": sha256_of(recipe),
        "sources": list(sources),
        "merkle_root": root_of_documents(rows),
        "totals": totals,
        "licences": {domain: joined(names) for domain, names in licences.items()},
        "marks": {domain: dict(sorted(counts.items())) for domain, counts in marks.items()},
        "skipped": {reason: count for reason, count in sorted(skipped.items()) if count},
        "documents": rows,
    }
    return {**content, "forgotten": list(tombstones)} if tombstones else content


def row_of(document: Document, part: str) -> dict[str, Any]:
    """A document's line of the manifest."""
    row: dict[str, Any] = {
        "doc_id": document.doc_id,
        "domain": document.domain,
        "path": document.path,
        "split": part,
        "bytes": document.size,
        "licence": document.licence,
    }
    if document.evidence != "declared":
        row["evidence"] = document.evidence
    if document.encoding != "utf-8":
        row["encoding"] = document.encoding
    if document.marks:
        row["marks"] = dict(document.marks)
    return row | name_of_record(document)


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    """JSON for people: indented, but one line per document."""
    rows = manifest["content"]["documents"]
    mark = "documents go here"
    shell = {**manifest, "content": {**manifest["content"], "documents": mark}}
    text = json.dumps(shell, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    of_row = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode
    lines = ",\n".join("      " + of_row(row) for row in rows)
    return text.replace(f'"documents": "{mark}"', f'"documents": [\n{lines}\n    ]', 1) + "\n"
