"""Run-ahead: bodies train what will be asked next while Tune still decides, and nobody's outcome changes by it."""

import asyncio
from dataclasses import replace

from test_omega_promises import CountingBody, trial, variants

from chrysalis_ray.body.omega import Omega
from chrysalis_ray.body.turn import first_position, next_position
from chrysalis_ray.core.records import Variant


def make(tmp_path, people, run_ahead=True):
    return Omega(str(tmp_path / "store"), str(tmp_path / "weave.jsonl"), people, 8, 20.0, run_ahead=run_ahead)


def play(tmp_path, run_ahead, stops=(), chunks=4, turns=10_000):
    async def story():
        people = variants(3)
        omega = make(tmp_path, people, run_ahead)
        await omega.start()
        body = CountingBody(omega)
        life = asyncio.create_task(body.live(turns))
        heard: list = []
        told = asyncio.gather(*(trial(omega, v, chunks, heard, dict(stops).get(v.variant_id)) for v in people))
        positions = await asyncio.wait_for(told, 20)
        summary = await omega.summary()
        kept = {name: omega.store.holds(row["seed"]) for name, row in summary.items()}
        await omega.dissolve()
        await asyncio.wait_for(life, 5)
        return body.turns, heard, positions, summary, kept

    return asyncio.run(story())


def test_the_next_turn_is_trained_before_the_first_decision(tmp_path):
    async def story():
        people = variants(2)
        omega = make(tmp_path, people)
        await omega.start()
        life = asyncio.create_task(CountingBody(omega).live())
        first = asyncio.create_task(omega.advance(people[0], first_position(people[0]), 0))
        second = asyncio.create_task(omega.advance(people[1], first_position(people[1]), 0))
        answer = await asyncio.wait_for(first, 5)
        following = next_position(answer.position, people[0])
        while following not in omega.known:  # nobody has asked for it
            await asyncio.sleep(0.01)
        assert not second.done()
        again = asyncio.create_task(omega.advance(people[0], answer.position, 1))
        assert (await asyncio.wait_for(second, 5)).chunk == 1
        await omega.detach("v1")
        await omega.conclude("v1", "stopped", None)
        assert (await asyncio.wait_for(again, 5)).position == following
        life.cancel()

    asyncio.run(story())


def test_positions_and_packs_are_those_of_waiting(tmp_path):
    ahead, waiting = (play(tmp_path / str(way), way) for way in (True, False))
    assert ahead[0] == waiting[0]
    assert ahead[1] == waiting[1]
    assert ahead[2] == waiting[2]


def test_who_is_stopped_rests_where_its_trial_heard_of_last(tmp_path):
    turns, _, positions, summary, kept = play(tmp_path / "ahead", True, stops=(("v1", 1),), chunks=6)
    assert [len(turn) for turn in turns] == [3, 3, 2, 2, 2, 2]  # v1 trained one chunk in vain
    assert summary["v1"]["chunks"] == 1
    assert summary["v1"]["position"] == positions[1]
    assert kept == {"v0": True, "v1": True, "v2": True}
    assert positions == play(tmp_path / "waiting", False, stops=(("v1", 1),), chunks=6)[2]


def test_another_learning_rate_is_trained_after_what_was_foreseen(tmp_path):
    async def story():
        people = variants(2)
        omega = make(tmp_path, people)
        await omega.start()
        body = CountingBody(omega)
        life = asyncio.create_task(body.live())

        async def follow(variant: Variant, changes: bool):
            position, now = first_position(variant), variant
            for chunk in range(3):
                answer = await omega.advance(now, position, chunk)
                position = answer.position
                if changes and chunk == 0:
                    now = replace(now, hyperparameters=replace(now.hyperparameters, learning_rate=0.5))
            await omega.detach(variant.variant_id)
            await omega.conclude(variant.variant_id, "finished", None)
            return position

        ends = await asyncio.wait_for(asyncio.gather(follow(people[0], False), follow(people[1], True)), 10)
        life.cancel()
        return [[(name, chunk) for name, chunk, _ in turn] for turn in body.turns], ends

    turns, ends = asyncio.run(story())
    assert turns[:3] == [[("v0", 0), ("v1", 0)], [("v0", 1), ("v1", 1)], [("v1", 1)]]
    assert turns[3] == [("v0", 2), ("v1", 2)]
    assert len(set(ends)) == 2


def test_a_run_that_is_killed_while_ahead_goes_on_from_its_cuts(tmp_path):
    whole = play(tmp_path / "whole", True)

    async def killed():
        people = variants(3)
        omega = make(tmp_path / "killed", people)
        await omega.start()
        life = asyncio.create_task(CountingBody(omega).live())
        asks = [asyncio.create_task(omega.advance(v, first_position(v), 0)) for v in people]
        await asyncio.wait_for(asks[0], 5)
        while len(omega.known) < 6:
            await asyncio.sleep(0.01)
        for task in (*asks, life):
            task.cancel()

    asyncio.run(killed())
    resumed = play(tmp_path / "killed", True)
    assert resumed[2] == whole[2]
    assert [[name for name, *_ in turn] for turn in resumed[0]] == [["v0", "v1", "v2"]] * 2
