"""Objects of a git repository, fetched and checked without running anything that comes with it.

The `git` binary moves bytes: `fetch` into a bare store of our own. Loose and packed objects are unpacked here where they lie as
usual (`git_loose`, `git_packs`), and come out of one `cat-file --batch` where not. There is never a working tree, so no
checkout, hook, filter, smudge, LFS or submodule runs. No configuration is read, neither the user's nor the repository's;
protocols are ``https``, ``ssh`` and ``file``. What is read is believed only because every object, from the pinned commit over
its trees to each file, is hashed here again: the object's name is the hash of ``<kind> <size> NUL <content>`` (git's object
format; SHA-1 or SHA-256 by the length of the name).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.genome.sources.git_batch import CatFile, GitObject, algorithm
from chrysalis_ray.genome.sources.git_loose import LooseObjects, object_folders
from chrysalis_ray.genome.sources.git_packs import PackedObjects
from chrysalis_ray.genome.sources.git_program import OURS, OURS_TEXT, PATIENCE, git

WINDOW = 256  # requests under way; 256 names fit into any pipe, so that asking never waits for reading
MAX_ENTRIES = 2_000_000
MAX_PATH_BYTES = 2**29  # of all entries together
MAX_STRUCTURE_BYTES = 64 * 2**20  # of a commit, tag or tree
TAG_DEPTH = 8
ENTRIES = {2 * size: re.compile(rb"([0-7]+) ([^\0/]+)\0(.{%d})" % size, re.DOTALL) for size in (20, 32)}
NO_FILE_NAMES = frozenset({b".", b"..", b".git"})
OF_THIS_MACHINE = ("/", "file://")
TREE, LINK, SUBMODULE = 0o040000, 0o120000, 0o160000


class TreeEntry(NamedTuple):
    """One path of a commit: its mode, its name in bytes, the object it names."""

    mode: int
    path: bytes
    name: str


# fetching -----------------------------------------------------------------------------------------------------------


def resolve(url: str, reference: str, cwd: Path) -> str:
    """The id that the branch or tag `reference` has at `url` now; a tag's commit, not the tag. Raises GenomeError when there is
    none of that name, or a branch and a tag that differ."""
    asked = ["ls-remote", "--", url, reference, f"{reference}^{{}}"]
    lines = git(asked, cwd, PATIENCE if url.startswith(OF_THIS_MACHINE) else None).decode("utf-8", "replace").splitlines()
    named = {name: identity for identity, _, name in (line.partition("\t") for line in lines)}
    branch = named.get(f"refs/heads/{reference}")
    tag = named.get(f"refs/tags/{reference}^{{}}", named.get(f"refs/tags/{reference}"))
    if branch and tag and branch != tag:
        raise GenomeError(
            f"{url}: {reference!r} is a branch ({branch[:12]}) and a tag ({tag[:12]})",
            f"write refs/heads/{reference} or the id",
        )
    found = branch or tag or named.get(f"{reference}^{{}}", named.get(reference))
    if found is None:
        raise GenomeError(
            f"{url} has no branch or tag {reference!r}", "write a full commit id, or the name of a branch or tag that is there"
        )
    return found


def fetch(url: str, commit: str, store: Path) -> None:
    """Make the bare `store` and put `commit`, its trees and files into it; the history stays behind where the server can leave
    it. `url` is an address, or an absolute path of a repository or a bundle. Raises GenomeError."""
    make_store(store, commit)
    if url.startswith("/") and Path(url).is_file():
        git(["bundle", "unbundle", url], store)
        return
    if url.startswith(OF_THIS_MACHINE):
        git(["ls-remote", "--quiet", "--", url, "HEAD"], store, PATIENCE)  # whether it answers at all
    quiet = ["fetch", "--quiet", "--no-tags", "--no-recurse-submodules", "--no-write-fetch-head", "--no-auto-maintenance"]
    try:
        git([*quiet, "--depth=1", "--", url, commit], store)
    except GenomeError as by_name:  # an old server: only what a branch or tag names can be asked for
        try:
            git([*quiet, "--", url, "+refs/*:refs/fetched/*"], store)
        except GenomeError as everything:
            raise GenomeError(f"{url} cannot be fetched: {everything.message}", everything.remedy) from by_name


def make_store(store: Path, commit: str) -> None:
    """An empty bare repository for objects named as `commit` is."""
    store.mkdir(parents=True)
    git(["init", "--quiet", "--bare", "--template=", f"--object-format={algorithm(commit)}", "."], store)
    (store / OURS).write_text(OURS_TEXT)


# reading ------------------------------------------------------------------------------------------------------------


class ObjectReader:
    """The objects of a bare store, a hash over each: loose and packed ones are read here, the others by git."""

    def __init__(self, store: Path) -> None:
        folders = object_folders(store)
        self._loose, self._packs = LooseObjects(folders), PackedObjects(folders)
        self._git, self._apart = CatFile(store), CatFile(store)
        self.verified = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._packs.close()
        self._git.close()
        self._apart.close()

    def read(self, name: str, kind: str) -> bytes:
        """Content of one object of `kind`. Raises GenomeCorrupt when it is missing, of another kind, or not what its name
        says."""
        found = self._one(name, MAX_STRUCTURE_BYTES)
        if found.kind != kind or found.content is None:
            raise GenomeCorrupt(f"object {name} is a {found.kind} of {found.size} bytes; a {kind} was meant")
        return found.content

    def objects(self, names: Iterable[str], keep_bytes: int) -> Iterator[GitObject]:
        """The objects named, in order; those of more than `keep_bytes` are hashed and dropped. Raises GenomeCorrupt."""
        left = iter(names)
        waiting: deque[tuple[str, _AtHand | None]] = deque()  # name, and where it is read; of the others git was asked
        while True:
            if len(waiting) <= WINDOW // 2:
                fresh = [(name, self._at_hand(name)) for name in islice(left, WINDOW - len(waiting))]
                self._git.ask([name for name, at_hand in fresh if at_hand is None])
                waiting.extend(fresh)
            if not waiting:
                return
            name, at_hand = waiting.popleft()
            found = self._git.answer(name, keep_bytes) if at_hand is None else self._read_here(name, at_hand, keep_bytes)
            self.verified += 1
            yield found

    def _one(self, name: str, keep_bytes: int) -> GitObject:
        """An object apart from those that are under way."""
        found = self._read_here(name, self._at_hand(name), keep_bytes)
        self.verified += 1
        return found

    def _at_hand(self, name: str) -> _AtHand | None:
        return self._loose if self._loose.holds(name) else self._packs if self._packs.holds(name) else None

    def _read_here(self, name: str, at_hand: _AtHand | None, keep_bytes: int) -> GitObject:
        """An object that lies there; where what lies there is not that object or it is too long, what git, asked apart from
        all that it was asked before, makes of it."""
        found = None if at_hand is None else at_hand.read(name, keep_bytes)
        if found is None:
            self._apart.ask([name])
            return self._apart.answer(name, keep_bytes)
        kind, content = found
        return GitObject(name, kind, len(content), content)


_AtHand = LooseObjects | PackedObjects


def tree_of_commit(reader: ObjectReader, commit: str) -> tuple[str, str]:
    """(commit, tree) of the commit that `commit` is, or, if it is a tag, points to."""
    for _ in range(TAG_DEPTH):
        (found,) = reader.objects([commit], MAX_STRUCTURE_BYTES)
        first = (found.content or b"").partition(b"\n")[0].decode("ascii", "replace").split()
        if found.kind == "commit" and len(first) == 2 and first[0] == "tree":
            return commit, first[1]
        if found.kind != "tag" or len(first) != 2 or first[0] != "object":
            break
        commit = first[1]
    raise GenomeError(f"git object {commit} is a {found.kind}, not a commit", "name a commit, a branch or a tag of a commit")


def time_of_commit(reader: ObjectReader, commit: str) -> int:
    """When the commit that `commit` is, or points to, was committed: seconds since 1970. Raises GenomeCorrupt."""
    identity, _ = tree_of_commit(reader, commit)
    for line in reader.read(identity, "commit").split(b"\n\n", 1)[0].split(b"\n"):
        if line.startswith(b"committer "):
            words = line.split()
            if len(words) >= 4 and words[-2].isdigit() and int(words[-2]) < 2**40:
                return int(words[-2])
    raise GenomeCorrupt(f"commit {identity} does not say when it was committed", "the repository is malformed")


def tree_entries(reader: ObjectReader, tree: str) -> Iterator[TreeEntry]:
    """Every file, link and submodule below `tree`, in git's order. Raises GenomeCorrupt for a name that is no file name and
    GenomeError for more than `MAX_ENTRIES`, or paths of more than `MAX_PATH_BYTES` (a tree that holds one subtree a thousand
    times over costs its author nothing, and neither does a name of millions of letters)."""
    count = size = 0
    waiting = [(b"", tree)]
    while waiting:
        prefix, name = waiting.pop()
        below: list[tuple[bytes, str]] = []
        for mode, path, identity in _entries(reader.read(name, "tree"), name):
            count, size = count + 1, size + len(prefix) + len(path)
            if count > MAX_ENTRIES:
                raise GenomeError(f"tree {tree} has more than {MAX_ENTRIES} entries", "name a smaller repository")
            if size > MAX_PATH_BYTES:
                raise GenomeError(f"tree {tree} has paths of more than {MAX_PATH_BYTES} bytes", "name a smaller repository")
            if mode == TREE:
                below.append((prefix + path + b"/", identity))
            else:
                yield TreeEntry(mode, prefix + path, identity)
        waiting += reversed(below)


def _entries(content: bytes, tree: str) -> Iterator[tuple[int, bytes, str]]:
    """(mode, file name, name of the object) of each line of one tree object: octal mode, space, file name, NUL, raw id."""
    at = 0
    pattern = ENTRIES[len(tree)]
    while at < len(content):
        entry = pattern.match(content, at)
        if entry is None or entry[2].lower() in NO_FILE_NAMES:
            begin = content[at : at + 100].partition(b"\0")[0].partition(b" ")[2]
            raise GenomeCorrupt(f"tree {tree} has an entry that is no file name: {begin[:40]!r}", "the repository is malformed")
        at = entry.end()
        yield int(entry[1], 8), entry[2], entry[3].hex()
