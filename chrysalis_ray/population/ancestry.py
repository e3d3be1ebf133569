"""What led to the weights of a variant: its own chunks, and those of whoever it took them over from. Read from the cuts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from chrysalis_ray.body.turn import first_position
from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Epigenome, Variant
from chrysalis_ray.core.store import Store
from chrysalis_ray.population.branch import read_branch
from chrysalis_ray.report.metrics import read_metrics


@dataclass(frozen=True)
class Chunk:
    """Optimizer steps of one chunk, the variant that trained them, as it was, and its data mix then."""

    variant: Variant
    steps: range


class Ancestry:
    """The history of every variant of a run. Raises RunError where nothing was branched yet."""

    def __init__(self, layout: RunLayout) -> None:
        if not layout.branch_manifest.exists():
            raise RunError(f"nothing was branched in {layout.root} yet", "`chrysalis run` goes on where it stopped")
        self.variants = {variant.variant_id: variant for variant in read_branch(layout)}
        reports = read_metrics(layout.metrics)
        self._mixes = {row["position"]: Epigenome.from_json(row["epigenome"]) for row in reports}
        self._newest = {row["variant"]: row["position"] for row in sorted(reports, key=lambda row: row["report"])}
        self._results: dict[str, Mapping[str, Any]] = {}
        for _, cut in Store(layout.store).cuts():
            self._results.update(cut.get("results", {}))

    def history(self, variant_id: str) -> list[Chunk]:
        """The chunks that led to where the variant stood at its last report, the first one first; empty where it reported
        nothing. Raises RunError where the trail ends before the seed."""
        position = self._newest.get(variant_id)
        trail: list[Chunk] = []
        while position is not None and position != first_position(self.variants[variant_id]):
            result, mix = self._results.get(position), self._mixes.get(position)
            if result is None or mix is None:
                lost = "cut" if result is None else "report"
                raise RunError(
                    f"what led to position {position} of {variant_id} is in no {lost} any more",
                    "the store and metrics.jsonl of the run must be whole",
                )
            trainer = self.variants[result["variant_id"]]
            first = result["chunk"] * trainer.chunk_steps  # chunks count from 0
            trail.append(Chunk(replace(trainer, epigenome=mix), range(first, first + trainer.chunk_steps)))
            position = result["origin"]
        return trail[::-1]
