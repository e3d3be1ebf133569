"""Candidates of every kind, judged together, have the scores of each by itself; the mixture those of its mean probability."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_evaluate_heldout import TARGETS, Rows, adapters, base_model

from chrysalis_ray.evaluate.heldout import judge_pieces
from chrysalis_ray.evaluate.judging import judge_candidates, rows_at_once
from chrysalis_ray.evaluate.subjects import Candidate, blend_of, mixture_of
from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.pack import Pack

SCALE = 2.0


@pytest.fixture
def folders(tmp_path):
    """Adapters of ranks 1, 3 and 2 as PEFT folders; the last knows q_proj alone."""
    found = []
    for number, factors in enumerate(adapters()):
        rank = next(iter(factors.values()))[0].shape[0]
        own = {module: pair for module, pair in factors.items() if number < 2 or "q_proj" in module}
        targets = TARGETS if number < 2 else ("q_proj",)
        write_adapter(tmp_path / f"v{number}", AdapterWeights("base", None, rank, SCALE * rank, False, targets, own))
        found.append(str(tmp_path / f"v{number}"))
    return found


def pack(slots=2, rank=3):
    return Pack(base_model(), TARGETS, slots, rank, make_engine(0, "none", "fp32", "cpu"))


def changes(number):
    return {
        module: SCALE * (b_or @ a_ri) for module, (a_ri, b_or) in adapters()[number].items() if number < 2 or "q_proj" in module
    }


def logits_of(weights, ids):
    """Logits of the base with a weighted sum of the adapters' changes in its weights."""
    dense = copy.deepcopy(base_model())
    with torch.no_grad():
        for number, weight in enumerate(weights):
            for module, delta in changes(number).items():
                dense.get_submodule(module).weight += weight * delta
        return dense(torch.from_numpy(ids)[None]).logits[0, :-1].double()


def expected(weights, texts, key):
    """Loss sum, tokens, bytes and hits of one document, by hand."""
    loss, tokens, size, hits = 0.0, 0, 0, 0
    for ids in texts[key]:
        logits, labels = logits_of(weights, ids), torch.from_numpy(ids[1:])
        loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        tokens, size = tokens + len(labels), size + sum(1 + label % 3 for label in labels.tolist())
        hits += int((logits.argmax(-1) == labels).sum())
    return loss, tokens, size, hits


def test_every_kind_of_candidate_has_the_scores_it_has_alone(folders):
    candidates = [
        Candidate("seed"),
        mixture_of("together", folders),
        *(Candidate(f"v{number}", folder) for number, folder in enumerate(folders)),
        blend_of("mean", folders),
        Candidate("odd", None, ((folders[0], 1.5), (folders[1], -0.5)), "blend"),
    ]
    rows = judge_candidates(pack(), Rows(), candidates, "select", 9)
    texts = Rows().texts
    assert list(rows) == [each.name for each in candidates]
    weights = {"seed": (0, 0, 0), "v0": (1, 0, 0), "v1": (0, 1, 0), "v2": (0, 0, 1)}
    for name, own in {**weights, "mean": (1 / 3,) * 3, "odd": (1.5, -0.5, 0)}.items():
        assert [(row[0], row[1]) for row in rows[name]] == sorted(texts)
        for domain, document, *told in rows[name]:
            loss, *counted = expected(own, texts, (domain, document))
            assert told[0] == pytest.approx(loss, rel=1e-5)
            assert told[1:] == counted
    for domain, document, loss, tokens, size, hits in rows["together"]:
        mixtures = [
            (torch.stack([logits_of(own, ids).softmax(-1) for own in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]).mean(0), ids[1:])
            for ids in texts[domain, document]
        ]
        likelihoods = [mixture[range(len(labels)), labels] for mixture, labels in mixtures]
        assert loss == pytest.approx(-sum(float(own.log().sum()) for own in likelihoods), rel=1e-5)
        right = sum(int((mixture.argmax(-1) == torch.from_numpy(labels)).sum()) for mixture, labels in mixtures)
        assert (tokens, size, hits) == (*expected((0, 0, 0), texts, (domain, document))[1:3], right)


def test_a_mixture_judges_members_that_nobody_asked_for(folders):
    alone = judge_candidates(pack(), Rows(), [mixture_of("together", folders)], "select", 9)
    beside = judge_candidates(pack(3), Rows(), [Candidate("x", folders[1]), mixture_of("together", folders)], "select", 9)
    assert list(alone) == ["together"]
    twice = judge_candidates(
        pack(2), Rows(), [Candidate("x", folders[1]), Candidate("y", folders[1]), mixture_of("together", folders)], "select", 9
    )
    for one, other in zip(alone["together"], twice["together"], strict=True):
        assert one[2] == pytest.approx(other[2], rel=1e-6)  # whom two names mean is heard once
    for one, other in zip(alone["together"], beside["together"], strict=True):
        assert one[2] == pytest.approx(other[2], rel=1e-6)


def test_an_adapter_of_a_higher_rank_than_the_bank_is_judged_all_the_same(folders):
    narrow, wide = (judge_candidates(pack(2, rank), Rows(), [Candidate("v1", folders[1])], "select", 9) for rank in (2, 3))
    for one, other in zip(narrow["v1"], wide["v1"], strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], rel=1e-6)


def test_more_candidates_than_lanes_come_in_turns(folders, monkeypatch):
    passes = []

    def counted(engine, score, tokens, split, rows, batch_rows, hear, keep):
        found = judge_pieces(engine, score, tokens, split, rows, batch_rows, hear, keep)
        passes.append((len(found[0][5]), batch_rows))
        return found

    monkeypatch.setattr("chrysalis_ray.evaluate.judging.judge_pieces", counted)
    monkeypatch.setattr("chrysalis_ray.evaluate.judging.LANE_TOKENS", 1)
    weights = [share / 20 for share in range(20)]
    blends = [Candidate(str(w), None, ((folders[0], w), (folders[1], 1 - w)), "blend") for w in weights]
    rows = judge_candidates(pack(2), Rows(), [Candidate("v1", folders[1]), *blends], "select", 9)
    assert passes == [(1, 8), (16, 1), (4, 4)]
    for one, other in zip(rows["0.0"], rows["v1"], strict=True):
        assert one[2] == pytest.approx(other[2], rel=1e-6)
    assert not math.isclose(rows["0.95"][0][2], rows["0.0"][0][2], rel_tol=1e-4)


@pytest.mark.parametrize(("length", "lanes", "rows"), [(64, "compacted", 32), (512, "compacted", 8), (64, "fixed", 8)])
def test_short_rows_come_many_at_a_time_where_candidates_take_turns(length, lanes, rows):
    own = Pack(base_model(), TARGETS, 2, 3, make_engine(0, "none", "fp32", "cpu"), lanes)
    assert rows_at_once(own, 8, length) == rows


def test_a_base_that_is_called_for_all_lanes_at_once_gets_no_more_rows(monkeypatch):
    """A sharded base on CPUs computes all lanes together: more rows would take so much more memory."""
    engine = make_engine(0, "none", "fp32", "cpu")
    monkeypatch.setattr(engine, "copyable", False, raising=False)
    assert rows_at_once(Pack(base_model(), TARGETS, 2, 3, engine), 8, 64) == 8
