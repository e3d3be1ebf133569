"""The process that measures: a real pack on this machine, timed and weighed in seconds. Started by `measure.py`.

    python -m chrysalis_ray.training.measuring ORDER.json RANK

It holds the real base, or the architecture with random weights where there are none yet (how long a step takes and what it
holds do not depend on them), trains synthetic rows of the real shape through `train_chunk`, scores rows as a report does, and
keeps seeds. Everything runs in an order in which memory grows, so that the peak after each load tells what it took. Rank 0
writes the answer. Ends with OUT_OF_MEMORY where memory gave out.
"""

from __future__ import annotations

import errno
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant, read_json, write_json
from chrysalis_ray.core.store import Store
from chrysalis_ray.genome.tokens import TokenStore
from chrysalis_ray.seed.soul import pack_seed, unpack_seed
from chrysalis_ray.training.measured_order import Order
from chrysalis_ray.training.measured_pack import make_pack, pretrain_seconds
from chrysalis_ray.training.memory import limited_memory, peak_memory, process_memory, resident_memory
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.passes import tokens_at_once
from chrysalis_ray.training.planning.fitting import Scored, fit
from chrysalis_ray.training.planning.footprint import shared_out
from chrysalis_ray.training.planning.judged import SCORED_ROWS
from chrysalis_ray.training.planning.measured import Lane, Point
from chrysalis_ray.training.solo import SoloPack
from chrysalis_ray.training.step import current_learning_rate, train_chunk

OUT_OF_MEMORY = 86
REPEATS = 3
DOMAIN = "measured"
SHORT = 0.5  # the other row length, as a share: it tells what attention takes


def main(path: str, rank: str) -> int:
    """Measure, and return the exit code."""
    order = Order(**read_json(Path(path)))
    try:
        answer = observe(order, int(rank))
    except (MemoryError, OSError, RuntimeError, ModelError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"out of memory: {error}", file=sys.stderr)
        return OUT_OF_MEMORY
    if rank == "0":
        write_json(Path(order.folder) / "answer.json", answer)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory is what an error is about, or what the error it was raised from is about."""
    if error is None:
        return False
    words = str(error).lower()
    said = isinstance(error, RuntimeError | ModelError) and any(
        word in words for word in ("allocat", "bad_alloc", "out of memory", "can't start new thread")
    )
    refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or refused or said or is_out_of_memory(error.__cause__)


def observe(order: Order, rank: int) -> dict[str, Any]:
    """Everything a `Measurement` holds beside its question."""
    start = time.time() - order.began
    with limited_memory(order.room):
        told = observe_pack(order, rank)
    # a base is grown in the driver's process, before there is a worker: neither the pack nor its room is in the way
    pretrain = pretrain_seconds(order.base, order.look) if rank == 0 else 0.0
    return told | {"start": start, "pretrain": pretrain}


def observe_pack(order: Order, rank: int) -> dict[str, Any]:
    """What a pack tells: its law, and what it holds."""
    device = torch.device("cuda", rank) if order.on_gpu else torch.device("cpu")
    process = process_memory(device)
    if order.workers > 1:
        store = f"file://{order.folder}/rendezvous"
        dist.init_process_group("nccl" if order.on_gpu else "gloo", init_method=store, rank=rank, world_size=order.workers)
    pack = make_pack(order, device)
    shares = pack.shards.may_share
    pack.shards.may_share = pack.shards.may_split = False  # the law follows from steps that are not shared
    bench = Bench(order, pack, device)
    bench.place(order.slots, order.lane, order.microsteps)
    steps = ladder(order.slots) if not order.compile else sorted({1, order.slots})  # every load is compiled, which takes long
    points = [bench.weigh(variants) for variants in steps]
    holding = bench.holding(process, points)
    if order.microsteps == 1:  # a second pass per step parts what a step costs from what a pass costs
        points.append(bench.time(order.slots, order.lane, 2))
    points += [bench.time(variants, lane, 1) for lane in other_lanes(order.lane) for variants in sorted({1, order.slots})]
    beside = bench.optimizer_seconds(), bench.scored(), bench.keep_seconds(rank)
    told = fit(points, order.workers, len(pack.shards.all), *beside, order.tokens_per_pass)
    return {
        "slots": order.slots,
        "lane": asdict(order.lane),
        "pace": replace(told.pace, shares=shares).to_json(),
        "residual": told.residual,
        "rejected": told.rejected,
        "holding": holding,
        "gather": bench.gather_seconds(),
        "points": [asdict(point) for point in points],
    }


def ladder(slots: int) -> list[int]:
    """Numbers of variants to look at, ascending: one, two, half and all of the slots."""
    return sorted({1, min(2, slots), max(slots // 2, 1), slots})


def other_lanes(lane: Lane) -> list[Lane]:
    """Shorter rows, where rows can be shorter."""
    short = int(lane.length * SHORT)
    return [Lane(lane.rows, short)] if short >= 8 else []


class Bench:
    """A pack with variants in its slots, and what is timed and weighed on it."""

    def __init__(self, order: Order, pack: Pack, device: torch.device) -> None:
        self.order, self.pack, self.device = order, pack, device
        self.stores: dict[int, TokenStore] = {}
        self.scoring: list[float] = []
        self.loaded = 0

    def place(self, variants: int, lane: Lane, microsteps: int) -> None:
        """Fresh variants for the first slots, each with its gradients and moments already in memory."""
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        targets = self.pack.targets if isinstance(self.pack, SoloPack) else self.pack.bank.targets
        rank = self.pack.bank.patterns.largest(self.order.rank)
        for target in targets:
            a_ri = torch.randn(rank, target.in_features, generator=generator) / target.in_features**0.5
            tensors[f"weight/{target.name}.lora_A"] = a_ri
            tensors[f"weight/{target.name}.lora_B"] = torch.zeros(target.out_features, rank)
        for slot in range(variants):
            self.pack.place(slot, self.variant(slot, lane, microsteps), tensors, {"optimizer_step": 0})
        self.pack.zero_gradients()
        for slot in range(variants):
            optimizer = self.pack.occupant(slot).optimizer
            if self.pack.occupant(slot).owner in (None, self.pack.engine.rank):
                optimizer.step(0.0)
            else:
                optimizer.follow()

    def variant(self, index: int, lane: Lane, microsteps: int) -> Variant:
        settings = Hyperparameters(rank=self.order.rank, learning_rate=1e-5, optimizer=self.order.optimizer)
        return Variant(
            variant_id=f"m{index:03d}", index=index, rng_seed=index, seed_sha256="0" * 64, genome_id=DOMAIN, base_sha256="",
            hyperparameters=settings, epigenome=Epigenome({DOMAIN: 1.0}), steps=1_000_000, chunk_steps=1,
            rows_per_step=lane.rows * microsteps, sequence_length=lane.length,
        )  # fmt: skip

    def weigh(self, variants: int) -> Point:
        """Train and score so many variants at the experiment's own lanes; their seconds, and the peak of memory after them."""
        if not self.loaded:
            self.loaded = resident_memory(self.device)
        point = self.time(variants, self.order.lane, self.order.microsteps)
        self.scoring.append(self._score(variants))
        return replace(point, peak=self._largest(peak_memory(self.device)))

    def time(self, variants: int, lane: Lane, microsteps: int) -> Point:
        """Median seconds of an optimizer step of so many variants."""
        for slot in range(variants):
            self.pack.reconfigure(slot, self.variant(slot, lane, microsteps))
        slots = list(range(variants))
        self._train(slots, lane, 1)
        once = self._agreed(self._train(slots, lane, 1))
        seconds = [once]
        if once < self.order.look:  # a step that takes longer is looked at once
            steps = max(1, int(self.order.look / REPEATS / once))
            seconds = [self._train(slots, lane, steps) / steps for _ in range(REPEATS)]
        return Point(variants, lane.rows, lane.length, microsteps, self._agreed(statistics.median(seconds)))

    def holding(self, process: int, points: Sequence[Point]) -> dict[str, Any]:
        """Bytes: what more variants took at the peak is what their tokens took, for their slots were full before. Where no
        more are computed at once than of one variant it is all that the first load took."""
        first, last = points[0], points[-1]
        least, most = self._at_once(first.variants), self._at_once(last.variants)
        more = most - least
        per_token = max(last.peak - first.peak, 0) / more if more else max(last.peak - self.loaded, 0) / most
        bank = self.pack.bank
        moments = len(self.pack.occupant(0).optimizer.moments())
        own = shared_out(self.order.slots, self.order.workers) / self.order.slots
        gradients = 1 if bank.scratch is None else own
        per_slot = round(bank.row_size * bank.flat_SP.element_size() * (1 + gradients + moments * own))
        seen = 0 if self.device.type == "cuda" else process  # torch does not count the driver's context
        base = max(last.peak - most * per_token - seen - self.order.slots * per_slot, 0)
        return {
            "process": process,
            "base": round(base),
            "per_slot": per_slot,
            "per_token": per_token,
        }

    def _at_once(self, variants: int) -> float:
        """Tokens of so many variants that a worker computes at once."""
        lane, shards = self.order.lane.tokens / self.order.workers, len(self.pack.shards.all)
        return tokens_at_once(variants, lane, self.order.tokens_per_pass, shards)

    def optimizer_seconds(self) -> float:
        """One optimizer's step of one row."""
        occupant = self.pack.occupant(0)
        return self._agreed(self._median(lambda: occupant.optimizer.step(current_learning_rate(occupant)), 10))

    def scored(self) -> Scored:
        """What scoring took, in packs as large as they come."""
        return Scored(self.order.slots, SCORED_ROWS * self.order.length, self._agreed(self.scoring[-1]))

    def keep_seconds(self, rank: int) -> float:
        """A seed taken out of its slot, packed and put into a store; in a solo body, the next one put on as well."""
        if rank:  # the others hand over what they keep of it
            for _ in range(REPEATS):
                self.pack.harvest(0)
            return 0.0
        with tempfile.TemporaryDirectory(dir=self.order.folder) as folder:
            store, seconds = Store(Path(folder)), []
            for number in range(REPEATS):
                began = time.perf_counter()
                tensors, meta = self.pack.harvest(0)
                seed = store.put(pack_seed(tensors, {**meta, "number": number}))
                if isinstance(self.pack, SoloPack):
                    self.pack.place(0, self.pack.occupant(0).variant, *unpack_seed(store.get(seed)))
                seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def gather_seconds(self) -> float:
        """The whole base gathered once; 0 where it is not sharded."""
        if self.order.zero_stage != 3:
            return 0.0

        def gather() -> None:
            for parameter in self.pack.shards.all[0].trunk.parameters():
                with self.pack.engine.gather([parameter]):
                    pass

        return self._agreed(self._median(gather, 1))

    def _score(self, variants: int) -> float:
        tokens = self._tokens(self.order.length)
        batch = tokens.batch([(DOMAIN, row) for row in range(SCORED_ROWS)], "select")
        slots = list(range(variants))
        return self._median(lambda: self.pack.score(slots, batch), 1)

    def _train(self, slots: Sequence[int], lane: Lane, steps: int) -> float:
        began = time.perf_counter()
        train_chunk(self.pack, slots, self._tokens(lane.length), steps, lane.rows)
        self._settle()
        return time.perf_counter() - began

    def _median(self, work: Any, times: int) -> float:
        """Median seconds of `work`, which is done `times` times in a row for each look."""
        seconds = []
        for _ in range(REPEATS):
            self._settle()
            began = time.perf_counter()
            for _ in range(times):
                work()
            self._settle()
            seconds.append((time.perf_counter() - began) / times)
        return statistics.median(seconds)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _agreed(self, value: float) -> float:
        """The mean over all workers, so that all take the same decisions."""
        told = torch.tensor([value], dtype=torch.float64, device=self.device)
        self.pack.engine.reduce(told)
        return told.item() / self.pack.engine.world

    def _largest(self, value: int) -> int:
        told = torch.tensor([value], dtype=torch.int64, device=self.device)
        if self.pack.engine.world > 1:
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return int(told.item())

    def _tokens(self, length: int) -> TokenStore:
        if length not in self.stores:
            self.stores[length] = synthetic_tokens(length, self.order.vocabulary)
        return self.stores[length]


def synthetic_tokens(length: int, vocabulary: int, rows: int = 64) -> TokenStore:
    """Rows of random tokens, two documents in each, as a token store in memory: what training and scoring read."""
    generator = np.random.default_rng(0)
    cut = length * 5 // 8
    documents = np.arange(2 * rows, dtype=np.int32).reshape(rows, 2).repeat([cut, length - cut], axis=1)
    arrays: dict[str, NDArray[Any]] = {
        "input_ids": generator.integers(0, vocabulary, (rows, length)),
        "document": documents,
        "label_counts": np.full(rows, length - 2, dtype=np.int64),
    }
    part = {"rows": rows, "tokens": rows * length, "documents": 2 * rows, "labels": rows * (length - 2)}
    splits = ("train", "select")
    manifest = {"key": {"sequence_length": length, "genome_id": DOMAIN}, "parts": {DOMAIN: dict.fromkeys(splits, part)}}
    return TokenStore(Path(), manifest, {(DOMAIN, split): arrays for split in splits})


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # The answer is there, or why there is none. Threads of gloo and DeepSpeed that are still about can abort a usual exit. It
    # takes a while besides: the others, who wait for this process, would be seen to fail before it does.
    os._exit(code)
