"""A sealed genome under a second name: nothing is copied, and what happens to the first folder does not reach the second."""

from __future__ import annotations

import shutil
from pathlib import Path

from chrysalis_ray.core.records import write_json
from chrysalis_ray.genome.build import Genome, read_manifest
from chrysalis_ray.genome.token_cache import link_or_copy


def link_genome(genome: Genome, folder: Path) -> None:
    """Give the files of `genome` names in `folder`, the manifest last; another genome that was there goes."""
    if (folder / "manifest.json").exists() and read_manifest(folder)["genome_id"] == genome.genome_id:
        return
    shutil.rmtree(folder, ignore_errors=True)
    for source in sorted(path for path in genome.folder.rglob("*") if path.is_file() and path.name != "manifest.json"):
        target = folder / source.relative_to(genome.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(source, target)
    write_json(folder / "manifest.json", genome.manifest)
