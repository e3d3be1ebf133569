"""The verdict: select chooses, report tells, and the intervals mean what they say."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.core.records import MIXTURE
from chrysalis_ray.evaluate.bootstrap import draws_for, interval, resampled_losses
from chrysalis_ray.evaluate.verdict import Choice, DocumentScore, ReportScores, SelectScores, choose, make_verdict


def population(kind, offsets, documents=40, noise=0.02, rng_seed=0, sizes=None):
    """Scores on two domains: a candidate's loss per token is the document's own difficulty + offset + noise."""
    rng = np.random.default_rng(rng_seed)
    difficulty = rng.normal(3.0, 0.5, 2 * documents)
    tokens = rng.integers(20, 200, 2 * documents)

    def score(n, offset):
        loss = tokens[n] * (difficulty[n] + offset + rng.normal(0, noise))
        return DocumentScore(f"domain{n % 2}", n // 2, float(loss), int(tokens[n]), sizes)

    return kind({name: [score(n, offset) for n in range(2 * documents)] for name, offset in offsets.items()})


OFFSETS = {"seed": 0.5, "v00": 0.3, "v01": 0.2, "v02": 0.4, "ensemble": 0.1, "consensus": 0.15}


def judged(offsets, report_offsets=None, **more):
    choice = choose(population(SelectScores, offsets), ["ensemble", "consensus"], ["v00", "v01", "v02"])
    return choice, make_verdict(
        choice, population(ReportScores, report_offsets or offsets, rng_seed=1), bootstrap_samples=400, **more
    )


def test_the_loss_is_macro_over_domains_and_weighted_by_tokens_inside():
    scores = SelectScores(
        {"x": [DocumentScore("a", 0, 10.0, 10), DocumentScore("a", 1, 90.0, 30), DocumentScore("b", 0, 3.0, 1)]}
    )
    assert scores.loss_by_domain("x") == {"a": 2.5, "b": 3.0}
    assert scores.loss("x") == 2.75
    assert scores.bits_per_byte("x") is None
    sized = SelectScores({"x": [DocumentScore("a", 0, 10.0, 10, 40)]})
    assert sized.bits_per_byte("x") == pytest.approx(10 / 40 / math.log(2))


def test_a_better_merge_is_released_and_helped():
    choice, verdict = judged(OFFSETS)
    assert (choice.winner, choice.best_merge, choice.chosen, choice.kind) == ("v01", "ensemble", "ensemble", "merge")
    assert verdict.merging_helped == "yes"
    assert {line.candidate: line.role for line in verdict.told} == {
        "seed": "seed", "v01": "best variant", "ensemble": "merge", "mean variant": "mean variant"}  # fmt: skip
    against = {d.against: d for d in verdict.differences}
    assert against["v01"].difference == pytest.approx(-0.1, abs=0.01)
    assert against["v01"].low < against["v01"].difference < against["v01"].high < 0
    assert against["mean variant"].difference == pytest.approx(-0.2, abs=0.01)
    assert verdict.sentences[0].startswith("Merging helped")
    assert "v01" in verdict.sentences[0]
    assert verdict.difference_confidence == pytest.approx(0.975)


def test_a_merge_that_loses_falls_back_to_the_winner_and_says_so():
    choice, verdict = judged({**OFFSETS, "ensemble": 0.25, "consensus": 0.3})
    assert (choice.chosen, choice.kind, choice.best_merge) == ("v01", "winner", "ensemble")
    assert verdict.merging_helped == "no"
    assert "did not help" in verdict.sentences[0]
    assert "v01 itself" in verdict.sentences[0]
    assert {d.against for d in verdict.differences} == {"seed", "mean variant"}


def test_report_never_changes_the_choice():
    choice, verdict = judged(OFFSETS, {**OFFSETS, "ensemble": 0.9})
    assert verdict.chosen == choice.chosen == "ensemble"
    assert verdict.merging_helped == "no"


def test_a_small_difference_is_unclear():
    near = {**OFFSETS, "ensemble": 0.195}
    choice = choose(population(SelectScores, near, noise=0.0), ["ensemble"], ["v00", "v01", "v02"])
    verdict = make_verdict(
        choice, population(ReportScores, {**near, "ensemble": 0.2}, noise=0.2, documents=8), bootstrap_samples=300
    )
    assert verdict.merging_helped == "unclear"
    assert "unclear" in verdict.sentences[0]


def test_equal_merges_and_variants_go_to_the_first_and_to_the_winner():
    same = dict.fromkeys(OFFSETS, 0.2)
    choice = choose(population(SelectScores, same, noise=0.0), ["ensemble", "consensus"], ["v02", "v00"])
    assert (choice.winner, choice.best_merge, choice.chosen) == ("v02", "ensemble", "v02")


def test_without_merges_the_winner_is_released():
    choice = choose(population(SelectScores, OFFSETS), [], ["v00", "v01"])
    assert (choice.chosen, choice.best_merge) == ("v01", None)
    assert make_verdict(choice, population(ReportScores, OFFSETS), bootstrap_samples=100).merging_helped == "no"


def test_the_mean_variant_is_told_only_where_all_variants_were_scored():
    choice = choose(population(SelectScores, OFFSETS), ["ensemble"], ["v00", "v01", "v02"])
    few = population(ReportScores, {name: OFFSETS[name] for name in ("seed", "v01", "ensemble")})
    assert [line.role for line in make_verdict(choice, few, bootstrap_samples=100).told] == ["seed", "best variant", "merge"]


def test_what_chooses_and_what_tells_are_different_types():
    select, report = population(SelectScores, OFFSETS), population(ReportScores, OFFSETS)
    with pytest.raises(TypeError, match="ReportScores"):
        choose(report, ["ensemble"], ["v00"])
    with pytest.raises(TypeError, match="SelectScores"):
        make_verdict(choose(select, ["ensemble"], ["v00"]), select)


def test_scores_and_verdicts_survive_json(tmp_path):
    select = population(SelectScores, OFFSETS, sizes=500)
    select.save(tmp_path / "select.json")
    assert SelectScores.load(tmp_path / "select.json") == select
    with pytest.raises(EvaluationError, match="select"):
        ReportScores.load(tmp_path / "select.json")
    for text in (
        "{",
        "[]",
        '{"split": "select"}',
        '{"split": "select", "candidates": {"x": [[1]]}}',
        '{"split": "select", "candidates": {"x": [["a", 0, "1", 2]]}}',
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(EvaluationError):
            SelectScores.load(tmp_path / "bad.json")
    choice, verdict = judged(OFFSETS)
    assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice
    again = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert (again["winner"], again["chosen"], again["merging_helped"]) == ("v01", "ensemble", "yes")
    assert set(again["select"]["loss"]) == set(OFFSETS)
    assert again["report"]["loss"]["ensemble"]["low"] < again["report"]["loss"]["ensemble"]["mean"]
    assert again["report"]["difference"]["against"] == "v01"
    assert set(again["report"]["roles"].values()) == {"seed", "best variant", "merge", "mean variant"}
    assert judged(OFFSETS)[1] == verdict
    assert judged(OFFSETS, rng_seed=5)[1] != verdict


WRONG = ["nothing", "no documents", "nan", "other documents", "other tokens", "twice", "no tokens", "unknown", "no variants"]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_judged_is_refused_by_name(wrong):
    good = [DocumentScore("a", 0, 3.0, 2), DocumentScore("a", 1, 4.0, 2)]
    other = {
        "no documents": [],
        "nan": [good[0], DocumentScore("a", 1, math.nan, 2)],
        "other documents": [good[0], DocumentScore("a", 2, 4.0, 2)],
        "other tokens": [good[0], DocumentScore("a", 1, 4.0, 3)],
        "twice": [good[0], good[0]],
        "no tokens": [good[0], DocumentScore("a", 1, 0.0, 0)],
    }

    def judge():
        scores = SelectScores({} if wrong == "nothing" else {"v00": good, "v01": other.get(wrong, good)})
        choose(scores, ["merge" if wrong == "unknown" else "v01"], [] if wrong == "no variants" else ["v00"])

    with pytest.raises(EvaluationError) as caught:
        judge()
    if wrong in ("nan", "other documents", "other tokens"):
        assert "v01" in str(caught.value)


def test_the_order_of_documents_and_candidates_does_not_matter():
    one = population(SelectScores, OFFSETS)
    two = SelectScores({name: list(reversed(scores)) for name, scores in reversed(one.candidates.items())})
    assert all(one.loss(name) == two.loss(name) for name in OFFSETS)
    assert choose(one, ["ensemble"], ["v00", "v01"]).chosen == choose(two, ["ensemble"], ["v00", "v01"]).chosen


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits, trials = 0, 150
    for trial in range(trials):
        tokens = rng.integers(50, 150, 80).astype(float)
        losses = (tokens * (2.0 + rng.normal(0, 0.3, 80)))[None]
        drawn = resampled_losses(losses, tokens, np.repeat([0, 1], 40), 300, trial)
        low, high = interval(drawn[:, 0], 0.9)
        hits += low <= 2.0 <= high
    assert 0.82 <= hits / trials <= 0.96


def test_an_interval_that_is_corrected_for_many_comparisons_has_draws_beyond_its_ends():
    rng = np.random.default_rng(0)
    losses, tokens, domains = rng.normal(2.0, 0.5, (1, 60)), np.ones(60), np.zeros(60, dtype=np.int64)
    confidence = 1 - 0.05 / 60
    assert (draws_for(0.95, 2000), draws_for(0.95, 100)) == (2000, 400)
    assert draws_for(1.0, 100) == draws_for(1 - 1e-12, 2000) == 50_000
    draws = draws_for(confidence, 2000)
    assert draws * (1 - confidence) / 2 == pytest.approx(10, abs=0.001)
    expected = 2.0 + (losses.mean() - 2.0) + losses.std() / np.sqrt(60) * 3.34 * np.array([-1, 1])  # of a normal distribution
    ends = [interval(resampled_losses(losses, tokens, domains, draws, seed)[:, 0], confidence) for seed in range(3)]
    np.testing.assert_allclose(ends, [expected] * 3, atol=0.3 * losses.std() / np.sqrt(60))
    choice = choose(by_domain(SelectScores, BY_DOMAIN), ["even", "narrow"], ["v00", "v01"])
    verdict = make_verdict(choice, by_domain(ReportScores, BY_DOMAIN), bootstrap_samples=100)
    assert verdict.bootstrap_samples == 1600  # two merges, two domains: 10 of 1600 lie beyond each end


def test_pairing_makes_differences_sharp_and_blocks_do_not_matter(monkeypatch):
    report = population(ReportScores, {"a": 0.0, "b": -0.1}, noise=0.01)
    losses = np.array([[score.loss_sum for score in report.of(name)] for name in "ab"])
    tokens = np.array([score.tokens for score in report.documents], dtype=float)
    domains = np.repeat([0, 1], 40)
    drawn = resampled_losses(losses, tokens, domains, 500, 3)
    assert drawn[:, 0].std() > 5 * (drawn[:, 0] - drawn[:, 1]).std()
    monkeypatch.setattr("chrysalis_ray.evaluate.bootstrap.BLOCK", 40 * 500)
    np.testing.assert_array_equal(resampled_losses(losses, tokens, domains, 500, 3), drawn)


def test_a_domain_of_few_documents_is_named():
    choice = choose(population(SelectScores, OFFSETS, documents=2), ["ensemble"], ["v00", "v01"])
    verdict = make_verdict(choice, population(ReportScores, OFFSETS, documents=2), bootstrap_samples=100)
    assert "domain0 (2), domain1 (2)" in verdict.sentences[-1]


def test_the_verdict_needs_no_torch():
    code = "import sys, chrysalis_ray.evaluate.verdict; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# domain by domain, and what a merge can hope for


def by_domain(kind, losses, documents=30, noise=0.01, rng_seed=0):
    """Scores with a loss of its own for every candidate and domain."""
    rng = np.random.default_rng(rng_seed)
    keys = [(domain, number) for domain in ("code", "prose") for number in range(documents)]
    base = {key: rng.normal(0, 0.3) for key in keys}

    def score(domain, number, loss):
        return DocumentScore(domain, number, 50 * (loss + base[domain, number] + rng.normal(0, noise)), 50, 200, 20)

    return kind({name: [score(*key, loss[key[0] == "prose"]) for key in keys] for name, loss in losses.items()})


BY_DOMAIN = {
    "seed": (3.5, 3.5), "v00": (3.0, 3.2), "v01": (3.3, 3.0), "narrow": (3.25, 2.5), "even": (2.98, 3.1),
}  # fmt: skip


def test_a_merge_that_loses_a_domain_is_refused_and_the_next_one_is_taken():
    select = by_domain(SelectScores, BY_DOMAIN)
    anything = choose(select, ["narrow", "even"], ["v00", "v01"])
    assert (anything.winner, anything.chosen, anything.refused) == ("v00", "narrow", {})
    careful = choose(select, ["narrow", "even"], ["v00", "v01"], 0.1)
    assert (careful.chosen, careful.best_merge, list(careful.refused)) == ("even", "even", ["narrow"])
    assert "narrow (2.8" in careful.reason
    assert "on code it loses 0.2" in careful.reason
    assert "more than the 0.1" in careful.reason
    alone = choose(select, ["narrow"], ["v00", "v01"], 0.1)
    assert (alone.chosen, alone.kind, alone.best_merge) == ("v00", "winner", None)
    assert "is refused" in make_verdict(alone, by_domain(ReportScores, BY_DOMAIN), bootstrap_samples=100).sentences[0]
    assert Choice.from_json(json.loads(json.dumps(careful.to_json()))) == careful


@pytest.mark.parametrize("most", [0.0, 0.05, 0.3, None])
def test_nothing_that_is_released_loses_a_domain_on_select_by_more_than_was_allowed(most):
    rng = np.random.default_rng(5)
    for trial in range(20):
        losses = {name: tuple(3.0 + rng.normal(0, 0.2, 2)) for name in BY_DOMAIN}
        choice = choose(by_domain(SelectScores, losses, 6, rng_seed=trial), ["narrow", "even"], ["v00", "v01"], most)
        lost = [choice.by_domain[choice.chosen][d] - choice.by_domain[choice.winner][d] for d in ("code", "prose")]
        assert most is None or max(lost) <= most
        assert set(choice.refused) <= {"narrow", "even"}


@pytest.mark.parametrize(
    ("limits", "chosen"),
    [
        ({"*": 0.1, "code": 0.3}, "narrow"),  # it loses 0.25 there
        ({"*": 0.1, "code": None}, "narrow"),
        ({"*": None, "code": 0.2}, "even"),
        ({"*": 0.3, "prose": 0.0}, "narrow"),
        ({"*": 0.3, "code": 0.0}, "even"),
    ],
)
def test_every_domain_has_a_limit_of_its_own(limits, chosen):
    select = by_domain(SelectScores, BY_DOMAIN)
    choice = choose(select, ["narrow", "even"], ["v00", "v01"], limits)
    assert choice.chosen == chosen
    assert ("narrow" in choice.refused) == (chosen == "even")
    assert all(f"more than the {limits['code']:g} that" in why for why in choice.refused.values())
    assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice


def test_the_domain_farthest_beyond_its_own_limit_is_the_reason():
    losses = {**BY_DOMAIN, "narrow": (3.2, 3.3)}  # 0.2 more on code, 0.1 more on prose
    choice = choose(by_domain(SelectScores, losses), ["narrow"], ["v00", "v01"], {"*": 0.15, "prose": 0.0})
    assert "on prose it loses 0.0988" in choice.refused["narrow"]
    told = by_domain(ReportScores, {**BY_DOMAIN, "even": (3.2, 3.25)}, rng_seed=1)
    even = choose(by_domain(SelectScores, BY_DOMAIN), ["even"], ["v00", "v01"], {"*": 0.3, "prose": 0.01})
    (line,) = (line for line in make_verdict(even, told, bootstrap_samples=100).sentences if "does worst on" in line)
    assert "worst on code" in line
    assert "on prose it is 0.05" in line
    assert line.count("allows (0.01), and select did not show it") == 1


def test_what_select_did_not_show_is_told_on_report_by_domain():
    choice = choose(by_domain(SelectScores, BY_DOMAIN), ["even"], ["v00", "v01"], 0.1)
    report = by_domain(ReportScores, {**BY_DOMAIN, "even": (3.2, 2.6)}, rng_seed=1)
    verdict = make_verdict(choice, report, bootstrap_samples=400)
    worst, best = verdict.domain_differences
    assert (worst.domain, worst.against, best.domain) == ("code", "v00", "prose")
    assert worst.difference == pytest.approx(0.2, abs=0.02)
    assert worst.low < worst.difference < worst.high
    assert best.high < 0
    assert any("does worst on code" in line and "select did not show it" in line for line in verdict.sentences)
    assert verdict.to_json()["report"]["domain_differences"][0]["domain"] == "code"


def test_a_variant_that_is_released_is_under_no_rule_of_merges():
    """`max_domain_loss` is what a merge may lose against the best variant, not what that may lose against the seed."""
    choice = choose(by_domain(SelectScores, BY_DOMAIN), ["narrow"], ["v00", "v01"], 0.1)
    report = by_domain(ReportScores, {**BY_DOMAIN, "v00": (3.85, 2.9)}, rng_seed=1)
    (line,) = (line for line in make_verdict(choice, report, bootstrap_samples=100).sentences if "does worst on" in line)
    assert "against seed, v00 does worst on code: 0.3" in line
    assert "max_domain_loss" not in line


def test_the_mixture_of_all_variants_is_told_as_what_a_merge_can_hope_for():
    losses = {**BY_DOMAIN, MIXTURE: (2.9, 2.9)}
    choice = choose(by_domain(SelectScores, BY_DOMAIN), ["even"], ["v00", "v01"])
    verdict = make_verdict(choice, by_domain(ReportScores, losses, rng_seed=1), bootstrap_samples=200)
    assert {line.candidate: line.role for line in verdict.told}[MIXTURE] == "bound"
    (line,) = (line for line in verdict.sentences if "asked together" in line)
    told = {line.candidate: line.loss for line in verdict.told}
    share = (told["v00"] - told["even"]) / (told["v00"] - told[MIXTURE])
    assert f"{share:.0%} of the way" in line
    assert MIXTURE in {difference.against for difference in verdict.differences}
    alone = choose(by_domain(SelectScores, BY_DOMAIN), [], ["v00", "v01"])
    (line,) = (line for line in make_verdict(alone, by_domain(ReportScores, losses)).sentences if "asked together" in line)
    assert "of the way" not in line
    assert "what a merge can hope for" in line
    worse = by_domain(ReportScores, {**losses, MIXTURE: (3.4, 3.4)})  # variants that were stopped early say little together
    (line,) = (line for line in make_verdict(alone, worse).sentences if "asked together" in line)
    assert "no better than the best of them alone" in line
    assert "hope" not in line


def test_metrics_by_domain_are_what_the_rows_say_and_old_scores_still_open(tmp_path):
    new = [["a", 0, 10.0, 10, 40, 5], ["a", 1, 90.0, 30, 60, 3], ["b", 0, 3.0, 1, 2, None]]
    old = [row[:4] for row in new]
    (tmp_path / "select.json").write_text(json.dumps({"split": "select", "candidates": {"new": new, "old": old}}))
    scores = SelectScores.load(tmp_path / "select.json")
    assert scores.metrics("new")["a"] == {
        "loss": 2.5, "perplexity": pytest.approx(math.exp(2.5)), "bits_per_byte": pytest.approx(1 / math.log(2)),
        "accuracy": 8 / 40}  # fmt: skip
    assert scores.metrics("new")["b"]["accuracy"] is None
    assert scores.accuracy("new") is None
    assert scores.bits_per_byte("new") == pytest.approx((1.0 + 1.5) / 2 / math.log(2))
    assert scores.metrics("old")["a"] == {
        "loss": 2.5, "perplexity": pytest.approx(math.exp(2.5)), "bits_per_byte": None, "accuracy": None}  # fmt: skip
    assert SelectScores.from_json(scores.to_json()) == scores
    other = [*new[:2], ["b", 0, 3.0, 1, 3, None]]
    with pytest.raises(EvaluationError, match="different documents"):
        SelectScores.from_json({"split": "select", "candidates": {"new": new, "other": other}})


def test_every_merge_is_told_on_report_with_its_interval_against_the_best_variant():
    choice, verdict = judged(OFFSETS)
    assert [merge.candidate for merge in verdict.merges] == ["ensemble", "consensus"]
    told = verdict.to_json()["report"]
    assert told["merges"]["ensemble"]["mean"] == told["loss"]["ensemble"]["mean"]
    against = {each["against"]: each for each in told["differences"]}["v01"]
    assert told["merges"]["ensemble"]["against_winner"] == pytest.approx(against)
    for name, merge in told["merges"].items():
        assert merge["low"] < merge["mean"] < merge["high"]
        apart = merge["against_winner"]
        assert apart["mean"] == pytest.approx(OFFSETS[name] - OFFSETS["v01"], abs=0.01)
        assert apart["low"] < apart["mean"] < apart["high"] < 0.0
    fewer = {name: offset for name, offset in OFFSETS.items() if name != "consensus"}
    assert [merge.candidate for merge in make_verdict(choice, population(ReportScores, fewer)).merges] == ["ensemble"]
