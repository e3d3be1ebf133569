"""The sweep: 64 variants in 8 slots."""

import pytest
from garden import population

from chrysalis_ray.core.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

SETTINGS = (
    "population.variants=64",
    "population.reports=4",
    "population.tokens_per_variant=256",
    "population.searcher={type: sobol}",
    "population.search={learning_rate: {type: log_uniform, low: 1e-5, high: 3e-2}}",
    "population.epigenomes={type: dirichlet}",
    "population.scheduler={type: asha, grace_reports: 1, reduction_factor: 2}",
    "population.paired=true",
    "body={slots: 8}",
    "tracking={wandb: disabled}",
)


def test_64_variants_run_through_8_slots_and_the_pack_stays_full_while_variants_wait(garden):
    run = garden.run("sweep", *SETTINGS)
    rows = population(run)
    assert len(rows) == 64
    states = [row["state"] for row in rows.values()]
    assert set(states) == {"finished", "stopped"}
    assert 8 <= states.count("finished") <= 48
    seen: set[str] = set()
    for _, body in Store(run / "store").cuts():
        turn = {entry["variant_id"] for entry in body["results"].values()}
        seen |= turn
        assert len(turn) == 8 or len(seen) == 64  # freed lanes went to those who waited
    assert seen == set(rows)
    for name, row in rows.items():
        assert row["chunks"] == 4 if row["state"] == "finished" else row["chunks"] < 4, name
