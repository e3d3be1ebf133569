"""Harvest: what is left of every variant when the population is done, as files anyone can open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from chrysalis_ray.core.errors import VariantLost
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.patterns import PLAIN, Patterns
from chrysalis_ray.core.records import Hyperparameters, Variant, read_json, write_json
from chrysalis_ray.core.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from chrysalis_ray.seed.adapter import AdapterWeights


def harvest_population(layout: RunLayout, standing: Mapping[str, dict[str, Any]], facts: Mapping[str, Any]) -> None:
    """Every variant's adapter as a PEFT folder, then `population.json`. `standing` is omega's summary.

    A variant that failed or was evicted also rests in `failed/` with its reason.
    """
    from chrysalis_ray.seed.adapter import read_adapter

    zero = read_adapter(layout.seed)
    for variant_id, row in standing.items():
        if row["state"] in ("failed", "evicted"):
            write_json(layout.failed / f"{variant_id}.json", {"variant_id": variant_id, **row})
        if "seed" in row:
            row["adapter_sha256"] = _write_folder(layout, variant_id, row, zero)
    write_json(layout.population_manifest, {"variants": standing, **facts})


def _write_folder(layout: RunLayout, variant_id: str, row: Mapping[str, Any], zero: AdapterWeights) -> str:
    """The adapter in a variant's newest seed as a folder. Raises StoreCorrupt when its bytes do not match their hash."""
    from chrysalis_ray.seed.adapter import write_adapter
    from chrysalis_ray.seed.solo import write_solo
    from chrysalis_ray.seed.soul import unpack_seed

    tensors, meta = unpack_seed(Store(layout.store).get(row["seed"]))
    settings = Variant.from_json(row["variant"]).hyperparameters
    if "solo" in meta:
        return write_solo(layout.adapter(variant_id), tensors, meta, settings, layout.seed)
    adapter = adapter_of(tensors, settings, zero, Patterns.from_json(meta.get("patterns", {})))
    return write_adapter(layout.adapter(variant_id), adapter, like=layout.seed)


def adapter_of(
    tensors: Mapping[str, Tensor], settings: Hyperparameters, zero: AdapterWeights, patterns: Patterns = PLAIN
) -> AdapterWeights:
    """The adapter in the tensors of a packed variant's seed."""
    from chrysalis_ray.seed.adapter import AdapterWeights

    factors = {
        module: (tensors[f"weight/{module}.lora_A"].float(), tensors[f"weight/{module}.lora_B"].float())
        for module in zero.factors
    }
    return AdapterWeights(
        base_model=zero.base_model,
        revision=zero.revision,
        rank=settings.rank,
        alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        targets=zero.targets,
        factors=factors,
        fan_in_fan_out=zero.fan_in_fan_out,
        dropout=settings.dropout,
        patterns=patterns,
    )


def emerged(layout: RunLayout) -> list[str]:
    """The variants that have an adapter worth judging, in their order. Raises VariantLost if there is none."""
    rows = read_json(layout.population_manifest)["variants"]
    names = [name for name, row in rows.items() if row["state"] in ("finished", "stopped") and "seed" in row]
    if not names:
        reasons = "; ".join(f"{name}: {row['state']} ({row['reason']})" for name, row in rows.items())
        raise VariantLost(f"no variant emerged: {reasons}", f"look into {layout.failed}, then change the experiment")
    return names
