"""Processes that share the rows of one variant: the same training as alone, and a partner that fails is missed at once."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_texts import TextTokens, new_pack, place_fresh, variant

from chrysalis_ray.core.records import MOMENTS
from chrysalis_ray.training.apart import Apart
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.partners import Partners, groups
from chrysalis_ray.training.step import train_chunk


def test_every_variant_gets_as_many_processes() -> None:
    assert groups(1, 2, 4) == [[0, 1]]
    assert groups(1, 4, 4) == [[0, 1, 2, 3]]
    assert groups(1, 4, 2) == [[0, 1]]
    assert groups(2, 4, 4) == [[0, 2], [1, 3]]
    assert groups(3, 4, 4) == [[0], [1], [2]]
    assert groups(2, 2, 4) == [[0], [1]]


def pair(base: Path, slots: int, threads: int, **changes: object) -> tuple[Pack, Pack]:
    """The same variants in a pack whose processes may share them, and in one of a single thread."""
    packs = new_pack(base, slots, threads=threads, dtype=torch.float64), new_pack(base, slots, dtype=torch.float64)
    for pack in packs:
        for slot in range(slots):
            place_fresh(pack, slot, variant(slot, **changes))
    return packs


@pytest.mark.parametrize("kind", sorted(MOMENTS))
def test_a_variant_shared_by_two_processes_is_the_one_trained_by_one(kind: str, tiny_base: Path, tokens: TextTokens) -> None:
    shared, alone = pair(tiny_base, 3, 2, optimizer=kind, dropout=0.1)
    for slots in ((1,), (0, 1, 2), (2,), (1,)):  # between shared chunks it trains beside others, in other rows
        told, expected = train_chunk(shared, slots, tokens, 4), train_chunk(alone, slots, tokens, 4)
        for mine, its in zip(told, expected, strict=True):
            assert mine.train_loss == pytest.approx(its.train_loss, rel=1e-12)
            assert mine.gradient_norm == pytest.approx(its.gradient_norm, rel=1e-9)
            assert (mine.step, mine.tokens, mine.skipped, mine.domain_tokens) == (
                its.step,
                its.tokens,
                its.skipped,
                its.domain_tokens,
            )
    assert isinstance(shared.shards.apart, Apart)
    for slot in range(3):
        (mine, meta), (its, other) = shared.harvest(slot), alone.harvest(slot)
        assert meta == other
        for name in mine:
            torch.testing.assert_close(mine[name], its[name], rtol=1e-8, atol=1e-11)


def test_four_processes_share_one_variant_or_two(tiny_base: Path, tokens: TextTokens) -> None:
    shared, alone = pair(tiny_base, 2, 4)
    for slots in ((0, 1), (1,), (0,)):  # two processes each, then two again: a step has two rows
        told, expected = train_chunk(shared, slots, tokens, 3), train_chunk(alone, slots, tokens, 3)
        assert [one.train_loss for one in told] == pytest.approx([one.train_loss for one in expected], rel=1e-12)
    assert shared.shards.apart is not None


def test_a_step_of_several_micro_steps_is_shared_too(tiny_base: Path, tokens: TextTokens) -> None:
    packs = pair(tiny_base, 2, 2)
    for pack in packs:
        place_fresh(pack, 0, replace(variant(0), rows_per_step=5))
    shared, alone = (train_chunk(pack, (0,), tokens, 3, rows_per_microstep=2) for pack in packs)
    assert shared[0].train_loss == pytest.approx(alone[0].train_loss, rel=1e-12)
    assert shared[0].gradient_norm == pytest.approx(alone[0].gradient_norm, rel=1e-9)


def test_a_variant_that_cannot_train_is_evicted_by_all_partners_alike(tiny_base: Path, tokens: TextTokens) -> None:
    shared, _ = pair(tiny_base, 2, 2)
    shared.bank.flat_SP[0] = torch.nan
    (told,) = train_chunk(shared, (0,), tokens, 4)
    assert (told.state, told.skipped, told.step) == ("evicted", 4, 4)


def test_a_partner_that_fails_or_dies_is_missed_at_once(tiny_base: Path, tokens: TextTokens) -> None:
    shared, _ = pair(tiny_base, 2, 2)
    train_chunk(shared, (0,), tokens, 1)
    apart = shared.shards.apart
    assert isinstance(apart, Apart)
    os.kill(apart._limbs[0].process, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=f"process {apart._limbs[0].process} of this worker is gone"):
        train_chunk(shared, (0,), tokens, 1)


def quartet(base: Path) -> Pack:
    """One variant on four processes."""
    pack = new_pack(base, 1, threads=4, dtype=torch.float64)
    place_fresh(pack, 0, replace(variant(0), rows_per_step=4))
    return pack


def test_of_several_failures_the_first_cause_is_told(
    tiny_base: Path, tokens: TextTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, real = quartet(tiny_base), Partners.reduce

    def fail(partners: Partners, rows: torch.Tensor) -> None:
        if partners.rank == 3:
            raise ArithmeticError("the last partner stumbles")
        real(partners, rows)

    monkeypatch.setattr(Partners, "reduce", fail)  # before the fork: everywhere
    with pytest.raises(RuntimeError, match="the last partner stumbles"):
        train_chunk(pack, (0,), tokens, 1)


def test_who_died_between_two_chunks_leaves_nobody_waiting(tiny_base: Path, tokens: TextTokens) -> None:
    """The first partner has its order when the second turns out to be gone: it waits for us, and we for its end."""
    pack = quartet(tiny_base)
    train_chunk(pack, (0,), tokens, 1)
    apart = pack.shards.apart
    assert isinstance(apart, Apart)
    processes = [limb.process for limb in apart._limbs]
    os.kill(processes[1], signal.SIGKILL)
    os.waitid(os.P_PID, processes[1], os.WEXITED | os.WNOWAIT)
    with pytest.raises(RuntimeError, match=f"process {processes[1]} of this worker is gone"):
        train_chunk(pack, (0,), tokens, 1)
    for process in processes:
        with pytest.raises(ChildProcessError):  # ended, and waited for
            os.waitpid(process, os.WNOHANG)


def test_after_a_failure_others_take_their_places(tiny_base: Path, tokens: TextTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a measurement found too little memory and goes on with less."""
    pack, alone = quartet(tiny_base), new_pack(tiny_base, 1, dtype=torch.float64)

    def fail(*_: object) -> None:
        raise ArithmeticError("in the middle of a step")

    with monkeypatch.context() as broken:
        broken.setattr(Partners, "total", fail)
        with pytest.raises((ArithmeticError, RuntimeError), match="in the middle"):
            train_chunk(pack, (0,), tokens, 1)
    for one in (pack, alone):
        place_fresh(one, 0, replace(variant(0), rows_per_step=4))
    (told,), (expected,) = train_chunk(pack, (0,), tokens, 3), train_chunk(alone, (0,), tokens, 3)
    assert told.train_loss == pytest.approx(expected.train_loss, rel=1e-12)


def test_what_fails_in_this_process_does_not_leave_a_partner_waiting(
    tiny_base: Path, tokens: TextTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, _ = pair(tiny_base, 2, 2)
    train_chunk(shared, (0,), tokens, 1)

    def fail(*_: object) -> None:
        raise ArithmeticError("the leader stumbles")

    monkeypatch.setattr("chrysalis_ray.training.step.step_variant", fail)  # after the fork: only here
    with pytest.raises(ArithmeticError, match="stumbles"):
        train_chunk(shared, (0,), tokens, 3)
