"""The choice of a probe: another blueprint only where it is better beyond doubt, on documents that all were judged on."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.evaluate.contest import BARE, BITS, GAIN, NATS, Contest, Judged, decide
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


def judged(rows, base="one", bare=None):
    """Candidates judged together, and the bare base on what they saw."""
    return Judged(base, SelectScores({**rows, BARE: bare or next(iter(rows.values()))}))


def told(contest: Contest, candidate: str):
    return next(standing for standing in contest.standings if standing.candidate == candidate)


def test_who_is_better_on_every_document_wins_and_the_best_of_those() -> None:
    contest = decide([judged({"own": scores(), "good": scores(-0.1), "best": scores(-0.2), "bad": scores(0.3)})], "own", {})
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
    contest = decide([judged({"own": scores(), "lucky": scores(-0.02, noise=0.3, seed=3)})], "own", {})
    lucky = told(contest, "lucky")
    assert lucky.low < 0 < lucky.high
    assert (contest.winner, contest.tied) == ("own", lucky.difference < 0)
    assert "own stays, as the tie goes to it" in contest.sentence
    assert "includes zero" in contest.sentence


def test_where_nobody_has_less_loss_there_is_no_tie() -> None:
    contest = decide([judged({"own": scores(), "worse": scores(0.01)})], "own", {})
    assert (contest.winner, contest.tied) == ("own", False)
    assert contest.sentence == "own: none of 1 others has less loss"


def test_more_comparisons_ask_for_more() -> None:
    """The same difference that decides between two does not decide among many: Bonferroni."""
    swing = [TOKENS * (0.25 if place % 2 else -0.25) for place in range(len(DOCUMENTS))]  # an error of 0.051 of the mean
    other = [replace(row, loss_sum=row.loss_sum + by) for row, by in zip(scores(-0.13), swing, strict=True)]
    alone = decide([judged({"own": scores(), "other": other})], "own", {})
    crowd = {f"bad-{number}": scores(1.0) for number in range(60)}
    among = decide([judged({"own": scores(), "other": other, **crowd})], "own", {}, bootstrap_samples=4000)
    assert alone.winner == "other"
    assert (among.winner, among.tied) == ("own", True)
    assert told(among, "other").high > told(alone, "other").high


def test_bases_that_cut_the_text_otherwise_are_compared_in_bits_per_byte() -> None:
    """The same likelihood of the same text, cut into half as many tokens, is no difference at all."""
    coarse = judged({"coarse": scores(tokens=TOKENS // 2)}, base="two")
    contest = decide([judged({"own": scores()}), coarse], "own", {})
    assert contest.unit == BITS
    assert told(contest, "coarse").difference == pytest.approx(0.0, abs=1e-12)
    by_domain = {d: sum(s.loss_sum for s in scores() if s.domain == d) / (12 * 4 * TOKENS) for d in ("code", "prose")}
    assert told(contest, "own").loss == pytest.approx(sum(by_domain.values()) / 2 / math.log(2))
    better = decide([judged({"own": scores()}), judged({"coarse": scores(-0.1, tokens=TOKENS // 2)}, base="two")], "own", {})
    assert better.winner == "coarse"
    assert told(better, "coarse").difference == pytest.approx(-0.1 / 4 / math.log(2))


def test_rows_of_another_length_are_compared_by_what_they_gain_over_the_bare_base() -> None:
    """Longer rows see more of a document and with more before it: a candidate that learns nothing must not win by that."""
    longer = scores(-0.7, tokens=2 * TOKENS)
    contest = decide([judged({"own": scores(-0.1)}, bare=scores()), judged({"idle": longer}, bare=longer)], "own", {})
    assert contest.unit == GAIN
    assert told(contest, "own").loss == pytest.approx(-0.1)
    assert told(contest, "idle").loss == 0.0
    assert contest.winner == "own"
    eager = scores(-0.7 - 0.4, tokens=2 * TOKENS)  # 0.4 x TOKENS nats less on 2 x TOKENS tokens: 0.2 each
    contest = decide([judged({"own": scores(-0.1)}, bare=scores()), judged({"eager": eager}, bare=longer)], "own", {})
    assert contest.winner == "eager"
    assert told(contest, "eager").difference == pytest.approx(-0.2 + 0.1)


def test_only_documents_that_all_saw_alike_count() -> None:
    few = scores(-0.5, documents=DOCUMENTS[4:])
    contest = decide([judged({"own": scores()}), judged({"longer": few})], "own", {})
    assert contest.documents == len(DOCUMENTS) - 4
    assert contest.winner == "longer"
    halves = [replace(row, bytes=row.bytes // 2) if number < 6 else row for number, row in enumerate(scores(-0.5, tokens=9))]
    contest = decide([judged({"own": scores()}), judged({"other": halves}, base="two")], "own", {})
    assert (contest.winner, contest.documents, contest.unit) == ("other", len(DOCUMENTS) - 6, BITS)
    apart = scores(-0.5, documents=[("code", 100), ("prose", 100)])
    for other in (apart, scores(-0.5, tokens=9, sized=False)):
        unknown = decide([judged({"own": scores()}), judged({"stranger": other}, base="two")], "own", {})
        assert (unknown.winner, unknown.tied, unknown.documents) == ("own", True, 0)
        assert "raise probe.rows_per_domain" in unknown.sentence


def test_few_documents_prefer_nobody() -> None:
    documents = DOCUMENTS[:5]
    rows = {"own": scores(documents=documents), "best": scores(-0.5, documents=documents)}
    contest = decide([judged(rows)], "own", {})
    assert (contest.winner, contest.tied) == ("own", True)
    assert "5 shared documents are too few to prefer best" in contest.sentence


def test_where_the_first_cannot_be_tried_the_least_loss_decides() -> None:
    rows = {"fair": scores(-0.1), "best": scores(-0.2)}
    contest = decide([judged(rows)], "own", {"own": "a body needs 8 GPUs"})
    assert contest.winner == "best"
    assert "own was not judged (a body needs 8 GPUs)" in contest.sentence
    assert told(contest, "own").loss is None
    alone = decide([judged({"own": scores()})], "own", {"other": "diverged"})
    assert (alone.winner, alone.sentence) == ("own", "own: no other could be tried")
    with pytest.raises(EvaluationError, match="none of 2 blueprints could be tried: own: no room; other: diverged"):
        decide([], "own", {"own": "no room", "other": "diverged"})


def test_the_choice_is_a_pure_function_whatever_the_order() -> None:
    rows = {
        name: scores(shift, noise=0.2, seed=seed) for seed, (name, shift) in enumerate([("b", -0.2), ("own", 0), ("c", -0.1)])
    }
    forward, backward = decide([judged(rows)], "own", {}), decide([judged(dict(reversed(rows.items())))], "own", {})
    assert forward == decide([judged(rows)], "own", {})
    assert forward.winner == backward.winner
    assert {s.candidate: s for s in forward.standings} == {s.candidate: s for s in backward.standings}
    assert Contest.from_json(forward.to_json()) == forward


def test_what_tells_never_chooses() -> None:
    with pytest.raises(TypeError, match="only SelectScores choose"):
        decide([Judged("one", ReportScores({"own": scores(), "other": scores(-1.0)}))], "own", {})  # type: ignore[arg-type]
