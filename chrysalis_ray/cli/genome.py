"""`chrysalis genome verify`: are the sealed bytes still the sealed bytes?"""

from __future__ import annotations

from chrysalis_ray.cli.arguments import RunDirectory
from chrysalis_ray.core.layout import RunLayout


def verify_genome(run_directory: RunDirectory) -> None:
    """Hash a sealed genome again.

    Compares every shard of the run with its manifest; exit 1 if one byte changed.

    \b
    chrysalis genome verify runs/quickstart
    """
    from chrysalis_ray.genome.build import open_genome

    genome = open_genome(RunLayout(run_directory.absolute()).genome)
    print(f"genome {genome.genome_id} is intact: {len(genome.domains)} domains ({', '.join(genome.domains)})")
