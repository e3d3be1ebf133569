"""The strongest check of a genome: it is made again from its sources, and must come out as it is."""

from __future__ import annotations

import tempfile
from pathlib import Path

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome.build import Genome, build_genome
from chrysalis_ray.genome.differences import differences
from chrysalis_ray.genome.tombstones import write_tombstones


def check_against_sources(genome: Genome, spec: GenomeSpec, relative_to: Path) -> None:
    """Build `spec` again into a folder that is then thrown away; what `genome` forgot stays forgotten. Every file is read and
    hashed, every object of a repository too. Raises GenomeError, telling what differs, where another genome comes out."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "genome"
        folder.mkdir()
        write_tombstones(folder, genome.manifest["content"].get("forgotten", ()))
        again = build_genome(spec, folder, relative_to)
        if again.genome_id == genome.genome_id:
            return
        before, after = genome.manifest["content"], again.manifest["content"]
    found = [
        f"{domain} has {', '.join(f'{len(paths)} {kind}' for kind, paths in kinds.items())}"
        for domain, kinds in differences(before, after).items()
    ]
    if before["recipe_sha256"] != after["recipe_sha256"]:
        found.append("it is another recipe (sources, split, marks that exclude, versions of the rules)")
    raise GenomeError(
        f"{genome.folder}: the same sources give another genome now, {again.genome_id[:16]}, not {genome.genome_id[:16]}: "
        + ("; ".join(found) or "the same documents from sources that are pinned otherwise"),
        "it is intact, but not what its sources say today: pin them (`commit`, `sha256`), or build it anew and look at "
        "`chrysalis genome diff`",
    )
