"""Omega without Ray: the same class, its methods awaited on one event loop, with a real store and a body that only counts."""

import asyncio

import pytest

from chrysalis_ray.body.omega import Omega
from chrysalis_ray.body.turn import Candidate, Outcome, first_position, next_position
from chrysalis_ray.core.errors import BodyError, VariantLost
from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant
from chrysalis_ray.core.store import Store


def variants(count):
    return [
        Variant(
            f"v{i}", i, i, "s", "g", "b", Hyperparameters(learning_rate=1e-3 * (i + 1)), Epigenome({"code": 1.0}), 12, 3, 2, 16
        )
        for i in range(count)
    ]


class CountingBody:
    """Takes turns like a worker of rank 0 and remembers what was in them."""

    def __init__(self, omega, number=0):
        self.omega, self.number, self.turns, self.store = omega, number, [], omega.store

    async def live(self, turns=10_000, die_before_commit=None):
        epoch = await self.omega.hello(1, 0, "node", self.number)
        number = -1
        for _ in range(turns):
            turn = await self.omega.next_turn(epoch, number)
            number = turn.number
            if turn.kind == "dissolve":
                return
            if turn.kind == "judge":
                await self.omega.judged(epoch, number, {c.name: [("code", 0, 1.0, 2)] for c in turn.candidates})
                continue
            self.turns.append([(w.variant.variant_id, w.chunk, w.seed) for w in turn.work])
            if die_before_commit == len(self.turns):
                return
            outcomes = [
                Outcome(w.target, self.store.put(w.target.encode()), {"state": "training", "select_loss": 1.0})
                for w in turn.work
            ]
            await self.omega.commit(epoch, number, outcomes, 0.0)


async def trial(omega, variant, chunks, heard, stop_after=None):
    position = first_position(variant)
    for chunk in range(chunks):
        answer = await omega.advance(variant, position, chunk)
        heard.append((variant.variant_id, answer.chunk))
        position = answer.position
        if stop_after == answer.chunk:
            break
    await omega.detach(variant.variant_id)
    await omega.conclude(variant.variant_id, "finished" if chunks == answer.chunk else "stopped", None)
    return position


def make(tmp_path, people, slots=8, linger=20.0):
    return Omega(str(tmp_path / "store"), str(tmp_path / "weave.jsonl"), people, slots, linger)


def play(tmp_path, count=3, slots=8, stops=(), chunks=4):
    async def story():
        people = variants(count)
        omega = make(tmp_path, people, slots)
        await omega.start()
        body = CountingBody(omega)
        life = asyncio.create_task(body.live())
        heard: list = []
        gate = asyncio.Semaphore(slots)

        async def run(variant):
            async with gate:
                return await trial(omega, variant, chunks, heard, dict(stops).get(variant.variant_id))

        positions = await asyncio.wait_for(asyncio.gather(*(run(v) for v in reversed(people))), 20)
        summary = await omega.summary()
        await omega.dissolve()
        await asyncio.wait_for(life, 5)
        return body.turns, heard, positions, summary

    return asyncio.run(story())


def test_a_turn_packs_every_live_variant_and_answers_leave_in_order(tmp_path):
    turns, heard, _, summary = play(tmp_path)
    assert [[name for name, _, _ in turn] for turn in turns] == [["v0", "v1", "v2"]] * 4
    assert heard == [(f"v{i}", chunk) for chunk in range(1, 5) for i in range(3)]
    assert {row["state"] for row in summary.values()} == {"finished"}
    assert {row["chunks"] for row in summary.values()} == {4}


def test_a_stopped_variant_leaves_the_pack(tmp_path):
    turns, _, _, summary = play(tmp_path, stops=(("v1", 2),))
    assert [[name for name, _, _ in turn] for turn in turns] == [["v0", "v1", "v2"]] * 2 + [["v0", "v2"]] * 2
    assert summary["v1"]["state"] == "stopped"
    assert summary["v1"]["chunks"] == 2


def test_more_variants_than_slots_take_turns(tmp_path):
    turns, _, _, summary = play(tmp_path, count=5, slots=2)
    assert max(len(turn) for turn in turns) == 2
    assert sum(len(turn) for turn in turns) == 5 * 4
    assert {row["state"] for row in summary.values()} == {"finished"}


def test_a_second_run_is_answered_from_the_cuts_without_training(tmp_path):
    _, first_heard, first, _ = play(tmp_path, stops=(("v1", 2),))
    turns, heard, again, _ = play(tmp_path, stops=(("v1", 2),))
    assert turns == []
    assert heard == first_heard
    assert again == first


def test_a_body_that_dies_before_the_commit_leaves_nothing_and_the_next_life_does_it_again(tmp_path):
    async def story():
        people = variants(2)
        omega = make(tmp_path, people)
        await omega.start()
        heard: list = []
        trials = asyncio.gather(*(trial(omega, v, 3, heard) for v in people))
        first, second = CountingBody(omega), CountingBody(omega)
        await first.live(die_before_commit=2)
        assert len(Store(tmp_path / "store").cuts()) == 1
        life = asyncio.create_task(second.live())
        await asyncio.wait_for(trials, 20)
        await omega.dissolve()
        await life
        return first.turns, second.turns

    first, second = asyncio.run(story())
    assert second[0] == first[1]
    assert [chunk for _, chunk, _ in second[-1]] == [2, 2]


def test_a_worker_of_an_older_life_is_turned_away(tmp_path):
    async def story():
        people = variants(1)
        omega = make(tmp_path, people)
        await omega.start()
        asking = asyncio.create_task(omega.advance(people[0], first_position(people[0]), 0))
        old = await omega.hello(1, 0, "node")
        turn = await omega.next_turn(old, -1)
        await omega.hello(1, 1, "node")
        outcome = Outcome(turn.work[0].target, omega.store.put(b"x"), {"state": "training"})
        with pytest.raises(BodyError, match="life 2"):
            await omega.commit(old, turn.number, [outcome], 0.0)
        with pytest.raises(BodyError, match="life 1"):
            await omega.next_turn(old, -1)
        asking.cancel()

    asyncio.run(story())


def test_a_restarted_trial_hears_the_old_answers_at_once(tmp_path):
    async def story():
        people = variants(2)
        omega = make(tmp_path, people)
        await omega.start()
        life = asyncio.create_task(CountingBody(omega).live())
        heard: list = []
        other = asyncio.create_task(trial(omega, people[1], 3, heard))
        # v0's process dies with the answer in its hands, is born again and starts from the beginning
        await omega.advance(people[0], first_position(people[0]), 0)
        await asyncio.wait_for(trial(omega, people[0], 3, heard), 5)
        await asyncio.wait_for(other, 5)
        assert heard == [("v0", 1), ("v1", 1), ("v0", 2), ("v1", 2), ("v0", 3), ("v1", 3)]
        life.cancel()

    asyncio.run(story())


def test_a_clone_starts_from_the_donors_seed(tmp_path):
    async def story():
        people = variants(2)
        omega = make(tmp_path, people)
        await omega.start()
        body = CountingBody(omega)
        life = asyncio.create_task(body.live())
        donor: asyncio.Future = asyncio.get_running_loop().create_future()

        async def follow(variant):
            answer = await omega.advance(variant, first_position(variant), 0)
            if variant.index == 0:
                donor.set_result(answer.position)
            await omega.advance(variant, await donor, 1)
            await omega.conclude(variant.variant_id, "finished", None)

        await asyncio.wait_for(asyncio.gather(*(follow(v) for v in people)), 10)
        life.cancel()
        return body.turns, omega.known[await donor].seed

    turns, seed = asyncio.run(story())
    assert [blob for _, _, blob in turns[1]] == [seed, seed]


def test_an_unknown_position_is_refused_and_the_others_go_on(tmp_path):
    async def story():
        people = variants(2)
        omega = make(tmp_path, people)
        await omega.start()
        life = asyncio.create_task(CountingBody(omega).live())
        bad, good = await asyncio.wait_for(
            asyncio.gather(
                omega.advance(people[0], "0" * 32, 3),
                omega.advance(people[1], first_position(people[1]), 0),
                return_exceptions=True,
            ),
            10,
        )
        life.cancel()
        assert isinstance(bad, VariantLost)
        assert good.position == next_position(first_position(people[1]), people[1])

    asyncio.run(story())


def test_a_lost_body_wakes_everyone_with_the_reason(tmp_path):
    async def story():
        people = variants(1)
        omega = make(tmp_path, people)
        await omega.start()
        asking = asyncio.create_task(omega.advance(people[0], first_position(people[0]), 0))
        await asyncio.sleep(0.05)
        await omega.body_lost("out of memory")
        with pytest.raises(BodyError, match="out of memory"):
            await asyncio.wait_for(asking, 5)
        with pytest.raises(BodyError, match="out of memory"):
            await omega.judge([Candidate("seed", None)], "select", 1)

    asyncio.run(story())


def test_judging_goes_through_the_same_body(tmp_path):
    async def story():
        omega = make(tmp_path, variants(1))
        await omega.start()
        life = asyncio.create_task(CountingBody(omega).live())
        scores = await asyncio.wait_for(omega.judge([Candidate("seed", None), Candidate("v0", "x")], "select", 1), 5)
        life.cancel()
        return scores

    assert asyncio.run(story()) == {"seed": [("code", 0, 1.0, 2)], "v0": [("code", 0, 1.0, 2)]}
