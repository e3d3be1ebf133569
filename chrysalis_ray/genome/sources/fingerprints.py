"""How a source looks from outside: enough to see, for a stat per file, that it did not change. A cache, never evidence.

`state.json` beside a manifest keeps the fingerprints that were taken *before* the sources were read: a file that changes
while it is read is seen as changed the next time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from chrysalis_ray.config.experiment import DatasetSource, FolderSource, GenomeSpec, JsonlSource, PythonSource, Source
from chrysalis_ray.config.genome import ArchiveSource, GitSource, HistorySource, PackagesSource, RecordsSource, is_object_id
from chrysalis_ray.core.records import read_json, sha256_of, write_json
from chrysalis_ray.genome.documents import shown_path
from chrysalis_ray.genome.sources.git_objects import resolve
from chrysalis_ray.genome.sources.git_source import located_url
from chrysalis_ray.genome.sources.packages import installed_files
from chrysalis_ray.genome.sources.python_text import python_identity
from chrysalis_ray.genome.sources.sources import located, matching_files

STATE = "state.json"


def fingerprints(spec: GenomeSpec, relative_to: Path) -> list[str | None]:
    """One fingerprint per source, in their order, and one of every list beside them; None where one cannot be had without
    reading the source."""
    looks = [_look(source, relative_to) for source in spec.sources]
    found = [
        None if look is None else sha256_of([source.model_dump(mode="json"), look])
        for source, look in zip(spec.sources, looks, strict=True)
    ]
    lists = [spec.forget, *(denial.robots for denial in spec.use_denied)]
    return found + [sha256_of(_stats([(path, located(path, relative_to))])) for path in lists if path is not None]


def unchanged(folder: Path, genome_id: str, seen: Sequence[str | None]) -> bool:
    """Whether the genome in `folder` was made from sources that looked like this, and its shards are there."""
    try:
        state = read_json(folder / STATE)
        same = None not in seen and state["genome_id"] == genome_id and state["fingerprints"] == _in_any_order(seen)
        return same and all((folder / name).stat().st_size == size for name, size in state["shards"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a cache that cannot be read says nothing
        return False


def remember(folder: Path, genome_id: str, seen: Sequence[str | None]) -> None:
    """Keep how the sources of the genome in `folder` looked before they were read."""
    if None in seen:
        (folder / STATE).unlink(missing_ok=True)
        return
    shards = {f"shards/{path.name}": path.stat().st_size for path in sorted((folder / "shards").iterdir())}
    write_json(folder / STATE, {"genome_id": genome_id, "fingerprints": _in_any_order(seen), "shards": shards})


def _in_any_order(seen: Sequence[str | None]) -> list[str]:
    return sorted(filter(None, seen))


def _look(source: Source, relative_to: Path) -> object:
    """What of a source can be seen without reading it; None for a data set of the hub that is not pinned."""
    if isinstance(source, PythonSource):
        return python_identity()
    if isinstance(source, FolderSource):
        root = located(source.path, relative_to)
        return _stats((name, root / name) for name in sorted(matching_files(root, source.glob)))
    if isinstance(source, JsonlSource | ArchiveSource | RecordsSource):
        return _stats([(source.path, located(source.path, relative_to))])
    if isinstance(source, HistorySource):
        return [_look(source.at(number), relative_to) for number in range(len(source.snapshots))]
    if isinstance(source, GitSource):
        if is_object_id(source.commit):
            return source.commit
        with tempfile.TemporaryDirectory() as scratch:
            return resolve(located_url(source.url, relative_to), source.commit, Path(scratch))
    if isinstance(source, PackagesSource):
        return _stats(installed_files(source))
    return _look_of_dataset(source, relative_to)


def _look_of_dataset(source: DatasetSource, relative_to: Path) -> object:
    folder = located(source.path, relative_to)
    if folder.is_file():
        return _stats([(source.path, folder)])
    if folder.is_dir():
        return _stats((name, folder / name) for name in sorted(matching_files(folder, "**/*")))
    return source.revision


def _stats(files: Iterable[tuple[str, Path]]) -> list[list[object]]:
    found: list[list[object]] = []
    for name, path in files:
        try:
            seen: os.stat_result | None = path.stat()
        except OSError:
            seen = None
        shown = shown_path(os.fsencode(name))
        found.append([shown, *((seen.st_mtime_ns, seen.st_ctime_ns, seen.st_size, seen.st_ino) if seen else ())])
    return found
