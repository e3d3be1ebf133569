"""Merges that ask the body for more than a score: inputs of every variant, and a judge for every trial."""

import json

import pytest
from garden import population

from chrysalis_ray.core.records import MIXTURE

pytestmark = pytest.mark.ray

MERGES = (
    "merge=[{method: winner}, {method: regmean, best_share: 1.0}, {method: regmean, name: searched, best_share: 1.0, weights: "
    "searched, budget: 10}, {method: regmean, name: whole, space: dense, best_share: 1.0}, "
    "{method: ensemble, name: layered, best_share: 1.0, weights: greedy_layers, layer_groups: 2}]"
)
PROBES = (
    "evaluate.probes=[{name: written, kind: regex, max_new_tokens: 5, stop: [zzz], items: [{prompt: def, pattern: '(?s).'}]}, "
    "{name: known, kind: multiple_choice, items: [{prompt: 'import ', choices: [os, qqqqqq], answer: 0}, "
    "{prompt: 'return ', choices: [self, '}}}{'], answer: 0}]}]"
)


def test_a_run_makes_merges_by_inputs_and_by_judging(garden):
    run = garden.run("merges", MERGES, PROBES, "population.scheduler={type: fifo}")
    made = json.loads((run / "merges" / "merges.json").read_text())
    assert made["failed"] == {}
    assert set(made["candidates"]) == {"winner", "regmean", "searched", "whole", "layered"}
    names = sorted(population(run))
    kept = sorted(path.name for path in (run / "evaluation" / "inputs").iterdir())
    assert kept == [f"{name}.safetensors" for name in names]  # whole ones are large, and gone
    for name in ("regmean", "whole"):
        assert 0.0 < made["candidates"][name]["notes"]["error_to_mean"] < 1.0
    search = made["candidates"]["searched"]["search"]
    state = json.loads((run / "evaluation" / "search-searched.json").read_text())
    assert search["judged"] == state["judged"] <= 10
    assert state["state"]["generation"] == 1
    select = json.loads((run / "evaluation" / "select.json").read_text())["candidates"]

    def loss(name):
        domains = {}
        for domain, _, total, tokens, *_ in select[name]:
            domains.setdefault(domain, []).append((total, tokens))
        return sum(sum(t for t, _ in rows) / sum(n for _, n in rows) for rows in domains.values()) / len(domains)

    assert loss("searched") == pytest.approx(search["loss"], rel=1e-5)
    assert loss("layered") <= min(loss(name) for name in names) + 1e-5
    assert [path.name for path in (run / "merges").iterdir() if path.name.startswith(".")] == []
    asked = json.loads((run / "evaluation" / "probes.json").read_text())["report"]
    verdict = json.loads((run / "verdict.json").read_text())
    everyone = ["seed", *names, "regmean", "searched", "whole", "layered"]
    assert set(asked["written"]["right"]) == set(asked["known"]["right"]) == set(everyone)
    assert all(asked["written"]["right"][name] == [1] for name in everyone)  # everybody writes something
    assert len({text for (text,) in asked["written"]["said"].values()}) > 1  # and not all the same
    assert set(verdict["probes"]["known"]["candidates"]) == set(everyone)
    assert set(verdict["report"]["merges"]) == {"regmean", "searched", "whole", "layered"}  # whatever was chosen
    agreement = verdict["report"]["agreement"]
    assert set(agreement) == set(everyone)
    assert all(own["beyond_spread"]["mean"] >= -1e-6 for own in agreement.values())
    assert agreement["regmean"]["members"] == names
    assert 0.0 < verdict["report"]["accuracy"][MIXTURE] < 1.0
    assert "Do they still do what their members do?" in (run / "report.html").read_text()
    assert any(sentence.startswith("Probe known: ") for sentence in verdict["sentences"])
    assert "## Probes" in (run / "imago" / "README.md").read_text()
    assert "Probe known" in (run / "report.html").read_text()
