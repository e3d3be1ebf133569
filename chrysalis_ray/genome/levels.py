"""How far a genome is proven: levels, each of which rests on those below it.

0 manifest       its content is what its id says
1 shards         every file has the sha256 it was sealed with
2 root           the Merkle root follows from the documents' lines, and nothing that was forgotten is among them
3 repositories   every object of a git source is what its id says, from the commit down: they are read for level 5
4 documents      every text has the sha256 of its line, and stands where the line says, with its marks, licence and record
5 sources        the same genome comes out of its sources again (`rebuilding.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from chrysalis_ray.core.errors import GenomeCorrupt
from chrysalis_ray.genome.sealing import REBUILD, check_documents, check_shards, root_of_documents
from chrysalis_ray.genome.tombstones import check_gone

MANIFEST, SHARDS, ROOT, REPOSITORIES, DOCUMENTS, SOURCES = range(6)


@dataclass(frozen=True)
class Checked:
    """A level that holds: what was looked at, how much of it, and for how many seconds."""

    level: int
    what: str
    seconds: float

    @property
    def line(self) -> str:
        return f"level {self.level}: {self.what} ({self.seconds:.2f} s)"


def checked_levels(folder: Path, manifest: Mapping[str, Any], begun: float, deepest: int) -> Iterator[Checked]:
    """The levels of the genome in `folder` up to `deepest`, one by one as they are found to hold, of a `manifest` that was read
    and checked from `begun` on. Those that need its sources are left out. Raises GenomeCorrupt at the first that does not
    hold, naming the document if it may look at documents, else the shard."""
    content, shards = manifest["content"], manifest["shards"]
    rows = content["documents"]

    def sound_shards() -> None:
        try:
            check_shards(folder, shards)
        except GenomeCorrupt:
            if deepest >= DOCUMENTS:
                check_documents(folder, rows, shards)
            raise

    sealed, read_bytes = sum(shard["bytes"] for shard in shards.values()), sum(row["bytes"] for row in rows)
    forgotten = f", none of the {len(gone)} that were forgotten" if (gone := content.get("forgotten")) else ""
    checks: list[tuple[int, str, Callable[[], None]]] = [
        (MANIFEST, f"the manifest is what its id {manifest['genome_id'][:16]} says", lambda: None),
        (SHARDS, f"{len(shards)} shards, {sealed / 1e6:.1f} MB, each of its sha256", sound_shards),
        (ROOT, f"the Merkle root follows from {len(rows)} documents{forgotten}", lambda: _sound_root(folder, content)),
        (DOCUMENTS, f"{len(rows)} documents, {read_bytes / 1e6:.1f} MB, each of its sha256 and as its line says",
         lambda: check_documents(folder, rows, shards)),
    ]  # fmt: skip
    for level, what, check in checks:
        if level <= deepest:
            try:
                check()
            except GenomeCorrupt as error:
                raise GenomeCorrupt(f"level {level} does not hold: {error.message}", error.remedy) from error
            yield Checked(level, what, perf_counter() - begun)
            begun = perf_counter()


def _sound_root(folder: Path, content: Mapping[str, Any]) -> None:
    if root_of_documents(content["documents"]) != content["merkle_root"]:
        raise GenomeCorrupt(f"{folder / 'manifest.json'}: the Merkle root does not follow from the documents", REBUILD)
    check_gone(content)


def sources_checked(content: Mapping[str, Any], seconds: float) -> list[Checked]:
    """The levels that hold where a genome came out of its sources again, in so many seconds."""
    sources = content.get("sources", [])
    repositories = sum(line["recipe"]["type"] in ("git", "history") for line in sources)
    found = [Checked(SOURCES, f"the same genome comes out of {len(sources)} sources again", seconds)]
    if repositories:
        found.append(Checked(REPOSITORIES, f"{repositories} repositories, every object that was read is what its id says", 0.0))
    return found
