"""Judging C merge candidates on held-out rows: all in one packed pass against C separate passes of PEFT, warm, one process.

    python benchmarks/judge.py
    python benchmarks/judge.py --candidates 16 --members 8 --lengths 32 64 128 --json

The candidates are weighted sums of N adapters. PEFT gets each of them ready made, of the members' rank: the members share their
A, as adapters of one seed nearly do, so that a sum is of rank r without a cut. That is the cheapest a separate pass can be.
PEFT is timed in all the ways that `--batch-rows` and `merge_adapter` allow (beside the frozen weights, or merged into them, one
candidate after the other, and taken out again); its fastest counts. Ours goes by as many rows as judging takes of that length.
Ours makes nothing: `blend` takes the members and the weights as they are, at the sum of all ranks (`training/blend.py`);
`slots` loads the ready made candidates as training loads variants; `one slot` does so one candidate after the other.

What it takes to have the candidates is told beside that. `with loading`: they lie on disk, and PEFT loads each into its model
(`load_adapter`), while we read the members and stack them. `with making`: PEFT first makes each of them
(`add_weighted_adapter(combination_type="svd")`, one is timed and counts C times). The base has random weights: how long a pass
takes does not depend on them.
`bound` is what PEFT's pass takes against the products with the frozen matrices alone, which each candidate's tokens need and
nobody can share (those of the first layer's q, k and v can be: all candidates read the same there), on as many threads, each in
one: no judging of this base in this precision is a greater ratio.

All sides score the same labels; their losses are compared before any clock runs. `cpu` is the ratio of CPU seconds, which other
people's work on the machine disturbs least: of `--threads 1` it is the arithmetic alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does: see chrysalis_ray/cli/main.py

import machine
import numpy as np
import torch
from packing import RESULTS, TARGETS, Shape, quieten, shapes, write_base

from chrysalis_ray.core.records import write_json
from chrysalis_ray.evaluate.judging import BATCH_ROWS, rows_at_once
from chrysalis_ray.genome.tokens import RowBatch
from chrysalis_ray.seed.adapter import AdapterWeights, read_adapter, write_adapter
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.loss import SCORED
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.worn import AT_ONCE

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
Score = Callable[[], torch.Tensor]  # losses [candidates, rows, T]


def draw_rows(rows: int, length: int, vocabulary: int) -> RowBatch:
    """Rows of one document each; the last token of a row has no label."""
    ids = np.random.default_rng(3).integers(0, vocabulary, (rows, length))
    labels = np.concatenate([ids[:, 1:], np.full((rows, 1), -100)], axis=1)
    positions = np.tile(np.arange(length), (rows, 1))
    return RowBatch(ids, positions, labels, np.zeros((rows, length), np.int32))


def draw_members(pack: Pack, count: int, rank: int) -> list[tuple[Factors, float]]:
    """Adapters that share their A."""
    generator = torch.Generator().manual_seed(1)
    shared = {t.name: torch.randn(rank, t.in_features, generator=generator) / t.in_features**0.5 for t in pack.bank.targets}
    return [
        (
            {
                t.name: (shared[t.name], 0.05 * torch.randn(t.out_features, rank, generator=generator))
                for t in pack.bank.targets
            },
            2.0,
        )
        for _ in range(count)
    ]


def ready_made(members: Sequence[tuple[Factors, float]], weights_M: torch.Tensor) -> Factors:
    """The weighted sum of members that share their A, as one adapter of their rank and scale 1."""
    return {
        module: (
            a_ri,
            torch.stack([w * scale * own[module][1] for w, (own, scale) in zip(weights_M, members, strict=True)]).sum(0),
        )
        for module, (a_ri, _) in members[0][0].items()
    }


def batches(batch: RowBatch, size: int) -> list[RowBatch]:
    arrays = (batch.input_ids, batch.position_ids, batch.labels, batch.document)
    return [RowBatch(*(a[start : start + size] for a in arrays)) for start in range(0, len(batch.labels), size)]


def separate(
    folder: Path, candidates: Sequence[Factors], batch: RowBatch, sizes: Sequence[int], rank: int
) -> dict[tuple[int, str], Score]:
    """One PEFT model, its adapters set one after the other: by rows of a pass, beside the weights or merged into them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
    model: Any = get_peft_model(load_base(folder, "fp32"), config, "c0")
    for number in range(1, len(candidates)):
        model.add_adapter(f"c{number}", config)
    tensors = dict(model.named_parameters())
    for number, factors in enumerate(candidates):
        for module, pair in factors.items():
            for side, value in zip("AB", pair, strict=True):
                tensors[f"base_model.model.{module}.lora_{side}.c{number}.weight"].data.copy_(value)

    @torch.no_grad()
    def score(size: int, how: str) -> torch.Tensor:
        found = []
        for number in range(len(candidates)):
            model.set_adapter(f"c{number}")
            if how == "merged":
                model.merge_adapter([f"c{number}"])
            for part in batches(batch, size):
                ids, positions, labels = (torch.from_numpy(a) for a in (part.input_ids, part.position_ids, part.labels))
                logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
                found.append(torch.nn.functional.cross_entropy(logits.mT, labels, ignore_index=-100, reduction="none"))
            if how == "merged":
                model.unmerge_adapter()
        return torch.cat(found).view(len(candidates), *batch.labels.shape)

    return {(size, how): partial(score, size, how) for size in sizes for how in ("beside", "merged")}


def fastest(ways: dict[tuple[int, str], Score]) -> tuple[tuple[int, str], Score]:
    """The way that takes the least time, of two tries each."""
    taken = {}
    for way, score in ways.items():
        score()
        tries = []
        for _ in range(2):
            began = time.perf_counter()
            score()
            tries.append(time.perf_counter() - began)
        taken[way] = min(tries)
    best = min(taken, key=lambda way: taken[way])
    return best, ways[best]


def products(folder: Path, candidates: int, batch: RowBatch, threads: int) -> Callable[[], object]:
    """The products of every candidate's tokens with the frozen matrices, and nothing else, candidates dealt out to threads."""
    model: Any = load_base(folder, "fp32")
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    shared = [module for module in model.model.layers[0].self_attn.children() if module in linear[:3]]
    tokens, labelled = batch.labels.size, int((batch.labels != -100).sum())

    def multiply(first: int) -> None:
        torch.set_num_threads(1)
        for number in range(first, candidates, threads):
            for module in linear if number == 0 else [module for module in linear if module not in shared]:
                head = module is model.lm_head
                step, whole = (SCORED, labelled) if head else (AT_ONCE, tokens)
                x_KI = torch.ones(step, module.in_features)
                y_KO = torch.empty(step, module.out_features)
                for start in range(0, whole, step):
                    count = min(step, whole - start)
                    torch.mm(x_KI[:count], module.weight.detach().mT, out=y_KO[:count])

    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(multiply, range(threads)))


def peft_making(folder: Path, members: Sequence[tuple[Factors, float]], rank: int) -> float:
    """Seconds that PEFT takes to make one candidate of the members, cut to their rank by an svd."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS))
    model: Any = get_peft_model(load_base(folder, "fp32"), config, "m0")
    for number in range(1, len(members)):
        model.add_adapter(f"m{number}", config)
    names = [f"m{number}" for number in range(len(members))]
    began = time.perf_counter()
    model.add_weighted_adapter(names, [1.0 / len(names)] * len(names), "made", combination_type="svd", svd_rank=rank)
    return time.perf_counter() - began


def loading(folder: Path, members: Sequence[tuple[Factors, float]], made: Sequence[Factors], rank: int) -> dict[str, float]:
    """Seconds to load from disk what each side needs: PEFT every candidate into its warm model, ours every member."""
    from peft import LoraConfig, get_peft_model

    def written(name: str, factors: Factors, scale: float) -> Path:
        write_adapter(folder / name, AdapterWeights(str(folder), None, rank, scale * rank, False, TARGETS, factors))
        return folder / name

    model: Any = get_peft_model(load_base(folder, "fp32"), LoraConfig(r=rank, target_modules=list(TARGETS)))
    candidates = [written(f"candidate{number}", factors, 1.0) for number, factors in enumerate(made)]
    beside = [written(f"member{number}", *member) for number, member in enumerate(members)]
    model.load_adapter(str(candidates[0]), "warm")
    began = time.perf_counter()
    for number, candidate in enumerate(candidates):
        model.load_adapter(str(candidate), f"c{number}")
    between = time.perf_counter()
    for member in beside:
        read_adapter(member)
    return {"separate": between - began, "blend": time.perf_counter() - between}


def ours(
    folder: Path,
    members: Sequence[tuple[Factors, float]],
    weights_CM: torch.Tensor,
    batch: RowBatch,
    rank: int,
) -> dict[str, Score]:
    """The packed pass, the slots, and one slot after the other, by as many rows at a time as judging takes."""
    candidates = len(weights_CM)
    engine = make_engine(0, "none", "fp32", "cpu")
    pack = Pack(load_base(folder, "fp32"), TARGETS, candidates, rank, engine, threads=torch.get_num_threads())
    for slot, weights_M in enumerate(weights_CM):
        pack.load_adapter(slot, ready_made(members, weights_M), 1.0)
    blend, slots, parts = (
        pack.blend(members, weights_CM),
        list(range(candidates)),
        batches(batch, rows_at_once(pack, BATCH_ROWS, batch.labels.shape[1])),
    )
    return {
        "blend": lambda: torch.cat([pack.judge_blend(blend, part).losses for part in parts], 1),
        "slots": lambda: torch.cat([pack.judge(slots, part).losses for part in parts], 1),
        "one slot": lambda: torch.cat([torch.cat([pack.judge([s], part).losses for part in parts], 1) for s in slots]),
    }


def compare(folder: Path, shape: Shape, length: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of all sides, taken in turns so that a busy moment meets them all. Exits if their losses differ."""
    batch = draw_rows(asked.rows, length, shape.vocabulary)
    drawn = Pack(load_base(folder, "fp32"), TARGETS, 1, asked.rank, make_engine(0, "none", "fp32", "cpu"))
    members = draw_members(drawn, asked.members, asked.rank)
    weights_CM = torch.rand(asked.candidates, asked.members, generator=torch.Generator().manual_seed(2))
    weights_CM /= weights_CM.sum(1, keepdim=True)
    made = [ready_made(members, weights_M) for weights_M in weights_CM]
    began = time.perf_counter()
    drawn.blend(members, weights_CM)
    stacking = time.perf_counter() - began
    way, alone = fastest(separate(folder, made, batch, asked.batch_rows, asked.rank))
    sides: dict[str, Score] = {"separate": alone, **ours(folder, members, weights_CM, batch, asked.rank)}
    losses = {name: score() for name, score in sides.items()}
    for name, found in losses.items():
        apart = float((found - losses["separate"]).abs().max())
        if apart > 1e-3 or float((found[0] - found[1]).abs().max()) < 1e-3:
            sys.exit(f"{name}: losses differ by {apart:.2e}, or the candidates do not; nothing was timed")
    timed: dict[str, Callable[[], object]] = {**sides, "products": products(folder, asked.candidates, batch, asked.threads)}
    timed["products"]()
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    worked: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(asked.repeats):
        for name, score in timed.items():
            began, before = time.perf_counter(), time.process_time()
            score()
            worked[name].append(time.process_time() - before)
            seconds[name].append(time.perf_counter() - began)
    cpu = {name: statistics.median(values) for name, values in worked.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    read = loading(folder, members, made, asked.rank)
    making = peft_making(folder, members, asked.rank) * asked.candidates if asked.making else None
    return {
        "length": length,
        "separate_way": {"batch_rows": way[0], "adapter": way[1]},
        "seconds": median,
        "ratio": median["separate"] / median["blend"],
        "bound": median["separate"] / median["products"],
        "cpu_seconds": cpu,
        "cpu_ratio": cpu["separate"] / cpu["blend"],
        "ratio_of_fastest": min(seconds["separate"]) / min(seconds["blend"]),
        "loading_seconds": read,
        "ratio_with_loading": (median["separate"] + read["separate"]) / (median["blend"] + read["blend"] + stacking),
        "making_seconds": {"separate": making, "blend": stacking},
        "ratio_with_making": None if making is None else (median["separate"] + making) / (median["blend"] + stacking),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="held-out rows that every candidate is judged on")
    parser.add_argument("--batch-rows", type=int, nargs="+", default=[8, 16], help="rows of one pass of PEFT, to choose from")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128], help="tokens of a row")
    parser.add_argument("--shapes", nargs="+", default=["tiny"], choices=["tiny", "wide"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--making", action="store_true", help="also time how PEFT makes a candidate")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "judge.json", help="also write JSON, by default here")
    asked = parser.parse_args(arguments)
    quieten()
    torch.set_num_threads(asked.threads)
    told, bases = [], shapes()
    print(f"{asked.candidates} candidates of {asked.members} adapters of rank {asked.rank}, {asked.rows} rows; seconds")
    print(
        f"{'base':<8}{'tokens':>7}{'separate':>10}{'one slot':>10}{'slots':>8}{'blend':>8}{'ratio':>8}{'bound':>8}{'cpu':>8}"
        f"{'with loading':>14}{'with making':>13}"
    )
    for name in asked.shapes:
        with tempfile.TemporaryDirectory() as folder:
            write_base(bases[name], Path(folder))
            for length in asked.lengths:
                load = machine.load_now()
                row = compare(Path(folder), bases[name], length, asked)
                told.append({"base": name, "load_before": load, **row})
                s = row["seconds"]
                whole = "" if row["ratio_with_making"] is None else f"{row['ratio_with_making']:.1f}x"
                print(
                    f"{name:<8}{length:>7}{s['separate']:>10.3f}{s['one slot']:>10.3f}{s['slots']:>8.3f}{s['blend']:>8.3f}"
                    f"{row['ratio']:>7.2f}x{row['bound']:>7.2f}x{row['cpu_ratio']:>7.2f}x"
                    f"{row['ratio_with_loading']:>13.2f}x{whole:>13}",
                    flush=True,
                )
    if asked.json:
        settings = {key: value for key, value in vars(asked).items() if key != "json"}
        write_json(asked.json, {"machine": machine.describe(), "settings": settings, "rows": told})


if __name__ == "__main__":
    main()
