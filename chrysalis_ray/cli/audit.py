"""`chrysalis audit`: what merging these adapters will do, before it is done."""

from __future__ import annotations

from chrysalis_ray.cli.arguments import Adapters, Json, SeedAdapter
from chrysalis_ray.cli.outcome import print_json


def audit(adapters: Adapters, seed_adapter: SeedAdapter = None, json: Json = False) -> None:
    """Look at adapters before merging them.

    Angles between their changes, signs in conflict, ranks, outliers, and in words what will work and what will not.

    \b
    chrysalis audit alice/ bob/ carol/
    """
    from chrysalis_ray.evaluate.folders import audit_folders

    found = audit_folders(adapters, seed_adapter)
    if json:
        print_json(found)
        return
    for row in found["adapters"]:
        print(
            f"{row['name']}\n  length {row['norm']:.4g}, effective rank {row['effective_rank']:.1f} of {row['rank']}, "
            f"cosines {' '.join(f'{value:+.2f}' for value in row['cosines'])}"
        )
    print("\n".join(f"- {sentence}" for sentence in found["findings"]))
