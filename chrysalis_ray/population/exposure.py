"""Which variants of a run saw a document: the closed form of `genome.exposure` over the history of every variant."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.genome.build import Genome
from chrysalis_ray.genome.exposure import Stretch, ordinals_of, sightings, tokens_by_row
from chrysalis_ray.genome.tokens import TokenStore
from chrysalis_ray.population.ancestry import Ancestry, Chunk


def exposure(layout: RunLayout, genome: Genome, tokens: TokenStore, doc_id: str) -> dict[str, dict[str, Any]]:
    """variant -> {steps, tokens, trained_by}: the optimizer steps at which its weights learned from the document, the tokens of
    it in all of them, and who trained those steps (others, where it took over their weights).

    A document outside the train split was seen by nobody. Raises GenomeError for a document that the genome lacks, RunError
    where nothing was branched yet, where the tokens are of another genome, or where a history cannot be followed.
    """
    return exposure_to_any(layout, genome, tokens, [doc_id])


def exposure_to_any(
    layout: RunLayout, genome: Genome, tokens: TokenStore, doc_ids: Collection[str]
) -> dict[str, dict[str, Any]]:
    """`exposure` to several documents at once: the steps at which weights learned from any of them."""
    if tokens.genome_id != genome.genome_id:
        raise RunError(
            f"{layout.tokens} was made from genome {tokens.genome_id[:16]}, not {genome.genome_id[:16]}",
            "run the same experiment again: tokens follow their genome",
        )
    ancestry = Ancestry(layout)
    ordinals = ordinals_of(genome.manifest["content"]["documents"], doc_ids)
    by_row = {domain: tokens_by_row(tokens, domain, held) for domain, held in ordinals.items()}
    told = {}
    for name in sorted(ancestry.variants):
        stretches = stretches_of(ancestry.history(name))
        seen = [sighting for domain, rows in by_row.items() for sighting in sightings(stretches, tokens, domain, rows)]
        told[name] = {
            "steps": sorted({sighting.step for sighting in seen}),
            "tokens": sum(sighting.tokens for sighting in seen),
            "trained_by": sorted({sighting.variant_id for sighting in seen}),
        }
    return told


def stretches_of(trail: Sequence[Chunk]) -> list[Stretch]:
    """A history as stretches of equal mix and random seed: neighbouring chunks that drew from the same plan are one."""
    found: list[Stretch] = []
    for chunk in trail:
        now = chunk.variant
        start = chunk.steps.start
        if found and (found[-1].variant_id, found[-1].epigenome, found[-1].stop) == (now.variant_id, now.epigenome, start):
            start = found.pop().start
        found.append(Stretch(now.variant_id, now.rng_seed, now.epigenome, start, chunk.steps.stop, now.rows_per_step))
    return found
