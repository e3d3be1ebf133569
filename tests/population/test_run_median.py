"""Median stopping on a real Ray: it stops exactly whom it would stop if all reports of a turn had come at once."""

import json
from statistics import fmean, median

import pytest
from garden import population

pytestmark = [pytest.mark.ray, pytest.mark.slow]

GRACE, LEAST = 2, 2
SETTINGS = (
    f"population.scheduler={{type: median, grace_reports: {GRACE}, min_variants: {LEAST}}}",
    "population.variants=8",
    "population.search={learning_rate: {type: grid, values: [1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6]}}",
    "body.slots=8",
)


def test_who_is_worse_than_the_median_is_stopped_and_nobody_else(garden):
    run = garden.run("median", *SETTINGS)
    losses: dict[str, list[float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        losses.setdefault(row["variant"], []).append(row["select_loss"])
    live = set(losses)
    for report in range(GRACE, 7):
        means = {name: fmean(losses[name][GRACE - 1 : report]) for name in live}
        worse = {
            name
            for name in live
            if len(live) > LEAST and median(means[other] for other in live - {name}) < min(losses[name][:report])
        }
        unjudged = sorted(worse, key=means.__getitem__)[: max(0, LEAST - len(live - worse))]
        stopped = {name for name in live if len(losses[name]) == report and report < 6}
        if report < 6:
            assert stopped == worse - set(unjudged), report
        live -= stopped
    states = {name: row["state"] for name, row in population(run).items()}
    assert {state for name, state in states.items() if name in live} == {"finished"}
    assert "stopped" in states.values()
