"""The objects of a repository of this machine, read where they lie: nothing is copied, compressed and unpacked again.

Our own bare store names the repository's object folder as an alternate (gitrepository-layout, ``objects/info/alternates``). Of
the repository nothing else is looked at, neither its configuration nor its hooks; what is read is hashed like everything.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.genome.sources.git_objects import fetch, make_store
from chrysalis_ray.genome.sources.git_program import PATIENCE, git

FILE_BYTES = 4096  # of a `.git` file and of `commondir`


def obtain(url: str, commit: str, store: Path) -> None:
    """Make the bare `store` and let `commit` be had from it: a repository of this machine lends its objects, what is elsewhere,
    or a bundle, or cannot lend them, is fetched. Raises GenomeError."""
    objects = objects_of(Path(url)) if url.startswith("/") else None
    if objects is not None and "\n" not in str(objects):
        make_store(store, commit)
        (store / "objects" / "info" / "alternates").write_bytes(bytes(objects) + b"\n")
        if has(store, commit):
            return
        shutil.rmtree(store)
    fetch(url, commit, store)


def has(store: Path, name: str) -> bool:
    """Whether the object can be had from `store`. Raises GenomeCorrupt where it does not say."""
    try:
        git(["cat-file", "-e", name], store, PATIENCE)
    except GenomeCorrupt:
        raise
    except GenomeError:
        return False
    return True


def objects_of(repository: Path) -> Path | None:
    """The object folder of a repository: of a bare one, of one with a working tree, of a further working tree; None where there
    is none to be found."""
    try:
        inside = repository / ".git"
        if inside.is_file():
            inside = inside.parent / _told(inside).removeprefix("gitdir:").strip()
        folder = inside if inside.is_dir() else repository
        if (folder / "commondir").is_file():
            folder = folder / _told(folder / "commondir").strip()
        found = (folder / "objects").resolve()
        return found if (folder / "HEAD").is_file() and found.is_dir() else None
    except (OSError, UnicodeDecodeError, ValueError, RuntimeError):  # RuntimeError: a loop of links
        return None


def _told(path: Path) -> str:
    with path.open("rb") as stream:
        return stream.read(FILE_BYTES).decode()
