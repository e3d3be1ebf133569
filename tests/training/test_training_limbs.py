"""Processes that share a worker's base and bank: the same bits as threads, and nobody is left behind."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from training_texts import TextTokens, new_pack, place_fresh, same, variant

from chrysalis_ray.core.records import MOMENTS
from chrysalis_ray.training.apart import Apart
from chrysalis_ray.training.limbs import Limb, shared_zeros
from chrysalis_ray.training.step import train_chunk


def test_a_limb_answers_in_order_writes_shared_memory_and_holds_no_file_of_the_worker(tmp_path: Path) -> None:
    numbers = shared_zeros((4,), torch.float64)
    with (tmp_path / "open").open("w") as held:

        def work(order: dict) -> dict:
            numbers[order["place"]] = order["value"]
            return {"sum": float(numbers.sum()), "files": [file.path for file in psutil.Process().open_files()]}

        limb = Limb(work)
        for place in range(4):
            limb.order({"place": place, "value": place + 1.0})
        told = [limb.answer() for _ in range(4)]
    assert [answer["sum"] for answer in told] == [1.0, 3.0, 6.0, 10.0]
    assert not any(held.name in answer["files"] for answer in told)
    assert numbers.tolist() == [1.0, 2.0, 3.0, 4.0]
    limb.close()
    assert not psutil.pid_exists(limb.process)


def test_what_fails_in_a_limb_is_raised_with_its_place_and_it_goes_on() -> None:
    limb = Limb(lambda order: {"half": 1 / order["by"]})
    limb.order({"by": 0})
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        limb.answer()
    limb.order({"by": 2})
    assert limb.answer() == {"half": 0.5}
    os.kill(limb.process, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=f"process {limb.process}"):
        limb.answer()
    limb.close()


def test_limbs_die_with_their_worker() -> None:
    script = """
import time
from chrysalis_ray.training.limbs import Limb
print(Limb(lambda order: time.sleep(600) or {}).process, flush=True)
time.sleep(600)
"""
    worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    limb = int(worker.stdout.readline())
    assert psutil.pid_exists(limb)
    worker.kill()
    worker.wait()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(limb) and psutil.Process(limb).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(limb) or psutil.Process(limb).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("kind", sorted(MOMENTS))
def test_processes_and_threads_give_the_same_bits(kind: str, tiny_base: Path, tokens: TextTokens) -> None:
    """Chunk after chunk, with slots that change rows and shards; weights, moments, counters and metrics."""
    packs = [new_pack(tiny_base, 4, threads=2) for _ in range(2)]
    packs[1].shards.may_fork = False
    told = []
    for pack in packs:
        for slot in range(4):
            place_fresh(pack, slot, variant(slot, rank=8, optimizer=kind, dropout=0.1 * (slot == 3), freeze_a=slot == 2))
        told.append([train_chunk(pack, slots, tokens, 3) for slots in ((0, 1, 2, 3), (3, 1), (2, 0, 3, 1))])
    assert told[0] == told[1]
    assert isinstance(packs[0].shards.apart, Apart)
    assert packs[1].shards.apart is None
    for slot in range(4):
        (mine, meta), (theirs, other) = (pack.harvest(slot) for pack in packs)
        assert same(mine, theirs)
        assert meta == other


def test_limbs_go_with_their_pack(tiny_base: Path, tokens: TextTokens) -> None:
    pack = new_pack(tiny_base, 2, threads=2)
    for slot in range(2):
        place_fresh(pack, slot, variant(slot))
    train_chunk(pack, (0, 1), tokens, 1)
    process = pack.shards.apart._limbs[0].process  # type: ignore[attr-defined]
    assert process in [child.pid for child in psutil.Process().children()]
    del pack
    gc.collect()
    assert not psutil.pid_exists(process)


def test_a_failure_in_one_process_waits_for_the_others(tiny_base: Path, tokens: TextTokens) -> None:
    pack = new_pack(tiny_base, 2, threads=2)
    for slot in range(2):
        place_fresh(pack, slot, variant(slot))
    train_chunk(pack, (0, 1), tokens, 1)
    pack.occupant(pack._row_of.index(1)).variant.epigenome.express["nowhere"] = 1.0  # type: ignore[index]
    with pytest.raises(RuntimeError, match="nowhere"):
        train_chunk(pack, (0, 1), tokens, 1)


def test_without_more_processes_threads_do(tiny_base: Path, tokens: TextTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    packs = [new_pack(tiny_base, 3, threads=3) for _ in range(2)]
    real, left = os.fork, [1]

    def few() -> int:
        if not left:
            raise BlockingIOError("Resource temporarily unavailable")
        left.pop()
        return real()

    for pack in packs:
        for slot in range(3):
            place_fresh(pack, slot, variant(slot))
    train_chunk(packs[0], (0, 1, 2), tokens, 2)
    monkeypatch.setattr(os, "fork", few)
    open_before = len(os.listdir("/proc/self/fd"))
    train_chunk(packs[1], (0, 1, 2), tokens, 2)
    assert not packs[1].shards.may_fork
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert all(same(packs[0].harvest(slot)[0], packs[1].harvest(slot)[0]) for slot in range(3))
