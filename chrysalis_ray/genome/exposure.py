"""Who saw a document, when and how often: closed form, from the plan alone. No log is kept and none is needed.

A row of tokens stands at positions that the mix gives back (`MixPlan.positions_of`); a document stands in known rows; a
variant's history is a list of stretches, each of whole chunks under one mix and one random seed. A mix has a schedule of its
own: stages that were written before, and changes that were appended while it trained.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import Epigenome
from chrysalis_ray.genome.mix import plan_of
from chrysalis_ray.genome.tokens import TokenStore


@dataclass(frozen=True)
class Stretch:
    """Optimizer steps `start` to `stop` - 1, trained by `variant_id` on the rows that its mix and its random seed drew."""

    variant_id: str
    rng_seed: int
    epigenome: Epigenome
    start: int
    stop: int
    rows_per_step: int


@dataclass(frozen=True)
class Sighting:
    """An optimizer step whose batch held a row of the document: how many tokens of it, and by whom it was trained."""

    step: int
    tokens: int
    variant_id: str


def ordinal_of(rows: Sequence[Mapping[str, Any]], doc_id: str) -> tuple[str, str, int]:
    """(domain, split, ordinal inside them) of a document of a manifest: the number that token rows know it by."""
    found = next((row for row in rows if row["doc_id"] == doc_id), None)
    if found is None:
        raise GenomeError(f"the genome has no document {doc_id}")
    domain, split = found["domain"], found["split"]
    before = sum(row["domain"] == domain and row["split"] == split and row["doc_id"] < doc_id for row in rows)
    return domain, split, before


def ordinals_of(rows: Sequence[Mapping[str, Any]], doc_ids: Collection[str]) -> dict[str, list[int]]:
    """domain -> ordinals of those of the documents that its train split holds. Raises GenomeError for one that the manifest
    lacks."""
    missing = sorted(set(doc_ids) - {row["doc_id"] for row in rows})
    if missing:
        raise GenomeError(f"the genome has no document {missing[0]}")
    trained: dict[str, list[str]] = {}
    for row in rows:
        if row["split"] == "train":
            trained.setdefault(row["domain"], []).append(row["doc_id"])
    wanted = set(doc_ids)
    found = {
        domain: [ordinal for ordinal, doc_id in enumerate(sorted(held)) if doc_id in wanted] for domain, held in trained.items()
    }
    return {domain: ordinals for domain, ordinals in found.items() if ordinals}


def tokens_by_row(store: TokenStore, domain: str, ordinals: int | Sequence[int]) -> dict[int, int]:
    """row -> tokens of the document, or the documents, in it, of the training rows of `domain`."""
    counts = np.isin(store.arrays[domain, "train"]["document"], ordinals).sum(axis=1)
    return {int(row): int(counts[row]) for row in np.flatnonzero(counts)}


def sightings(stretches: Sequence[Stretch], store: TokenStore, domain: str, by_row: Mapping[int, int]) -> list[Sighting]:
    """Every step of a history in which a row of the document was trained on, in order; `by_row` as of `tokens_by_row`."""
    sizes = {name: store.token_count(name, "train") for name in store.domains}
    rows = {name: store.rows(name, "train") for name in store.domains}
    tokens: dict[tuple[int, str], int] = {}
    for stretch in stretches:
        plan = plan_of(stretch.epigenome, sizes, rows, stretch.rng_seed)
        first, end = stretch.start * stretch.rows_per_step, stretch.stop * stretch.rows_per_step
        for row, count in by_row.items():
            for position in plan.positions_of(domain, row, first, end):
                seen = (position // stretch.rows_per_step, stretch.variant_id)
                tokens[seen] = tokens.get(seen, 0) + count
    return [Sighting(step, count, variant_id) for (step, variant_id), count in sorted(tokens.items())]
