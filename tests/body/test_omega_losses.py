"""Omega when things end badly: nobody may wait for ever, and one variant's trouble is not everybody's."""

import asyncio

import pytest
from test_omega_promises import CountingBody, make, trial, variants

from chrysalis_ray.body.turn import Candidate, Outcome, first_position, next_position
from chrysalis_ray.core.errors import BodyError, VariantLost
from chrysalis_ray.core.weave import Weave


def kinds(tmp_path):
    return [turn["kind"] for turn in Weave(tmp_path / "weave.jsonl").turns()]


def test_a_lost_body_wakes_everyone_even_when_the_journal_cannot_be_written(tmp_path):
    async def story():
        people = variants(1)
        omega = make(tmp_path, people)
        await omega.start()
        (tmp_path / "weave.jsonl").mkdir()  # as good as a full disk: no line can be appended
        asking = asyncio.create_task(omega.advance(people[0], first_position(people[0]), 0))
        judging = asyncio.create_task(omega.judge([Candidate("seed", None)], "select", 1))
        await asyncio.sleep(0.05)
        await omega.body_lost("no space left on device")
        for waiting in (asking, judging):
            with pytest.raises(BodyError, match="no space left"):
                await asyncio.wait_for(waiting, 5)

    asyncio.run(story())


def test_an_error_of_omega_itself_ends_the_waiting(tmp_path):
    async def story():
        people = variants(2)
        omega = make(tmp_path, people[:1])
        await omega.start()
        stranger = people[1]  # was never branched
        with pytest.raises(BodyError, match="omega failed: KeyError"):
            await asyncio.wait_for(omega.advance(stranger, first_position(stranger), 0), 5)

    asyncio.run(story())


def test_workers_that_go_home_unasked_are_a_lost_body_and_after_dissolve_are_not(tmp_path):
    async def story():
        people = variants(1)
        omega = make(tmp_path, people)
        await omega.start()
        asking = asyncio.create_task(omega.advance(people[0], first_position(people[0]), 0))
        await asyncio.sleep(0.05)
        await omega.ended(None)
        with pytest.raises(BodyError, match="went home before they were asked"):
            await asyncio.wait_for(asking, 5)
        await omega.ended("TrainingFailedError: what came of it")
        assert "went home" in await omega.lost_because()

        other = make(tmp_path / "other", people)
        await other.start()
        await other.dissolve()
        await other.ended("SystemError: at exit")
        assert await other.lost_because() is None
        assert kinds(tmp_path / "other")[-1] == "body.dissolved"

    asyncio.run(story())


def test_a_seed_that_is_gone_costs_one_variant_and_not_the_body(tmp_path):
    async def story():
        people = variants(2)
        omega = make(tmp_path, people, linger=0.5)  # v1 is answered before v0 asks again
        await omega.start()
        life = asyncio.create_task(CountingBody(omega).live())
        first = await asyncio.gather(*(omega.advance(v, first_position(v), 0) for v in people))
        gone = omega.known[first[0].position].seed
        (tmp_path / "store" / "blobs" / gone[:2] / gone).unlink()
        bad, good = await asyncio.wait_for(
            asyncio.gather(
                *(omega.advance(v, a.position, 1) for v, a in zip(people, first, strict=True)), return_exceptions=True
            ),
            10,
        )
        life.cancel()
        assert isinstance(bad, VariantLost)
        assert good.chunk == 2

    asyncio.run(story())


def test_the_late_farewell_of_an_old_process_does_not_take_the_new_ones_ask(tmp_path):
    async def story():
        people = variants(1)
        omega = make(tmp_path, people)
        await omega.start()
        old = asyncio.create_task(omega.advance(people[0], first_position(people[0]), 0, "old"))
        await asyncio.sleep(0.01)
        new = asyncio.create_task(omega.advance(people[0], first_position(people[0]), 0, "new"))
        await asyncio.sleep(0.01)
        await omega.detach("v0", "old")
        life = asyncio.create_task(CountingBody(omega).live())
        assert (await asyncio.wait_for(new, 5)).chunk == 1
        assert (await asyncio.wait_for(old, 5)).chunk == 1
        life.cancel()

    asyncio.run(story())


def test_nobody_is_answered_before_the_next_process_of_a_lost_trial_has_told_tune(tmp_path):
    """Asynchronous schedulers decide by the order in which they hear; a process that dies with its node must not change it."""

    async def story():
        people = variants(2)
        omega = make(tmp_path, people)
        await omega.start()
        life = asyncio.create_task(CountingBody(omega).live())
        asks = [asyncio.create_task(omega.advance(one, first_position(one), 0, "old")) for one in people]
        told = await asyncio.wait_for(asks[0], 5)
        await omega.detach("v0", "old")
        await asyncio.sleep(0.1)
        assert not asks[1].done()
        again = await asyncio.wait_for(omega.advance(people[0], first_position(people[0]), 0, "new"), 5)
        assert again == told
        following = asyncio.create_task(omega.advance(people[0], again.position, 1, "new"))
        assert (await asyncio.wait_for(asks[1], 5)).chunk == 1
        await omega.conclude("v1", "stopped", None)
        await asyncio.wait_for(following, 5)
        life.cancel()

    asyncio.run(story())


def test_scores_for_somebody_who_left_are_dropped_and_the_next_judgement_works(tmp_path):
    async def story():
        omega = make(tmp_path, variants(1))
        await omega.start()
        gone = asyncio.create_task(omega.judge([Candidate("seed", None)], "select", 1))
        epoch = await omega.hello(1, 0, "node")
        turn = await omega.next_turn(epoch, -1)
        gone.cancel()
        await asyncio.sleep(0.01)
        await omega.judged(epoch, turn.number, {"seed": []})
        life = asyncio.create_task(CountingBody(omega).live())
        again = await asyncio.wait_for(omega.judge([Candidate("v0", "x")], "select", 1), 5)
        life.cancel()
        assert list(again) == ["v0"]

    asyncio.run(story())


def test_judging_while_a_trial_waits_holds_nobody_up(tmp_path):
    async def story():
        people = variants(2)
        omega = make(tmp_path, people)
        await omega.start()
        heard: list = []
        early = asyncio.create_task(omega.advance(people[0], first_position(people[0]), 0))
        await asyncio.sleep(0.01)
        life = asyncio.create_task(CountingBody(omega).live())
        scores = await asyncio.wait_for(omega.judge([Candidate("seed", None)], "select", 1), 5)
        assert list(scores) == ["seed"]
        other = asyncio.create_task(trial(omega, people[1], 1, heard))
        assert (await asyncio.wait_for(early, 5)).position == next_position(first_position(people[0]), people[0])
        await omega.conclude("v0", "stopped", None)
        await asyncio.wait_for(other, 5)
        life.cancel()

    asyncio.run(story())


def test_a_variant_that_ended_and_is_restarted_is_live_again(tmp_path):
    async def story():
        people = variants(2)
        omega = make(tmp_path, people)
        await omega.start()
        life = asyncio.create_task(CountingBody(omega).live())
        heard: list = []
        await omega.conclude("v1", "failed", "its node went away")
        await asyncio.wait_for(trial(omega, people[0], 2, heard), 5)
        await asyncio.wait_for(trial(omega, people[1], 2, heard), 5)
        assert {row["state"] for row in (await omega.summary()).values()} == {"finished"}
        life.cancel()

    asyncio.run(story())


def test_an_outcome_without_a_seed_ends_its_variant_only(tmp_path):
    """A worker hands in an empty seed for weights that cannot be kept: nothing may start from there."""

    async def story():
        people = variants(1)
        omega = make(tmp_path, people)
        await omega.start()
        epoch = await omega.hello(1, 0, "node")
        asking = asyncio.create_task(omega.advance(people[0], first_position(people[0]), 0))
        turn = await omega.next_turn(epoch, -1)
        await omega.commit(epoch, turn.number, [Outcome(turn.work[0].target, "", {"state": "evicted"})], 0.0)
        answer = await asyncio.wait_for(asking, 5)
        assert "seed" not in (await omega.summary())["v0"]
        with pytest.raises(VariantLost):
            await asyncio.wait_for(omega.advance(people[0], answer.position, 1), 5)

    asyncio.run(story())
