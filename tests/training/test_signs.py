"""Signs of life of a worker that computes in several processes: one that hangs is not hidden by those that get on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from threading import Thread

import psutil
import pytest
from training_texts import TextTokens, new_pack, place_fresh, same, variant

from chrysalis_ray.body.roster import Life
from chrysalis_ray.body.watch import LOOK_SECONDS, Watch
from chrysalis_ray.training.apart import Apart
from chrysalis_ray.training.limbs import Limb
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.signs import Signs
from chrysalis_ray.training.step import SlotMetrics, train_chunk

STEPS = 40


LOOK = "chrysalis_ray.training.signs.LOOK_SECONDS"


def placed(base: Path, slots: int, threads: int) -> Pack:
    pack = new_pack(base, slots, threads=threads)
    for slot in range(slots):
        place_fresh(pack, slot, variant(slot))
    return pack


def until(ready: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("slots", "threads", "stopped"),
    [(2, 2, 1), (2, 4, 3), (1, 2, 1)],
    ids=["a fork with a variant of its own", "a partner of a fork", "a partner of the worker"],
)
def test_a_fork_that_is_stopped_silences_its_worker_and_is_taken_for_dead(
    slots: int, threads: int, stopped: int, tiny_base: Path, tokens: TextTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's own variants get on, or are done: its body gives no sign all the same, until the fork goes on."""
    monkeypatch.setattr(LOOK, 0.1)
    undisturbed, pack = placed(tiny_base, slots, threads), placed(tiny_base, slots, threads)
    everyone, told = list(range(slots)), list[list[SlotMetrics]]()
    for one in (undisturbed, pack):
        train_chunk(one, everyone, tokens, 1)
    apart = pack.shards.apart
    assert isinstance(apart, Apart)
    fork = psutil.Process(apart._limbs[stopped - 1].process)
    watch, life, signs = Watch(1, hang_seconds=5.0), Life(0, number=1), list[int]()
    watch.sign(life)

    def sign() -> None:
        if not signs:
            os.kill(fork.pid, signal.SIGSTOP)
            until(lambda: fork.status() == psutil.STATUS_STOPPED)
        signs.append(apart._signs.passes_W[0].item())
        watch.sign(life)

    for shard in pack.shards.all:
        shard.progress = sign
    chunk = Thread(target=lambda: told.append(train_chunk(pack, everyone, tokens, STEPS)))
    chunk.start()
    try:
        until(lambda: fork.status() == psutil.STATUS_STOPPED)
        alone = stopped == 1 and slots == 2
        if alone or threads == 4:  # nobody of the worker's own waits for it
            until(lambda: apart._signs.passes_W[0] == 1 + STEPS)
        time.sleep(0.5)  # it waits for an answer, and looks
        assert len(signs) <= 2  # the fork may have made another pass before it was stopped
        silent = [hanging for _ in range(10) for hanging in watch.hanging([life], LOOK_SECONDS)]
        assert silent, "omega would have ended this worker"
        assert not told
    finally:
        os.kill(fork.pid, signal.SIGCONT)
        chunk.join(60)
    assert told == [train_chunk(undisturbed, everyone, tokens, STEPS)]
    assert all(same(pack.harvest(slot)[0], undisturbed.harvest(slot)[0]) for slot in everyone)


def test_who_waits_for_a_fork_that_gets_on_gives_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose own work is done does not seem to hang while a fork is still at its."""
    monkeypatch.setattr(LOOK, 0.1)
    signs, told = Signs(2), list[int]()

    def work(order: dict) -> dict:
        for _ in range(8):
            time.sleep(0.05)
            signs.count(1)
        return order

    limb = Limb(work)
    try:
        limb.order({"well": "done"})
        assert signs.await_one({1: limb}, lambda: told.append(1)) == [1]
        assert len(told) >= 1
        assert limb.answer() == {"well": "done"}
    finally:
        limb.close()


def test_a_sign_means_that_everyone_at_work_has_got_on_since_the_last() -> None:
    signs = Signs(3)
    signs.count(0)
    assert not signs.all_get_on([0, 1])
    signs.count(1)
    assert signs.all_get_on([0, 1])
    signs.count(1)
    assert not signs.all_get_on([0, 1])
    assert signs.all_get_on([1])
