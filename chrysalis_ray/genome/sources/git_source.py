"""Documents of a git repository at one commit. Every object that is read is hashed again (`git_objects`)."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from chrysalis_ray.config.genome import GitSource, is_object_id, is_remote
from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.core.written_paths import written_path
from chrysalis_ray.genome.documents import Document, decoded, hash_order, make_document, shown_path
from chrysalis_ray.genome.globs import domain_of
from chrysalis_ray.genome.licences import LICENCE_BYTES, Licensing, is_licence_file, licensing
from chrysalis_ray.genome.sources.git_local import obtain
from chrysalis_ray.genome.sources.git_objects import (
    LINK,
    SUBMODULE,
    ObjectReader,
    TreeEntry,
    resolve,
    tree_entries,
    tree_of_commit,
)
from chrysalis_ray.genome.sources.git_submodules import DEEPEST, MOST, REMEDY, Submodule, submodules_of

MAX_DOCUMENT_BYTES = 32 * 2**20
MAX_COPIED_BYTES = 2**34  # of files that stand in a commit again: a second name costs its author nothing


def read_git(source: GitSource, relative_to: Path, skipped: Counter[str], facts: dict[str, Any]) -> Iterator[Document]:
    """One document per text file of the commit, by path; in hash order where the source is capped.

    Counts ``not_text``, ``empty``, ``too_large``, ``symlink`` and ``unmatched`` in `skipped`. Puts into `facts` what was
    pinned: commit, tree, the hash git names things by, how many objects were checked, the submodules (path -> commit), and, for
    a branch or tag, that it was resolved. Submodules that are followed come after, by path, and ``followed`` says the same of
    each. Raises GenomeError where the repository, the commit or a submodule cannot be had, GenomeCorrupt where an object is not
    what its name says.
    """
    with opened(source, relative_to) as (reader, commit):
        documents = read_commit(reader, commit, source, skipped, facts)
        if source.submodules == "follow":
            top = _Place(name_of(source.url), "", (source.url,))
            documents = chain(documents, _follow(reader, commit, source, relative_to, skipped, facts, top))
            if source.max_megabytes is not None:  # whoever cuts them off should cut a fair sample
                documents = iter(sorted(documents, key=lambda document: hash_order(document.path.partition("/")[2])))
        yield from documents


@dataclass(frozen=True)
class _Place:
    """Where a followed repository stands in the one that a person named: below `prefix` (empty, or with a slash at its end) of
    `repository`, in the last of the repositories `above`."""

    repository: str
    prefix: str
    above: tuple[str, ...]


def _follow(
    reader: ObjectReader,
    commit: str,
    source: GitSource,
    relative_to: Path,
    skipped: Counter[str],
    facts: dict[str, Any],
    place: _Place,
) -> Iterator[Document]:
    """Documents of the submodules of `commit`, of `source` at `place`, and of theirs. Appends to ``followed`` of `facts`."""
    entries = list(tree_entries(reader, tree_of_commit(reader, commit)[1]))
    followed: list[dict[str, Any]] = facts.setdefault("followed", [])
    for submodule in submodules_of(reader, entries, source.url):
        path = place.prefix + submodule.path
        _check_depth(submodule, path, place, len(followed))
        inner = source.model_copy(update={"url": submodule.url, "commit": submodule.commit})
        below = _Place(place.repository, f"{path}/", (*place.above, submodule.url))
        told: dict[str, Any] = {"path": path, "url": submodule.url}
        followed.append(told)
        try:
            with opened(inner, relative_to) as (store, pinned):
                yield from read_commit(store, pinned, inner, skipped, told, place.repository, below.prefix)
                yield from _follow(store, pinned, inner, relative_to, skipped, facts, below)
        except GenomeError as error:
            if "submodule " in error.message:  # a deeper one has said where
                raise
            raise type(error)(f"the submodule {path!r} of {place.above[0]}: {error.message}", error.remedy) from error


def _check_depth(submodule: Submodule, path: str, place: _Place, count: int) -> None:
    """Raises GenomeError where following would not end soon."""
    if _bare(submodule.url) in map(_bare, place.above):
        raise GenomeError(f"the submodule {path!r} is the repository that it stands in ({submodule.url})", REMEDY)
    if len(place.above) > DEEPEST or count >= MOST:
        raise GenomeError(f"the submodule {path!r} is more than {DEEPEST} deep, or after {MOST} others", REMEDY)


@contextmanager
def opened(source: GitSource, relative_to: Path) -> Iterator[tuple[ObjectReader, str]]:
    """A reader of a store that holds the wanted commit, and its id (or that of a tag of it). Corruption that is found inside
    names the repository."""
    url = located_url(source.url, relative_to)
    with tempfile.TemporaryDirectory(prefix="chrysalis-git-") as scratch:
        commit = source.commit if is_object_id(source.commit) else resolve(url, source.commit, Path(scratch))
        if not is_object_id(commit):
            raise GenomeError(f"{source.url}: {source.commit!r} resolves to {commit!r}, which is no commit id")
        store = Path(scratch) / "store.git"
        try:
            obtain(url, commit, store)
            with ObjectReader(store) as reader:
                yield reader, commit
        except GenomeCorrupt as error:
            raise GenomeCorrupt(f"{source.url} at {commit[:12]}: {error.message}", error.remedy) from error


def located_url(url: str, relative_to: Path) -> str:
    """What git is given: the address as written, or the absolute path of a repository or bundle of this machine."""
    if is_remote(url):
        return url
    path = (relative_to / written_path(url)).resolve()
    if not path.exists():
        raise GenomeError(f"there is no repository or bundle {path}", "paths are relative to the experiment file")
    return str(path)


def _bare(url: str) -> str:
    """An address without what leaves its meaning as it is."""
    return url.rstrip("/").removesuffix(".git").removeprefix("./")


def name_of(url: str) -> str:
    """What documents of a repository call it."""
    return _bare(url).rpartition("/")[2] or "repository"


def read_commit(
    reader: ObjectReader,
    commit: str,
    source: GitSource,
    skipped: Counter[str],
    facts: dict[str, Any],
    repository: str | None = None,
    prefix: str = "",
) -> Iterator[Document]:
    """The documents of `commit`, read from a store that holds it; those of a submodule stand below `prefix` of `repository`."""
    commit, tree = tree_of_commit(reader, commit)
    entries = list(tree_entries(reader, tree))
    facts |= {"commit": commit, "tree": tree, "object_format": "sha1" if len(commit) == 40 else "sha256"}
    if not is_object_id(source.commit):
        facts["resolved"] = f"{source.commit!r} was this commit when the genome was built"
    submodules = {shown_path(entry.path): entry.name for entry in entries if entry.mode == SUBMODULE}
    if submodules:
        facts["submodules"] = submodules
    wanted = _wanted(entries, source, skipped, prefix)
    licences = _licences(reader, entries, source.licence)
    named = f"{repository or name_of(source.url)}/{prefix}"
    blobs = reader.objects([entry.name for entry, _ in wanted], MAX_DOCUMENT_BYTES)
    seen: set[str] = set()
    copied = 0
    try:
        for (entry, domain), blob in zip(wanted, blobs, strict=True):
            copied += blob.size if blob.name in seen else 0
            seen.add(blob.name)
            if copied > MAX_COPIED_BYTES:
                raise GenomeError(
                    f"commit {commit} holds the same files over and over, more than {MAX_COPIED_BYTES} bytes of copies",
                    "name the files that are wanted in `domains_by`",
                )
            if blob.kind != "blob":
                raise GenomeCorrupt(f"{shown_path(entry.path)!r} is a {blob.kind}, not a file", "the repository is malformed")
            document = _document(entry, domain, blob.content, named, source, licences, skipped)
            if document is not None:
                yield document
    finally:
        facts["objects_verified"] = reader.verified


def _wanted(entries: Sequence[TreeEntry], source: GitSource, skipped: Counter[str], prefix: str) -> list[tuple[TreeEntry, str]]:
    """The files to read, each with its domain, which its path below the outermost root decides."""
    found = []
    for entry in entries:
        if entry.mode == LINK:
            skipped["symlink"] += 1
        elif entry.mode != SUBMODULE:
            domain = domain_of(prefix + shown_path(entry.path), source.patterns)
            if domain is not None:
                found.append((entry, domain))
            else:
                skipped["unmatched"] += 1
    if source.max_megabytes is not None:
        found.sort(key=lambda pair: hash_order(shown_path(pair[0].path)))
    return found


def _licences(reader: ObjectReader, entries: Sequence[TreeEntry], declared: str) -> Licensing:
    files = [entry for entry in entries if entry.mode not in (LINK, SUBMODULE) and is_licence_file(shown_path(entry.path))]
    texts = []
    for entry, blob in zip(files, reader.objects([entry.name for entry in files], LICENCE_BYTES), strict=True):
        if blob.content is not None:
            texts.append((shown_path(entry.path), blob.content.decode("utf-8", "replace")))
    return licensing(texts, declared)


def _document(
    entry: TreeEntry,
    domain: str,
    content: bytes | None,
    named: str,
    source: GitSource,
    licences: Licensing,
    skipped: Counter[str],
) -> Document | None:
    path = shown_path(entry.path)
    if content is None:
        skipped["too_large"] += 1
        return None
    found = decoded(content)
    if found is None or not content or found[0].isspace():
        skipped["not_text" if found is None else "empty"] += 1
        return None
    text, encoding = found
    licence, evidence = licences.of(path, text)
    # the key leaves the commit out: the same file in two snapshots of one repository belongs into one split
    return make_document(text, f"{named}{path}", f"{source.url}/{path}", domain, licence, encoding, evidence, content)
