"""Children of a population as PEFT folders: any adapter folders in, one folder with its `provenance.json` out.

`merge/operators.py` makes them; here their parents get a name that means something anywhere, the sha256 of their folders.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from chrysalis_ray.core.records import read_json
from chrysalis_ray.evaluate.destination import PLAIN_CONFIG
from chrysalis_ray.evaluate.folders import open_sources
from chrysalis_ray.merge.operators import Offspring, Parent
from chrysalis_ray.seed.adapter import CONFIG, AdapterWeights, read_adapter, write_adapter

PROVENANCE = "provenance.json"


def read_parents(names: Sequence[str]) -> list[Parent]:
    """Adapters of one base as parents, each called by its sha256. Raises MergeError for what cannot be merged."""
    return [Parent(source.sha256, source.weights.factors, source.weights.scale) for source in open_sources(names)]


def write_offspring(folder: Path, child: Offspring, family: Path) -> str:
    """Write a child as a PEFT folder of the base that the adapter in `family` has; returns its sha256.

    `provenance.json` beside it holds operator, settings and the sha256 of its parents; the same child gives the same bytes.
    """
    like = read_adapter(family)
    named = {module: [target for target in like.targets if _means(target, module)] or [module] for module in child.factors}
    targets = tuple(sorted({target for own in named.values() for target in own}))
    weights = AdapterWeights(
        base_model=like.base_model,
        revision=like.revision,
        rank=child.rank,
        alpha=float(child.rank),
        use_rslora=False,
        targets=targets,
        factors=child.factors,
        fan_in_fan_out=like.fan_in_fan_out,
    )
    plain = {**PLAIN_CONFIG, "task_type": read_json(family / CONFIG).get("task_type")}
    told = {**child.provenance, "residual": child.residual}
    text = json.dumps(told, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_adapter(folder, weights, extra={PROVENANCE: text.encode()}, like=plain)


def _means(target: str, module: str) -> bool:
    return module == target or module.endswith(f".{target}")
