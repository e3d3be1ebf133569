"""How far candidates predict from what their members do equals what plain transformers and PEFT say of their logits."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_evaluate_heldout import TARGETS, Rows, adapters, base_model

from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.evaluate.agreement import MEASURES, ReportAgreements, SelectAgreements, agreement_sentence, too_far
from chrysalis_ray.evaluate.bootstrap import resampled_losses
from chrysalis_ray.evaluate.judging import judge_candidates
from chrysalis_ray.evaluate.subjects import Candidate, Comparing, mixture_of
from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter
from chrysalis_ray.training.agreement import compare_logits
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.pack import Pack

VARIANTS = ("v0", "v1", "v2")
SEVERAL = {"seed": VARIANTS, "v1": VARIANTS, "mean": VARIANTS, "pair": ("v0", "v2")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three variants of ranks 1, 3, 2, the exact mean of them, of rank 6, and that of two, as PEFT folders by name."""
    root = tmp_path_factory.mktemp("adapters")

    def write(name, weighted):
        modules = adapters()[0]
        factors = {
            module: (
                torch.cat([own[module][0] for own, _ in weighted]),
                torch.cat([own[module][1] * weight for own, weight in weighted], 1),
            )
            for module in modules
        }
        rank = next(iter(factors.values()))[0].shape[0]
        write_adapter(root / name, AdapterWeights("base", None, rank, 2.0 * rank, False, TARGETS, factors))
        return str(root / name)

    own = adapters()
    found = {name: write(name, [(factors, 1.0)]) for name, factors in zip(VARIANTS, own, strict=True)}
    found["mean"] = write("mean", [(factors, 1 / 3) for factors in own])
    found["pair"] = write("pair", [(factors, 1 / 2) for factors in (own[0], own[2])])
    return found


def compared(folders, file, slots=2, lanes="compacted", split="select"):
    pack = Pack(base_model(), TARGETS, slots, 3, make_engine(0, "none", "fp32", "cpu"), lanes)
    candidates = [Candidate("seed"), *(Candidate(name, folder) for name, folder in folders.items())]
    asked = Comparing(str(file), SEVERAL)
    return judge_candidates(
        pack, Rows(), [*candidates, mixture_of("together", [folders[name] for name in VARIANTS], asked)], split, 9
    )


@functools.cache
def plain(folder):
    model = copy.deepcopy(base_model())
    return model if folder is None else PeftModel.from_pretrained(model, folder).eval()


def logs_of(folder, ids):
    """Log-probabilities that plain PEFT has, [tokens, vocabulary] in fp64."""
    model = plain(folder)
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1].double().log_softmax(-1)


def by_hand(candidate, folders, ids):
    """The measures of a piece of a document, summed over its tokens, then KL and agreements by member: loops, no algebra."""
    own = logs_of(folders.get(candidate), ids)
    members = [logs_of(folders[name], ids) for name in SEVERAL[candidate]]
    mixture = sum(each.exp() for each in members) / len(members)
    sums = dict.fromkeys(MEASURES, 0.0)
    apart, agreed = [0.0] * len(members), [0] * len(members)
    for token in range(len(ids) - 1):
        choices = [int(each[token].argmax()) for each in members]
        choice = int(own[token].argmax())
        for place, each in enumerate(members):
            apart[place] += float((each[token].exp() * (each[token] - own[token])).sum())
            agreed[place] += choices[place] == choice
            sums["spread"] += float((each[token].exp() * (each[token] - mixture[token].log())).sum()) / len(members)
        sums["as_mixture"] += int(mixture[token].argmax()) == choice
        most = [token for token in set(choices) if choices.count(token) > len(choices) / 2]
        sums["majorities"] += len(most)
        sums["as_majority"] += most == [choice]
    sums["divergence"], sums["agreed"] = sum(apart) / len(members), sum(agreed) / len(members)
    return np.array([*sums.values(), *apart, *agreed])


@pytest.fixture(scope="module")
def expected(folders):
    """By candidate and document: tokens and measures."""
    return {
        name: {
            key: (sum(len(ids) - 1 for ids in pieces), sum(by_hand(name, folders, ids) for ids in pieces))
            for key, pieces in Rows().texts.items()
        }
        for name in SEVERAL
    }


@pytest.mark.parametrize(
    ("slots", "lanes", "kept", "fewest"),
    [(2, "compacted", 1 << 30, 256), (8, "compacted", 1, 256), (4, "fixed", 30_000, 256), (3, "compacted", 1 << 30, 1)],
)
def test_what_is_told_is_what_plain_peft_says_of_the_logits(
    folders, expected, tmp_path, monkeypatch, slots, lanes, kept, fewest
):
    monkeypatch.setattr("chrysalis_ray.evaluate.listener.most_kept", lambda on_gpu: kept)
    monkeypatch.setattr("chrysalis_ray.training.folded.FEWEST", fewest)  # 1: candidates one after the other, worn by the base
    compared(folders, tmp_path / "a.json", slots, lanes)
    found = SelectAgreements.load(tmp_path / "a.json")
    assert {name: set(members) for name, members in found.members.items()} == {n: set(own) for n, own in SEVERAL.items()}
    for name, documents in expected.items():
        assert {(row[0], row[1]) for row in found.documents[name]} == documents.keys()
        for domain, document, tokens, *sums in found.documents[name]:
            count, told = documents[domain, document]
            assert tokens == count
            np.testing.assert_allclose(sums, told[: len(MEASURES)], rtol=1e-4, atol=1e-5)
        for place, member in enumerate(SEVERAL[name]):
            apart, agreed = (
                np.mean(
                    [
                        sum(told[at] for (where, _), (_, told) in documents.items() if where == domain)
                        / sum(count for (where, _), (count, _) in documents.items() if where == domain)
                        for domain in ("a", "b")
                    ]
                )
                for at in (len(MEASURES) + place, len(MEASURES) + len(SEVERAL[name]) + place)
            )
            assert found.by_member[name][member]["divergence"] == pytest.approx(apart, rel=1e-4, abs=1e-6)
            assert found.by_member[name][member]["agreement"] == pytest.approx(agreed)
    assert found.by_member["v1"]["v1"] == {"divergence": pytest.approx(0.0, abs=1e-6), "agreement": 1.0}


def test_losses_are_the_same_whether_anybody_listens_or_not(folders, tmp_path):
    heard = compared(folders, tmp_path / "a.json")
    pack = Pack(base_model(), TARGETS, 2, 3, make_engine(0, "none", "fp32", "cpu"))
    candidates = [Candidate("seed"), *(Candidate(name, folder) for name, folder in folders.items())]
    assert {name: rows for name, rows in heard.items() if name != "together"} == judge_candidates(
        pack, Rows(), candidates, "select", 9
    )


def test_what_is_told_of_a_candidate_is_the_mean_over_domains_by_tokens(folders, expected, tmp_path):
    compared(folders, tmp_path / "a.json")
    found = SelectAgreements.load(tmp_path / "a.json")

    def macro(place, name="mean"):
        shares = []
        for domain in ("a", "b"):
            own = [told for (where, _), told in expected[name].items() if where == domain]
            shares.append(sum(sums[place] for _, sums in own) / sum(count for count, _ in own))
        return np.mean(shares)

    told = found.tell("mean", 400, 0.9, 0)
    apart, spread, agreed, as_mixture, _, majorities = (macro(place) for place in range(len(MEASURES)))
    assert told["divergence"]["mean"] == pytest.approx(apart, rel=1e-4) == found.divergence("mean")
    assert told["beyond_spread"]["mean"] == pytest.approx(apart - spread, rel=1e-3, abs=1e-6)
    assert (told["spread"], told["majorities"]) == (pytest.approx(spread, rel=1e-4), pytest.approx(majorities))
    assert (told["agreement"]["mean"], told["with_mixture"]["mean"]) == (pytest.approx(agreed), pytest.approx(as_mixture))
    for name in ("divergence", "beyond_spread", "agreement", "with_mixture"):
        assert told[name]["low"] < told[name]["mean"] < told[name]["high"]
    sentence = agreement_sentence("mean", told)
    for number in (f"{told['divergence']['mean']:.4f} nats", f"{told['agreement']['mean']:.1%} of the tokens"):
        assert number in sentence
    assert sentence.startswith("Compared with 3 variants, KL(variant || mean) is")
    assert agreement_sentence("v1", told).startswith("Compared with 3 variants, itself among them, KL(variant || v1) is")


def test_an_interval_far_out_is_of_as_many_draws_as_it_needs(folders, tmp_path, monkeypatch):
    file, drawn = tmp_path / "agreement.json", []
    compared(folders, file)

    def counted(losses_CD, tokens_D, domains_D, samples, rng_seed):
        drawn.append(samples)
        return resampled_losses(losses_CD, tokens_D, domains_D, samples, rng_seed)

    monkeypatch.setattr("chrysalis_ray.evaluate.agreement.resampled_losses", counted)
    for confidence in (0.95, 0.999):
        SelectAgreements.load(file).tell("mean", 2000, confidence, 0)
    assert drawn == [2000, 20_000]


def test_a_merge_too_far_from_its_members_is_refused_on_select_alone(folders, tmp_path):
    compared(folders, tmp_path / "a.json")
    found = SelectAgreements.load(tmp_path / "a.json")
    apart = found.divergence("mean")
    assert too_far(found, ["mean"], apart + 1e-9) == {}
    refused = too_far(found, ["mean", "absent"], apart - 1e-9)
    assert list(refused) == ["mean", "absent"]
    assert f"{apart:.4f}" in refused["mean"]
    with pytest.raises(EvaluationError, match="'select'"):
        ReportAgreements.load(tmp_path / "a.json")
    told = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps(told | {"split": "report"}))
    with pytest.raises(TypeError, match="SelectAgreements"):
        too_far(ReportAgreements.load(tmp_path / "r.json"), ["mean"], 1.0)


@pytest.mark.parametrize("written", ["", "[]", "{}", '{"split": "select", "members": {}, "documents": {"x": [["a", 1, 2]]}}'])
def test_a_file_that_holds_no_agreements_is_named(tmp_path, written):
    (tmp_path / "a.json").write_text(written)
    with pytest.raises(EvaluationError, match=r"a\.json"):
        SelectAgreements.load(tmp_path / "a.json")


def test_what_is_not_judged_cannot_be_compared(folders, tmp_path):
    pack = Pack(base_model(), TARGETS, 2, 3, make_engine(0, "none", "fp32", "cpu"))
    asked = Comparing(str(tmp_path / "a.json"), {"mean": ("v0", "v9")})
    candidates = [Candidate("v0", folders["v0"]), Candidate("mean", folders["mean"]), mixture_of("m", [folders["v0"]], asked)]
    with pytest.raises(EvaluationError, match="v9"):
        judge_candidates(pack, Rows(), candidates, "select", 9)
    assert not (tmp_path / "a.json").exists()


def test_one_that_is_no_number_is_left_out(folders, tmp_path):
    broken = AdapterWeights(
        "base", None, 1, 2.0, False, TARGETS, {name: (a * 1e30, b * 1e30) for name, (a, b) in adapters()[0].items()}
    )
    write_adapter(tmp_path / "broken", broken)
    pack = Pack(base_model(), TARGETS, 2, 3, make_engine(0, "none", "fp32", "cpu"))
    asked = Comparing(str(tmp_path / "a.json"), {"v1": ("v0", "v1"), "broken": ("v0", "v1")})
    members = [folders["v0"], folders["v1"]]
    candidates = [
        Candidate("v0", members[0]), Candidate("v1", members[1]), Candidate("broken", str(tmp_path / "broken")),
        mixture_of("m", members, asked),
    ]  # fmt: skip
    judge_candidates(pack, Rows(), candidates, "select", 9)
    assert list(SelectAgreements.load(tmp_path / "a.json").documents) == ["v1"]


def _worker(rank, folders, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
    compared(folders, Path(out) / "both.json")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_find_together_what_one_finds(folders, tmp_path):
    mp.spawn(_worker, args=(folders, str(tmp_path)), nprocs=2)
    compared(folders, tmp_path / "one.json")
    both, one = (SelectAgreements.load(tmp_path / f"{name}.json") for name in ("both", "one"))
    for name, rows in one.documents.items():
        assert [row[:3] for row in both.documents[name]] == [row[:3] for row in rows]
        np.testing.assert_allclose([row[3:] for row in both.documents[name]], [row[3:] for row in rows], rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 30), st.floats(0.01, 30.0), st.integers(0, 2**20))
def test_divergences_are_those_of_the_formula_and_of_the_identity(members, others, words, scale, rng_seed):
    logits = torch.randn(members + others, 3, words, generator=torch.Generator().manual_seed(rng_seed)).double() * scale
    group = list(range(0, members, 2))
    found = compare_logits(logits.transpose(0, 1).contiguous(), range(members), [list(range(members)), group])
    logs = logits.log_softmax(-1)
    for one in range(members):
        for other in range(members + others):
            apart = (logs[one].exp() * (logs[one] - logs[other])).sum(-1)
            torch.testing.assert_close(found.divergence_MCK[one, other], apart, rtol=1e-12, atol=1e-12)
    for place, own in enumerate((list(range(members)), group)):
        mixture = logs[own].exp().mean(0)
        # mean KL(member || candidate) = KL(mixture || candidate) + spread
        for candidate in range(members + others):
            whole = torch.special.xlogy(mixture, mixture).sum(-1) - (mixture * logs[candidate]).sum(-1)
            beyond = found.divergence_MCK[own, candidate].mean(0) - found.spread_GK[place]
            torch.testing.assert_close(beyond, whole, rtol=1e-10, atol=1e-11)
        assert bool((found.spread_GK[place] >= -1e-12).all())
        torch.testing.assert_close(found.mixture_GK[place], mixture.argmax(-1))
    torch.testing.assert_close(found.likeliest_CK, logits.argmax(-1))
