"""What led to a variant's weights, read from the cuts of its run."""

from pathlib import Path

import pytest

from chrysalis_ray.body.turn import first_position
from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant
from chrysalis_ray.core.store import Store
from chrysalis_ray.population.ancestry import Ancestry
from chrysalis_ray.population.branch import write_branch
from chrysalis_ray.population.exposure import stretches_of
from chrysalis_ray.report.metrics import append_metrics


def test_the_history_of_a_run_is_read_from_its_cuts(tmp_path: Path) -> None:
    """Two variants; `v001` takes over the weights of `v000` after its first chunk and goes on under another mix."""
    layout = RunLayout(tmp_path)
    variants = [
        Variant(f"v00{n}", n, 100 + n, "seed", "genome", "base", Hyperparameters(), Epigenome({"a": 1.0}), 12, 4, 2, 16)
        for n in (0, 1)
    ]
    with pytest.raises(RunError, match="nothing was branched"):
        Ancestry(layout)
    write_branch(layout, variants)
    start = first_position(variants[0])
    store = Store(layout.store)
    turns = [
        {"p0": ("v000", start, 0, {"a": 1.0}), "p1": ("v001", start, 0, {"a": 1.0})},
        {"q0": ("v000", "p0", 1, {"a": 1.0}), "q1": ("v001", "p0", 1, {"a": 9.0})},
        {"r0": ("v000", "q0", 2, {"a": 1.0})},
    ]
    for number, turn in enumerate(turns):
        results = {
            target: {"variant_id": who, "origin": origin, "chunk": chunk, "seed": store.put(target.encode())}
            for target, (who, origin, chunk, _) in turn.items()
        }
        store.commit_cut(number, {"results": results, "turn": number})
        for target, (who, _, chunk, express) in turn.items():
            append_metrics(
                layout.metrics, {"variant": who, "report": chunk + 1, "position": target, "epigenome": {"express": express}}
            )
    ancestry = Ancestry(layout)
    told = {
        name: [
            (s.variant_id, s.rng_seed, s.start, s.stop, dict(s.epigenome.express)) for s in stretches_of(ancestry.history(name))
        ]
        for name in ("v000", "v001")
    }
    assert told == {
        "v000": [("v000", 100, 0, 12, {"a": 1.0})],
        "v001": [("v000", 100, 0, 4, {"a": 1.0}), ("v001", 101, 4, 8, {"a": 9.0})],
    }
    (layout.metrics).write_text(
        "".join(line for line in layout.metrics.read_text().splitlines(keepends=True) if "p0" not in line)
    )
    with pytest.raises(RunError, match="position p0 of v001 is in no report any more"):
        Ancestry(layout).history("v001")
