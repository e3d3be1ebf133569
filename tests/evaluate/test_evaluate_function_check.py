"""The function check within a run: told on report of everybody, and a refusal on select where the experiment bounds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_evaluate_heldout import LAYOUT, TARGETS, Rows, adapters, base_model

from chrysalis_ray.config.experiment import Evaluate
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import MIXTURE, read_json, write_json
from chrysalis_ray.evaluate.agreement import ReportAgreements, SelectAgreements
from chrysalis_ray.evaluate.candidates import choice_on_select
from chrysalis_ray.evaluate.judging import judge_candidates
from chrysalis_ray.evaluate.scores import read_report
from chrysalis_ray.evaluate.stages import Judging, judge_merges, judge_variants, reach_verdict, tell_report
from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.pack import Pack

VARIANTS = ("v0", "v1", "v2")
MERGES = {"winner": {"v0": 1.0}, "mean": dict.fromkeys(VARIANTS, 1 / 3), "pair": {"v0": 0.5, "v1": 0.0, "v2": 0.5}}


class HeldOut(Rows):
    """The same rows on both splits."""

    def rows(self, domain, split):
        return len(LAYOUT[domain])


class Told:
    """An experiment as far as judging looks at it."""

    rng_seed, merge = 0, ()

    def __init__(self, **settings):
        self.evaluate = Evaluate.model_validate({"bootstrap_samples": 100, "max_domain_loss": None, **settings})


@pytest.fixture
def layout(tmp_path):
    layout = RunLayout(tmp_path / "run")
    own = dict(zip(VARIANTS, adapters(), strict=True))
    for name, weights in {**{name: {name: 1.0} for name in VARIANTS}, **MERGES}.items():
        factors = {
            module: (
                torch.cat([own[member][module][0] for member in weights]),
                torch.cat([0.2 * weight * own[member][module][1] for member, weight in weights.items()], 1),
            )
            for module in own["v0"]
        }
        rank = next(iter(factors.values()))[0].shape[0]
        folder = layout.merge(name) if name in MERGES else layout.adapter(name)
        write_adapter(folder, AdapterWeights("base", None, rank, 2.0 * rank, False, TARGETS, factors))
    made = {
        name: {"method": "winner" if name == "winner" else "ensemble", "weights": weights} for name, weights in MERGES.items()
    }
    write_json(layout.merges_manifest, {"candidates": made})
    return layout


def judging(layout, told):
    asked = []

    def judge(candidates, split, rows):
        asked.append((split, [each.name for each in candidates]))
        pack = Pack(base_model(), TARGETS, 2, 3, make_engine(0, "none", "fp32", "cpu"))
        return judge_candidates(pack, HeldOut(), candidates, split, rows)

    return Judging(layout, told, VARIANTS, judge, lambda *line: None, lambda *entry: None), asked


def judged(layout, told):
    stage, asked = judging(layout, told)
    judge_variants(stage)
    judge_merges(stage)
    tell_report(stage)
    return reach_verdict(layout, told, VARIANTS), asked


def test_everybody_is_told_on_report_beside_the_members(layout):
    told = Told()
    verdict, asked = judged(layout, told)
    assert [split for split, _ in asked] == ["select", "select", "report"]  # nobody went through the base once more
    assert not layout.agreement("select").exists()
    found = verdict["report"]["agreement"]
    assert {name: own["members"] for name, own in found.items()} == {
        "seed": [*VARIANTS], **{name: [*VARIANTS] for name in VARIANTS}, "mean": [*VARIANTS], "pair": ["v0", "v2"],
    }  # fmt: skip
    raw = ReportAgreements.load(layout.agreement("report"))
    for name, own in found.items():
        assert own["divergence"]["mean"] == raw.divergence(name)
        assert own["beyond_spread"]["mean"] >= -1e-6
        mean = sum(member["divergence"] for member in own["by_member"].values()) / len(own["members"])
        assert own["divergence"]["mean"] == pytest.approx(mean, rel=1e-6)
    assert found["mean"]["spread"] == pytest.approx(found["seed"]["spread"])  # the same members
    assert found["mean"]["divergence"]["mean"] < found["seed"]["divergence"]["mean"]
    losses = read_report(layout.report_scores).losses()
    for name in ("pair", "v1"):
        against = {member: own["loss"] for member, own in found[name]["by_member"].items() if "loss" in own}
        assert list(against) == [member for member in found[name]["members"] if member != name]
        for member, apart in against.items():
            assert apart["mean"] == pytest.approx(losses[name] - losses[member])
            assert apart["low"] < apart["mean"] < apart["high"]
    one, other = (found[name]["by_member"][member]["loss"] for name, member in (("v0", "v1"), ("v1", "v0")))
    assert (one["mean"], one["low"]) == (-other["mean"], pytest.approx(-other["high"], abs=1e-3))
    sentences = [line for line in verdict["sentences"] if line.startswith("Compared with ")]
    assert len(sentences) == 1
    assert f"{verdict['chosen']}) is {found[verdict['chosen']]['divergence']['mean']:.4f} nats" in sentences[0]
    accuracies = verdict["report"]["accuracy"]
    assert 0.0 <= accuracies[MIXTURE] <= 1.0
    assert layout.verdict.is_file()


def test_a_bound_refuses_on_select_and_a_second_start_asks_nobody_again(layout):
    loose, asked = judged(layout, Told(max_divergence=100.0))
    assert asked[1] == ("select", ["mean", "pair", "winner", "seed", *VARIANTS, MIXTURE])
    assert loose["select"]["refused"] == {}
    select = SelectAgreements.load(layout.agreement("select"))
    assert select.members == {"winner": ("v0",), "mean": VARIANTS, "pair": ("v0", "v2")}
    between = sorted(select.divergence(name) for name in ("mean", "pair"))
    bound = Told(max_divergence=sum(between) / 2)
    choice = choice_on_select(layout, VARIANTS, bound.evaluate)
    (refused,) = choice.refused
    assert select.divergence(refused) == between[1]
    assert "evaluate.max_divergence allows" in choice.refused[refused]
    assert choice.chosen != refused
    before = layout.agreement("select").read_bytes()
    stage, again = judging(layout, bound)
    judge_merges(stage)
    assert again == []
    written = read_json(layout.select_scores)
    del written["candidates"]["pair"]  # one that diverged is asked again, and so is everybody it is compared beside
    write_json(layout.select_scores, written)
    judge_merges(stage)
    assert [split for split, _ in again] == ["select"]
    assert layout.agreement("select").read_bytes() == before


def test_where_nobody_compared_a_bound_refuses_and_the_verdict_says_nothing(layout):
    verdict, _ = judged(layout, Told())
    layout.agreement("report").unlink()
    again = reach_verdict(layout, Told(), VARIANTS)
    assert again["report"]["agreement"] == {}
    assert again["sentences"] == [line for line in verdict["sentences"] if not line.startswith("Compared with ")]
    choice = choice_on_select(layout, VARIANTS, Told(max_divergence=100.0).evaluate)
    assert set(choice.refused) == {"mean", "pair"}
    assert choice.kind == "winner"
    assert all("could not be compared" in why for why in choice.refused.values())


def test_report_cannot_refuse(layout):
    judged(layout, Told())
    written = json.loads(Path(layout.agreement("report")).read_text())
    write_json(layout.agreement("select"), written)
    with pytest.raises(Exception, match="not on 'select'"):
        choice_on_select(layout, VARIANTS, Told(max_divergence=1.0).evaluate)
