"""The choice of a probe: another blueprint only where it is better beyond doubt, on documents that all were judged on."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.evaluate.contest import BITS, NATS, Contest, decide
from chrysalis_ray.evaluate.scores import DocumentScore, ReportScores, SelectScores

DOCUMENTS = [(domain, number) for domain in ("code", "prose") for number in range(12)]
TOKENS = 50


def scores(
    shift: float = 0.0, noise: float = 0.0, seed: int = 0, tokens: int = TOKENS, documents=DOCUMENTS, sized: bool = True
):
    """Losses of one candidate: 3 nats per token and what the document brings, moved by `shift`, and by noise of its own."""
    generator, own = random.Random(7), random.Random(seed)
    rows = []
    for domain, number in documents:
        nats = TOKENS * (3.0 + generator.gauss(0, 0.5) + shift + own.gauss(0, noise))  # of the text, however it is cut
        rows.append(DocumentScore(domain, number, nats, tokens, 4 * TOKENS if sized else None))
    return rows


def told(contest: Contest, candidate: str):
    return next(standing for standing in contest.standings if standing.candidate == candidate)


def test_who_is_better_on_every_document_wins_and_the_best_of_those() -> None:
    contest = decide(
        [SelectScores({"own": scores(), "good": scores(-0.1), "best": scores(-0.2), "bad": scores(0.3)})], "own", {}
    )
    assert (contest.winner, contest.tied, contest.unit) == ("best", False, NATS)
    best = told(contest, "best")
    assert best.difference == pytest.approx(-0.2)
    assert best.low == pytest.approx(-0.2)
    assert best.high == pytest.approx(-0.2)
    assert told(contest, "bad").why == "worse"
    assert told(contest, "own").difference is None
    assert contest.confidence == pytest.approx(1 - 0.05 / 3)
    assert contest.documents == len(DOCUMENTS)
    assert "best: better than own by 0.2000" in contest.sentence
    assert [line.split()[0] for line in contest.lines()] == ["own", "good", "best", "bad", "best:"]


def test_a_tie_goes_to_the_first_and_says_so() -> None:
    contest = decide([SelectScores({"own": scores(), "lucky": scores(-0.02, noise=0.3, seed=3)})], "own", {})
    lucky = told(contest, "lucky")
    assert lucky.low < 0 < lucky.high
    assert (contest.winner, contest.tied) == ("own", lucky.difference < 0)
    assert "own stays, as the tie goes to it" in contest.sentence
    assert "includes zero" in contest.sentence


def test_where_nobody_has_less_loss_there_is_no_tie() -> None:
    contest = decide([SelectScores({"own": scores(), "worse": scores(0.01)})], "own", {})
    assert (contest.winner, contest.tied) == ("own", False)
    assert contest.sentence == "own: none of 1 others has less loss"


def test_more_comparisons_ask_for_more() -> None:
    """The same difference that decides between two does not decide among many: Bonferroni."""
    swing = [TOKENS * (0.25 if place % 2 else -0.25) for place in range(len(DOCUMENTS))]  # an error of 0.051 of the mean
    other = [replace(row, loss_sum=row.loss_sum + by) for row, by in zip(scores(-0.13), swing, strict=True)]
    alone = decide([SelectScores({"own": scores(), "other": other})], "own", {})
    crowd = {f"bad-{number}": scores(1.0) for number in range(60)}
    among = decide([SelectScores({"own": scores(), "other": other, **crowd})], "own", {}, bootstrap_samples=4000)
    assert alone.winner == "other"
    assert (among.winner, among.tied) == ("own", True)
    assert told(among, "other").high > told(alone, "other").high


def test_other_tokens_are_compared_in_bits_per_byte() -> None:
    """The same likelihood of the same text, cut into half as many tokens, is no difference at all."""
    contest = decide([SelectScores({"own": scores()}), SelectScores({"coarse": scores(tokens=TOKENS // 2)})], "own", {})
    assert contest.unit == BITS
    assert told(contest, "coarse").difference == pytest.approx(0.0, abs=1e-12)
    expected = sum(score.loss_sum for score in scores()) / (len(DOCUMENTS) * 4 * TOKENS) / math.log(2)
    assert told(contest, "own").loss == pytest.approx(expected)
    better = decide([SelectScores({"own": scores()}), SelectScores({"coarse": scores(-0.1, tokens=TOKENS // 2)})], "own", {})
    assert better.winner == "coarse"
    assert told(better, "coarse").difference == pytest.approx(-0.1 / 4 / math.log(2))


def test_only_documents_that_all_were_judged_on_count() -> None:
    few = scores(-0.5, documents=DOCUMENTS[4:])
    contest = decide([SelectScores({"own": scores()}), SelectScores({"longer": few})], "own", {})
    assert contest.documents == len(DOCUMENTS) - 4
    assert contest.winner == "longer"
    apart = scores(-0.5, documents=[("code", 100), ("prose", 100)])
    for other in (apart, scores(-0.5, tokens=9, sized=False)):
        unknown = decide([SelectScores({"own": scores()}), SelectScores({"stranger": other})], "own", {})
        assert (unknown.winner, unknown.tied, unknown.documents) == ("own", True, 0)
        assert "raise probe.rows_per_domain" in unknown.sentence


def test_few_documents_prefer_nobody() -> None:
    documents = DOCUMENTS[:5]
    rows = {"own": scores(documents=documents), "best": scores(-0.5, documents=documents)}
    contest = decide([SelectScores(rows)], "own", {})
    assert (contest.winner, contest.tied) == ("own", True)
    assert "5 shared documents are too few to prefer best" in contest.sentence


def test_where_the_first_cannot_be_tried_the_least_loss_decides() -> None:
    rows = {"fair": scores(-0.1), "best": scores(-0.2)}
    contest = decide([SelectScores(rows)], "own", {"own": "a body needs 8 GPUs"})
    assert contest.winner == "best"
    assert "own was not judged (a body needs 8 GPUs)" in contest.sentence
    assert told(contest, "own").loss is None
    alone = decide([SelectScores({"own": scores()})], "own", {"other": "diverged"})
    assert (alone.winner, alone.sentence) == ("own", "own: no other could be tried")
    with pytest.raises(EvaluationError, match="none of 2 blueprints could be tried: own: no room; other: diverged"):
        decide([], "own", {"own": "no room", "other": "diverged"})


def test_the_choice_is_a_pure_function_whatever_the_order() -> None:
    rows = {
        name: scores(shift, noise=0.2, seed=seed) for seed, (name, shift) in enumerate([("b", -0.2), ("own", 0), ("c", -0.1)])
    }
    forward, backward = decide([SelectScores(rows)], "own", {}), decide([SelectScores(dict(reversed(rows.items())))], "own", {})
    assert forward == decide([SelectScores(rows)], "own", {})
    assert forward.winner == backward.winner
    assert {s.candidate: s for s in forward.standings} == {s.candidate: s for s in backward.standings}
    assert Contest.from_json(forward.to_json()) == forward


def test_what_tells_never_chooses() -> None:
    with pytest.raises(TypeError, match="only SelectScores choose"):
        decide([ReportScores({"own": scores(), "other": scores(-1.0)})], "own", {})  # type: ignore[list-item]
