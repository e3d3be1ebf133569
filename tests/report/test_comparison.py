import json
from dataclasses import replace
from pathlib import Path

import pytest

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Change, Epigenome, Variant, read_json, write_json
from chrysalis_ray.report.comparison import read_run
from chrysalis_ray.report.metrics import append_metrics
from chrysalis_ray.report.mixes import asked_shares, resolved_mix, shares_now
from chrysalis_ray.report.planned import RUN, TRAINING, WORKER


def test_a_whole_run(judged: RunLayout) -> None:
    comparison = read_run(judged.root)
    losses = [row.select_loss for row in comparison.variants]
    assert losses == sorted(losses)
    assert len(comparison.variants) == 8
    assert comparison.best_variant.variant_id == "v000-api_docs"
    assert [row.name for row in comparison.merges] == ["ensemble", "winner", "consensus", "consensus-strict"]
    assert comparison.merges[-1].failure == "nothing agreed: support 0.9"
    assert comparison.verdict.chosen == "ensemble"
    assert comparison.wall_seconds == 131.5
    assert comparison.seed_loss > losses[-1]
    assert comparison.planned == {TRAINING: 120.0, WORKER: 700.0, RUN: 140.0}
    assert comparison.measured == {TRAINING: 110.0, WORKER: 648.0, RUN: 150.0}
    json.dumps(comparison.to_json(), allow_nan=False)


def test_one_variant_in_full(judged: RunLayout) -> None:
    row = next(row for row in read_run(judged.root).variants if row.variant_id == "v003-docstrings")
    assert (row.state, row.reason) == ("stopped", "ASHA: not in the best half at report 4")
    assert (row.step, row.steps, row.tokens) == (32, 64, 32 * 512)
    assert row.asked == pytest.approx({d: (4 if d == "docstrings" else 1) / 9 for d in row.asked})
    assert row.realised == pytest.approx(row.asked, abs=1e-3)
    assert [point.tokens for point in row.curve] == [8 * 512 * k for k in range(1, 5)]
    assert row.report_loss.low < row.report_loss.mean < row.report_loss.high
    assert row.hyperparameters["rank"] == 4


@pytest.mark.parametrize("fixture", ["branched", "trained", "judged"])
def test_partial_runs_are_runs(request: pytest.FixtureRequest, fixture: str) -> None:
    comparison = read_run(request.getfixturevalue(fixture).root)
    assert comparison.stage == {"branched": "branched", "trained": "trained", "judged": "judged"}[fixture]
    assert any("v000-api_docs" in line for line in comparison.lines())


def test_a_run_just_started(tmp_path: Path) -> None:
    write_json(RunLayout(tmp_path).run_manifest, {"name": "young", "run_id": "00000000", "experiment": {}})
    comparison = read_run(tmp_path)
    assert (comparison.name, comparison.stage, comparison.variants, comparison.verdict) == ("young", "started", (), None)
    assert comparison.lines()[0].startswith("young")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        read_run(tmp_path)


def test_a_manifest_that_is_no_json_is_named(judged: RunLayout) -> None:
    judged.verdict.write_text("{")
    with pytest.raises(RunError, match="verdict"):
        read_run(judged.root)


def test_scores_without_a_verdict_count_every_domain_alike(judged: RunLayout) -> None:
    told = {row.variant_id: row.select_loss for row in read_run(judged.root).variants}
    judged.verdict.unlink()
    counted = {row.variant_id: row.select_loss for row in read_run(judged.root).variants}
    assert counted == pytest.approx(told)


def test_a_variant_that_only_trains_shows_its_last_report(branched: RunLayout) -> None:
    append_metrics(
        branched.metrics,
        {"variant": "v001-code", "report": 1, "step": 8, "tokens": 4096, "select_loss": 3.5, "state": "training",
         "domain_tokens": {"code": 3000, "comments": 1000}, "epigenome": {"express": {"code": 3.0, "comments": 1.0}},
         "hyperparameters": {"learning_rate": 0.5}},
    )  # fmt: skip
    first = read_run(branched.root).variants[0]
    assert (first.variant_id, first.state, first.select_loss) == ("v001-code", "training", 3.5)
    assert first.asked == first.realised == {"code": 0.75, "comments": 0.25}
    assert first.hyperparameters["learning_rate"] == 0.5
    assert first.hyperparameters["rank"] == 8


def test_the_prior_by_size_weighs_levels_with_tokens() -> None:
    epigenome = Epigenome({"a": 1.0, "b": 2.0}, prior="size")
    assert asked_shares(epigenome, {"a": 600, "b": 100}) == {"a": 0.75, "b": 0.25}
    assert asked_shares(Epigenome({"a": 1.0, "b": 0.0}), {}) == {"a": 1.0}


STAGED = Epigenome(
    {"a": 1.0, "b": 1.0},
    floors={"c": 0.2},
    loss_weights={"a": 2.0},
    budget_rows=100,
    row_tokens=16,
    stages=(Change(50, {"b": 0.0}),),
    changes=(Change(75, {"b": 3.0}),),
)


def test_shares_asked_for_are_the_mean_of_what_was_trained() -> None:
    tokens = {"a": 10, "b": 10, "c": 10}
    start, stage, bred = {"a": 0.4, "b": 0.4, "c": 0.2}, {"a": 0.8, "c": 0.2}, {"a": 0.2, "b": 0.6, "c": 0.2}
    assert asked_shares(STAGED, tokens) == pytest.approx(start)
    assert asked_shares(STAGED, tokens, 75) == pytest.approx({"a": (50 * 0.4 + 25 * 0.8) / 75, "b": 50 * 0.4 / 75, "c": 0.2})
    before = replace(STAGED, changes=())
    assert shares_now(before, tokens, 49 * 16) == pytest.approx(start)
    assert shares_now(before, tokens, 50 * 16) == pytest.approx(stage)
    assert shares_now(STAGED, tokens, 75 * 16) == pytest.approx(bred)
    assert asked_shares(STAGED, {}, 1) == pytest.approx(start)  # of a genome that nobody tokenised yet


def test_a_mix_is_told_in_words_and_parts(branched: RunLayout) -> None:
    variant = replace(Variant.from_json(read_json(branched.variant("v001-code"))), epigenome=STAGED, rows_per_step=5)
    mix = resolved_mix(variant, STAGED, {"a": 10, "b": 10, "c": 10})
    assert mix.words == ("prior uniform", "at least c 20.0%", "loss weights a 2")
    assert [(part.step, part.why) for part in mix.parts] == [(0, "start"), (10, "stage"), (15, "bred")]


def test_lines_name_the_winner_and_the_verdict(judged: RunLayout) -> None:
    text = "\n".join(read_run(judged.root).lines())
    assert "Merging helped" in text
    assert "ensemble" in text
    assert read_json(judged.verdict)["sentences"][1] in text
