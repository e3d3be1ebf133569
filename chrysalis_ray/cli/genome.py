"""`chrysalis genome verify`: are the sealed bytes still the sealed bytes?"""

from __future__ import annotations

from chrysalis_ray.cli.arguments import RunDirectory
from chrysalis_ray.core.layout import RunLayout


def verify_genome(run_directory: RunDirectory) -> None:
    """Hash a sealed genome again.

    Every document, the Merkle root and every shard of the run; exit 1 if one byte changed.

    \b
    chrysalis genome verify runs/quickstart
    """
    from chrysalis_ray.genome import build

    genome = build.verify_genome(RunLayout(run_directory.absolute()).genome)
    print(f"genome {genome.genome_id} is intact: {len(genome.domains)} domains ({', '.join(genome.domains)})")
