"""A population of different batch sizes on a real Ray, copied from one to the other by population based training."""

import json

import pytest
from garden import population

from chrysalis_ray.core.records import Variant
from chrysalis_ray.core.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_every_variant_keeps_its_own_batch_and_all_report_after_equally_many_tokens(garden):
    run = garden.run(
        "batches",
        "population.scheduler={type: pbt, perturb_every_reports: 1, quantile: 0.5}",
        "population.search={learning_rate: {type: log_uniform, low: 1e-5, high: 1e-2},"
        " rank: {type: choice, values: [2]}, rows_per_step: {type: grid, values: [1, 4]}}",
    )
    rows = population(run)
    assert {row["state"] for row in rows.values()} == {"finished"}
    variants = {name: Variant.from_json(json.loads((run / "variants" / name / "variant.json").read_text())) for name in rows}
    assert sorted(variant.rows_per_step for variant in variants.values()) == [1, 1, 4, 4]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        variant = variants[row["variant"]]
        assert row["step"] == row["report"] * variant.chunk_steps
        assert row["tokens"] == row["report"] * 6144 // 6
    known = {target: entry for _, body in Store(run / "store").cuts() for target, entry in body["results"].items()}
    between = [
        (entry["variant_id"], known[entry["origin"]]["variant_id"]) for entry in known.values() if entry["origin"] in known
    ]
    copied = [pair for pair in between if pair[0] != pair[1]]
    assert any(variants[heir].rows_per_step != variants[donor].rows_per_step for heir, donor in copied)
