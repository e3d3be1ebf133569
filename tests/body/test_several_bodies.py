"""Several bodies under one omega: a turn is dealt to them, and one that dies loses its part of one turn and nothing else."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_omega_promises import CountingBody, trial, variants

from chrysalis_ray.body.omega import Omega
from chrysalis_ray.body.roster import parts_of
from chrysalis_ray.body.turn import Candidate, Outcome, Turn, Work, first_position
from chrysalis_ray.core.errors import BodyError
from chrysalis_ray.core.store import Store
from chrysalis_ray.evaluate.subjects import Comparing


def make(tmp_path, people, bodies, slots=8):
    return Omega(str(tmp_path / "store"), str(tmp_path / "weave.jsonl"), people, slots, 20.0, bodies=bodies)


@given(count=st.integers(1, 40), bodies=st.integers(1, 9))
def test_every_variant_is_dealt_once_in_order_and_evenly(count, bodies):
    turn = Turn(3, "train", work=tuple(Work(variant, "o", f"t{variant.index}", 0, None) for variant in variants(count)))
    parts = parts_of(turn, bodies)
    assert tuple(item for body in sorted(parts) for item in parts[body].work) == turn.work
    assert max(len(part.work) for part in parts.values()) == -(-count // bodies)
    assert all(part.number == 3 and part.work for part in parts.values())
    assert parts_of(Turn(4, "dissolve"), bodies).keys() == set(range(bodies))


@given(count=st.integers(1, 40), bodies=st.integers(1, 9), compared=st.booleans())
def test_candidates_are_dealt_like_variants_but_those_to_compare_stay_together(count, bodies, compared):
    compare = Comparing("agreement.json", {"c0": ("c0",)}) if compared else None
    candidates = (*(Candidate(f"c{number}") for number in range(count)), Candidate("mixture", made="mixture", compare=compare))
    parts = parts_of(Turn(5, "judge", candidates=candidates), bodies)
    assert tuple(each for body in sorted(parts) for each in parts[body].candidates) == candidates
    assert max(len(part.candidates) for part in parts.values()) == (count + 1 if compared else -(-(count + 1) // bodies))


def grown(tmp_path, bodies, people=5, chunks=3, deaths=()):
    """What every body trained, and the positions of the trials."""

    async def story():
        everyone = variants(people)
        omega = make(tmp_path, everyone, bodies)
        await omega.start()
        living = [CountingBody(omega, number) for number in range(bodies)]
        lives = [asyncio.create_task(body.live(die_before_commit=dict(deaths).get(body.number))) for body in living]
        heard: list = []
        trials = asyncio.gather(*(trial(omega, variant, chunks, heard) for variant in everyone))
        for number in dict(deaths):
            await lives[number]
            living.append(CountingBody(omega, number))
            lives.append(asyncio.create_task(living[-1].live()))
        positions = await asyncio.wait_for(trials, 20)
        scores = await omega.judge([Candidate(f"c{index}", None) for index in range(3)], "select", 1)
        await omega.dissolve()
        await asyncio.wait_for(asyncio.gather(*lives), 5)
        return [body.turns for body in living], positions, heard, scores

    return asyncio.run(story())


def test_two_bodies_share_every_turn_and_the_trials_cannot_tell(tmp_path):
    (first, second), positions, heard, scores = grown(tmp_path / "two", bodies=2)
    assert [[name for name, *_ in turn] for turn in first] == [["v0", "v1"]] * 3
    assert [[name for name, *_ in turn] for turn in second] == [["v2", "v3", "v4"]] * 3
    _, alone, heard_alone, _ = grown(tmp_path / "one", bodies=1)
    assert positions == alone
    assert heard == heard_alone
    assert sorted(scores) == ["c0", "c1", "c2"]
    assert len(Store(tmp_path / "two" / "store").cuts()) == 3


def test_a_body_that_dies_does_its_own_part_again_and_the_others_wait_with_theirs(tmp_path):
    (first, second, reborn), positions, _, _ = grown(tmp_path / "died", bodies=2, deaths=((1, 2),))
    assert len(first) == 3
    assert len(second) == 2
    assert reborn[0] == second[1]
    assert len(second) - 1 + len(reborn) == 3
    assert positions == grown(tmp_path / "alive", bodies=2)[1]


def test_more_bodies_than_variants_leave_some_without_work(tmp_path):
    turns, positions, _, _ = grown(tmp_path, bodies=4, people=2)
    assert [len(body) for body in turns] == [0, 3, 0, 3]
    assert len(positions) == 2


def test_no_cut_is_written_before_the_last_part_is_in(tmp_path):
    async def story():
        people = variants(2)
        omega = make(tmp_path, people, bodies=2)
        await omega.start()
        asking = [asyncio.create_task(omega.advance(variant, first_position(variant), 0)) for variant in people]
        lives = [await omega.hello(1, 0, "node", body) for body in range(2)]
        parts = [await omega.next_turn(life, -1) for life in lives]

        async def hand_in(index):
            outcomes = [Outcome(w.target, omega.store.put(w.target.encode()), {"state": "training"}) for w in parts[index].work]
            await omega.commit(lives[index], parts[index].number, outcomes, 1.0)

        await hand_in(1)
        await asyncio.sleep(0.05)
        assert Store(tmp_path / "store").cuts() == []
        with pytest.raises(BodyError, match="nothing of it is left"):
            await hand_in(1)
        await hand_in(0)
        answers = await asyncio.wait_for(asyncio.gather(*asking[:1]), 5)
        assert answers[0].chunk == 1
        assert len(Store(tmp_path / "store").cuts()) == 1
        for task in asking:
            task.cancel()

    asyncio.run(story())


def test_a_stranger_is_turned_away(tmp_path):
    async def story():
        omega = make(tmp_path, variants(1), bodies=2)
        with pytest.raises(BodyError, match="numbered 2"):
            await omega.hello(1, 0, "node", 2)

    asyncio.run(story())
