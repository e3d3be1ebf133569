"""The order of answers, asked of Ray Tune's own ASHA: who goes on is who is best, whatever the variants are called."""

from itertools import permutations
from statistics import fmean, median
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chrysalis_ray.body.manifest import order_for
from chrysalis_ray.body.order import AnswerOrder
from chrysalis_ray.body.turn import Ask
from chrysalis_ray.config.population import Asha, Population
from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant

LOSSES = st.lists(st.floats(0.1, 20.0, allow_nan=False), min_size=1, max_size=24, unique=True)


def ask(index, chunk=0):
    name = f"v{index:03d}-x"
    variant = Variant(name, index, index, "s", "g", "b", Hyperparameters(), Epigenome({"code": 1.0}), 12, 3, 2, 16)
    return Ask(variant, "origin", f"target-{index}-{chunk}", chunk)


def go_on(order, losses, factor):
    """Indices of the variants that ASHA lets go on at a rung, heard of in this order."""
    from ray.tune.schedulers.async_hyperband import _Bracket

    bracket = _Bracket(min_t=1, max_t=8, reduction_factor=factor, s=0)
    heard = order.sort([ask(index) for index in range(len(losses))], lambda item: losses[item.variant.index])
    decisions = {
        item.variant.index: bracket.on_result(SimpleNamespace(trial_id=item.variant.variant_id), 1, -losses[item.variant.index])
        for item in heard
    }
    return {index for index, decision in decisions.items() if decision == "CONTINUE"}


def heard_in_brackets(heard, losses, brackets, factor, reports, report):
    """Indices of those whom Ray's own brackets let go on at `report`, if they are heard of in this order."""
    from ray.tune.schedulers.async_hyperband import _Bracket

    theirs = [_Bracket(min_t=1, max_t=reports, reduction_factor=factor, s=s) for s in range(max(brackets) + 1)]
    return {
        index
        for index in heard
        if theirs[brackets[index]].on_result(SimpleNamespace(trial_id=str(index)), report, -losses[index]) == "CONTINUE"
    }


@settings(deadline=None, max_examples=150)
@given(LOSSES, st.data(), st.sampled_from([2.0, 3.0]))
def test_of_several_brackets_the_best_go_on_and_hardly_anybody_else(losses, data, factor):
    """At a rung that three brackets share. Whoever is first in a bracket is never stopped, so that one more each may go on."""
    brackets = data.draw(st.lists(st.integers(0, 2), min_size=len(losses), max_size=len(losses)))
    order = AnswerOrder("halving", factor)
    heard = [
        item.variant.index
        for item in order.sort([ask(index) for index in range(len(losses))], lambda item: losses[item.variant.index])
    ]
    rung = int(factor**2)
    gone_on = heard_in_brackets(heard, losses, brackets, factor, rung * 2, rung)
    ranked = sorted(range(len(losses)), key=losses.__getitem__)
    best, others = ranked[: max(1, int(len(losses) / factor))], ranked[max(1, int(len(losses) / factor)) :]
    assert set(best) <= gone_on
    assert len(gone_on) <= len(best) + len(set(brackets)) - 1
    for index in gone_on - set(best):
        assert index == next(other for other in others if brackets[other] == brackets[index])  # the best of the rest there


@settings(deadline=None, max_examples=50)
@given(LOSSES, st.data())
def test_the_best_go_on_at_a_rung_that_one_bracket_alone_has(losses, data):
    brackets = data.draw(st.lists(st.integers(0, 1), min_size=len(losses), max_size=len(losses)))
    order = AnswerOrder("halving", 2.0)
    heard = [
        item.variant.index
        for item in order.sort([ask(index) for index in range(len(losses))], lambda item: losses[item.variant.index])
    ]
    gone_on = heard_in_brackets(heard, losses, brackets, 2.0, 8, 1)
    best = sorted(range(len(losses)), key=losses.__getitem__)[: max(1, len(losses) // 2)]
    assert set(best) <= gone_on
    assert {index for index in range(len(losses)) if brackets[index] == 1} <= gone_on  # its first rung comes later


def test_no_order_keeps_exactly_the_best_of_several_brackets():
    """The worst of four, alone in its bracket, goes on in every order there is."""
    losses, brackets = [1.0, 2.0, 3.0, 4.0], [0, 0, 0, 1]
    kept = {order: heard_in_brackets(order, losses, brackets, 2.0, 4, 2) for order in permutations(range(4))}
    assert all(3 in gone_on for gone_on in kept.values())
    assert min(map(len, (gone_on for gone_on in kept.values() if {0, 1} <= gone_on))) == 3  # the best two, and one more


@settings(deadline=None, max_examples=150)
@given(LOSSES, st.sampled_from([1.5, 2.0, 3.0, 4.0]))
def test_asha_keeps_exactly_the_best(losses, factor):
    kept = max(1, int(len(losses) / factor))
    best = set(sorted(range(len(losses)), key=losses.__getitem__)[:kept])
    assert go_on(AnswerOrder("halving", factor), losses, factor) == best


class Trial:
    def __init__(self, index):
        self.trial_id = str(index)


def median_run(by, table, grace, least):
    """Ray's own median stopping over a table of losses, report by report: who is stopped in each, and who would be if it knew
    all who report with them."""
    from ray.tune.schedulers import MedianStoppingRule

    rule = MedianStoppingRule("report", "loss", "min", grace_period=grace, min_samples_required=least, hard_stop=True)
    order = AnswerOrder(by, grace_reports=grace, min_variants=least)
    trials, live, told = [Trial(index) for index in range(len(table[0]))], set(range(len(table[0]))), []
    nobody = SimpleNamespace(get_live_trials=list)
    for chunk, losses in enumerate(table):
        heard = order.sort([ask(i, chunk) for i in sorted(live)], lambda item: table[item.chunk][item.variant.index])
        stopped = {
            item.variant.index
            for item in heard
            if rule.on_trial_result(
                nobody, trials[item.variant.index], {"report": chunk + 1, "loss": losses[item.variant.index]}
            )
            == "STOP"
        }
        means = {i: fmean(row[i] for row in table[grace - 1 : chunk + 1]) for i in live if chunk + 1 >= grace}
        bests = {i: min(row[i] for row in table[: chunk + 1]) for i in live}
        known = {i: [means[j] for j in live - {i}] for i in means}
        worse = {i for i, others in known.items() if len(others) >= least and median(others) < bests[i]}
        told.append((stopped, worse, live - worse, means))
        live -= stopped
    return told


TABLES = st.integers(1, 12).flatmap(
    lambda count: st.lists(st.lists(st.integers(1, 10**6), min_size=count, max_size=count, unique=True), min_size=1, max_size=4)
)


@settings(deadline=None, max_examples=200)
@given(TABLES, st.integers(1, 2), st.integers(1, 4))
def test_median_stopping_stops_whom_it_would_stop_if_all_came_at_once(table, grace, least):
    for stopped, worse, better, means in median_run("median", table, grace, least):
        unjudged = sorted(worse, key=lambda index: means[index])[: max(0, least - len(better))]
        assert stopped == worse - set(unjudged)  # the first that it hears of are never judged, in any order


def test_best_first_median_stopping_keeps_hardly_anybody_at_its_first_judgement():
    losses = [[float(index) for index in range(1, 13)]]
    (best_first,) = median_run("best_first", losses, 1, 3)
    (by_median,) = median_run("median", losses, 1, 3)
    assert len(best_first[0]) == 9
    assert by_median[0] == by_median[1] == {6, 7, 8, 9, 10, 11}


def test_by_variant_asha_keeps_the_first_however_bad_it_is():
    assert 0 in go_on(AnswerOrder(), [9.0, 1.0, 2.0, 3.0], 2.0)
    assert 0 not in go_on(AnswerOrder("halving"), [9.0, 1.0, 2.0, 3.0], 2.0)


def test_a_loss_that_is_no_number_is_worse_than_any():
    losses = [None, 2.0, float("nan"), 1.0]
    heard = AnswerOrder("best_first").sort([ask(index) for index in range(4)], lambda item: losses[item.variant.index])
    assert [item.variant.index for item in heard] == [3, 1, 0, 2]


def test_who_is_further_is_no_rival_and_comes_first():
    asks = [ask(0), ask(1, chunk=1), ask(2), ask(3, chunk=1)]
    losses = [5.0, 4.0, 3.0, 2.0]
    heard = AnswerOrder("best_first").sort(asks, lambda item: losses[item.variant.index])
    assert [item.variant.index for item in heard] == [3, 1, 2, 0]


@settings(deadline=None)
@given(LOSSES, st.randoms(use_true_random=False))
def test_the_order_is_a_function_of_the_results(losses, random):
    asks = [ask(index) for index in range(len(losses))]
    shuffled = asks.copy()
    random.shuffle(shuffled)
    for by in ("by_variant", "best_first", "halving", "median"):
        order = AnswerOrder(by)
        assert order.sort(asks, lambda item: losses[item.variant.index]) == order.sort(
            shuffled, lambda item: losses[item.variant.index]
        )


@pytest.mark.parametrize(
    ("scheduler", "by"),
    [
        ({"type": "fifo"}, "by_variant"),
        ({"type": "asha", "reduction_factor": 3}, "halving"),
        ({"type": "pbt", "perturb_every_reports": 1}, "best_first"),
        ({"type": "median"}, "median"),
        ({"type": "hyperband"}, "by_variant"),
    ],
)
def test_every_scheduler_has_its_order(scheduler, by):
    wanted = Population.model_validate(
        {
            "variants": 4,
            "tokens_per_variant": 100,
            "search": {"learning_rate": {"type": "log_uniform", "low": 1e-3, "high": 1e-2}},
            "epigenomes": {"type": "brightened", "level": 2.0},
            "scheduler": scheduler,
        }
    )
    order = order_for(wanted)
    assert order.by == by
    if isinstance(wanted.scheduler, Asha):
        assert order.reduction_factor == 3
