"""Where packing stops helping: N variants x tokens per lane, packed against sequential PEFT in one warm process, and the ridge.

    python benchmarks/ridge.py
    python benchmarks/ridge.py --memory --processes --json
    python benchmarks/ridge.py --lanes 1024 --beside benchmarks/results/ridge.json --json      other lanes as they were
    python benchmarks/ridge.py --shapes qwen3-0.6b --device cuda --precision bf16 --json

Every cell is made of real chunks of both sides (`chunks.py`), taken in turns, on the same cores: ours as a run would train so
many variants, PEFT with as many threads in its operations as serve it best, one or all. The law of `training/planning/pace.py`
is fitted to the packed steps: below its ridge a step is mostly launch, which a pack pays once. With `--memory` both sides are
weighed in processes of their own, with `--processes` N PEFT processes step at once. The plot is drawn into an SVG beside the
JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import chunks
import machine
import memory
import packing
import ridge_plot
import torch
from packing import Place, Shape

from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.training.passes import MOST_SHARDS
from chrysalis_ray.training.planning.fitting import Scored, fit
from chrysalis_ray.training.planning.measured import Point

RESULTS = Path(__file__).resolve().parent / "results"
CHUNK_SECONDS, FEWEST_CHUNKS = 0.2, 3  # about how long a chunk is (one of a run takes longer), and how many are timed
WINDOW_SECONDS = 4.0  # of N processes stepping at once
MOST_PROCESSES = 8
# OpenMP threads that wait spin by default, and on a machine that does other work too they wait for each other's time slices.
SPINNING = "GOMP_SPINCOUNT"

Cell = dict[str, Any]


def cell(
    folder: Path, shape: Shape, variants: int, tokens: int, place: Place, threads: int, peft_threads: int, seconds: float
) -> Cell:
    """Milliseconds of a step of all variants on both sides. Exits if the sides start at different losses."""
    held = packing.tokens_per_pass(shape, place)
    ours = chunks.packed(folder, shape, variants, tokens, place, threads, held)
    sides = [chunks.sequential(folder, shape, variants, tokens, place, peft_threads), ours.train]
    first = [side(1) for side in sides]  # before the first update both are the base
    apart = max(abs(a - b) for a, b in zip(*first, strict=True))
    if apart > (1e-4 if place.precision == "fp32" else 5e-2):
        sys.exit(f"{variants} x {tokens} tokens: the two sides start at losses {apart:.2e} apart; nothing was timed")
    taken, steps = in_turns(sides, seconds)
    sequential, packed = (statistics.median(side) for side in taken)
    return {
        "variants": variants,
        "tokens_per_lane": tokens,
        "sequential_ms": sequential * 1000,
        "sequential_threads": peft_threads,
        "packed_ms": packed * 1000,
        "packed_form": ours.form(),
        "alone_on_several_cores": ours.shared(),
        "gain": sequential / packed,
        "chunks": len(taken[0]),
        "steps_per_chunk": steps,
    }


def in_turns(sides: Sequence[chunks.Chunk], seconds: float) -> tuple[list[list[float]], list[int]]:
    """Seconds per step of every chunk of each side, which take turns for about so long in all; and the steps of a chunk."""
    warm = [timed(side, 1) for side in sides]
    steps = [max(1, round(CHUNK_SECONDS / once)) for once in warm]
    whole = sum(once * count for once, count in zip(warm, steps, strict=True))
    repeats = min(50, max(FEWEST_CHUNKS, round(seconds / whole)))
    taken = [[timed(side, count) / count for side, count in zip(sides, steps, strict=True)] for _ in range(repeats)]
    return [list(side) for side in zip(*taken, strict=True)], steps


def timed(side: chunks.Chunk, steps: int) -> float:
    """Seconds of a chunk; it ends by reading losses back, so a GPU is done when it is."""
    began = time.perf_counter()
    side(steps)
    return time.perf_counter() - began


def best_threads(folder: Path, shape: Shape, tokens: int, place: Place, threads: int, seconds: float) -> int:
    """With how many threads in its operations, one or all, PEFT is faster at such lanes."""
    choices = sorted({1, threads}) if place.device.type == "cpu" else [threads]
    sides = [chunks.sequential(folder, shape, 1, tokens, place, count) for count in choices]
    taken, _ = in_turns(sides, seconds)
    return min(zip(choices, taken, strict=True), key=lambda side: statistics.median(side[1]))[0]


def law_of(cells: Sequence[Cell], place: Place, held: int) -> dict[str, Any]:
    """The fitted law of the packed steps, and its ridge."""
    shards = min(torch.get_num_threads(), MOST_SHARDS) if place.device.type == "cpu" else 1
    points = []
    for row in cells:
        length = min(chunks.ROW, row["tokens_per_lane"])
        points.append(Point(row["variants"], row["tokens_per_lane"] // length, length, 1, row["packed_ms"] / 1000))
    own = [point for point, row in zip(points, cells, strict=True) if not row["alone_on_several_cores"]]
    if not any(point.variants == 1 for point in own):
        own = points
    alone = Scored(1, 1, 0.0)
    found = fit(own, workers=1, shards=shards, per_variant=0.0, scored=alone, keep=0.0, tokens_per_pass=held)
    pace = replace(found.pace, shares=shards > 1)  # the law follows from steps that are not shared, as in a measurement
    for row, point in zip(cells, points, strict=True):
        row["fitted_ms"] = 1000 * pace.step(point.variants, row["tokens_per_lane"], point.length)
        row["fitted_gain"] = pace.gain(point.variants, row["tokens_per_lane"], point.length)
    return {
        "pace": pace.to_json(),
        "residual": found.residual,
        "residual_of_the_other_form": found.rejected,
        "ridge_tokens": pace.ridge(chunks.ROW),
    }


def matrix_rate(place: Place) -> float:
    """FLOP/s of a large matrix product on this device in this precision: what is there to be reached."""
    size = 8192 if place.device.type == "cuda" else 1536
    dtype = torch.bfloat16 if place.precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=place.device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        began = time.perf_counter()
        (left @ right)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def share_of_rate(row: Cell, shape: Shape, rate: float) -> float:
    """FLOP/s of a packed step as a share of the matrix rate; frozen weights count 4 FLOPs per token, as they are computed."""
    sizes = shape.sizes()
    length = min(chunks.ROW, row["tokens_per_lane"])
    flops = sizes.training_flops(sizes.lora_parameters(packing.RANK, packing.TARGETS), length)
    return flops * row["variants"] * row["tokens_per_lane"] / (row["packed_ms"] / 1000) / rate


# N processes at once ------------------------------------------------------------------------------------------------


def compare_with_processes(row: Cell, asked: argparse.Namespace, folder: Path, name: str, place: Place) -> None:
    """What was asked for and is not known of N PEFT processes: how fast they step at once, how much memory they take."""
    variants, tokens = row["variants"], row["tokens_per_lane"]
    if asked.processes and "processes_ms" not in row:
        row["processes_ms"] = processes_ms(folder, name, variants, tokens, place)
        row["gain_over_processes"] = row["processes_ms"] / row["packed_ms"]
        print(f"{tokens:>8}{variants:>5} {row['gain_over_processes']:.2f}x of {variants} processes at once", flush=True)
    if asked.memory and variants == MOST_PROCESSES and "memory_ratio" not in row:
        weighed = memory.measure(name, variants, tokens)
        row |= {key: weighed[key] for key in ("packed_mib", "processes_mib")} | {"memory_ratio": weighed["ratio"]}
        mib = f"{row['processes_mib']:.0f} / {row['packed_mib']:.0f} MiB = {row['memory_ratio']:.1f}x"
        print(f"{tokens:>8}{variants:>5} memory {mib}", flush=True)


def processes_ms(folder: Path, name: str, variants: int, tokens: int, place: Place) -> float:
    """Milliseconds in which N PEFT processes, all stepping at once, have made one step each."""
    out = Path(tempfile.mkdtemp(dir=folder.parent))
    command = [sys.executable, __file__, "--role", "stepper", "--shapes", name, "--lanes", str(tokens), "--variants"]
    command += [str(variants), "--folder", str(folder), "--out", str(out)]
    command += ["--device", place.device.type, "--precision", place.precision]
    threads = str(max(1, (os.cpu_count() or 1) // variants))
    children = [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": threads}) for _ in range(variants)]
    if any([child.wait() for child in children]):
        sys.exit("a PEFT process failed")
    told = [json.loads(path.read_text()) for path in out.glob("*.json")]
    return 1000 * variants / sum(row["steps"] / row["seconds"] for row in told)


def stepper(folder: Path, out: Path, shape: Shape, variants: int, tokens: int, place: Place) -> None:
    """One of N processes: step until all are warm, then count the steps of a window, and go on until all have counted."""
    side = chunks.sequential(folder, shape, 1, tokens, place, torch.get_num_threads())
    step = partial(side, 1)
    step()
    me = os.getpid()
    (out / f"{me}.warm").touch()
    while len(list(out.glob("*.warm"))) < variants:
        step()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < WINDOW_SECONDS or steps < 2:
        step()
        steps += 1
    seconds = time.perf_counter() - began
    (out / f"{me}.json").write_text(json.dumps({"steps": steps, "seconds": seconds}))
    while len(list(out.glob("*.json"))) < variants:
        step()


# ---------------------------------------------------------------------------------------------------------------------


def grid(asked: argparse.Namespace, name: str, place: Place) -> dict[str, Any]:
    """All cells of one base, from the smallest to the largest, and the law; those of other lanes as `beside` has them."""
    shape, cells = packing.shapes()[name], []
    before = [base for base in read_json(asked.beside)["bases"] if base["base"] == name] if asked.beside else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "base"
        packing.write_base(shape, folder)
        for tokens in asked.lanes:
            alone = best_threads(folder, shape, tokens, place, asked.threads, asked.seconds)
            for variants in asked.variants:
                row = cell(folder, shape, variants, tokens, place, asked.threads, alone, asked.seconds)
                gc.collect()
                if place.device.type == "cuda":
                    torch.cuda.empty_cache()
                row["load"] = machine.load_now()
                cells.append(row)
                print(line_of(row), flush=True)
        cells += [row for base in before for row in base["cells"] if row["tokens_per_lane"] not in asked.lanes]
        cells.sort(key=lambda row: (row["tokens_per_lane"], row["variants"]))
        for row in cells:
            if row["variants"] <= MOST_PROCESSES:
                compare_with_processes(row, asked, folder, name, place)
    torch.set_num_threads(asked.threads)
    rate = matrix_rate(place) if asked.lanes or not before else before[0]["matrix_flops"]
    for row in cells:
        row["share_of_matrix_rate"] = share_of_rate(row, shape, rate)
    held = packing.tokens_per_pass(shape, place)
    return {"base": name, "cells": cells, "matrix_flops": rate, "tokens_per_pass": held, **law_of(cells, place, held)}


def line_of(row: Cell) -> str:
    text = f"{row['tokens_per_lane']:>8}{row['variants']:>5}{row['sequential_ms']:>12.1f} ms ({row['sequential_threads']})"
    text += f"{row['packed_ms']:>10.1f} ms{row['gain']:>8.2f}x   {row['packed_form']}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--lanes", type=int, nargs="*", default=[64, 256, 1024], help="tokens per variant and step")
    parser.add_argument("--shapes", nargs="+", default=["tiny"], choices=["tiny", "wide", "qwen3-0.6b"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long to look at each cell")
    parser.add_argument("--processes", action="store_true", help=f"also N PEFT processes at once, N up to {MOST_PROCESSES}")
    parser.add_argument("--memory", action="store_true", help=f"also memory of both sides at N = {MOST_PROCESSES} (CPU)")
    parser.add_argument(
        "--beside", type=Path, help="JSON of an earlier run of this machine, for the lanes that are not asked for"
    )
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "ridge.json", help="also write JSON and SVG")
    for name in ("--role", "--folder", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if SPINNING not in os.environ:  # read when torch is loaded, so it needs another start; both sides gain by it
        quiet = {"DS_ACCELERATOR": "cpu"} if asked.device == "cpu" else {}  # or DeepSpeed, if it is there, notes what it finds
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, SPINNING: "1000", **quiet})
    packing.quieten()
    place = Place(torch.device(asked.device), asked.precision)
    if asked.role == "stepper":
        shape = packing.shapes()[asked.shapes[0]]
        return stepper(Path(asked.folder), Path(asked.out), shape, asked.variants[0], asked.lanes[0], place)
    torch.set_num_threads(asked.threads)
    told = []
    for name in asked.shapes:
        print(f"{name}: {'tokens':>{6 - len(name) + 2}}{'N':>5}{'PEFT (threads)':>19}{'packed':>13}{'gain':>9}   how")
        told.append(grid(asked, name, place))
        print(summary(told[-1]))
    if asked.json:
        device = torch.cuda.get_device_name() if asked.device == "cuda" else "cpu"
        content = {"machine": machine.describe(), "device": device, "precision": asked.precision, "threads": asked.threads}
        write_json(asked.json, {**content, "bases": told})
        for base in told:
            suffix = "" if len(told) == 1 else f"-{base['base']}"
            asked.json.with_name(f"{asked.json.stem}{suffix}.svg").write_text(ridge_plot.draw(base, device), encoding="utf-8")
    return None


def summary(told: dict[str, Any]) -> str:
    pace, cells = told["pace"], told["cells"]
    worst, best = (choose(cells, key=lambda row: row["gain"]) for choose in (min, max))
    return (
        f"law: {pace['kind']}, launch {1000 * pace['launch']:.1f} ms, residual {told['residual']:.1%} (the other form "
        f"{told['residual_of_the_other_form']:.1%}); ridge at {told['ridge_tokens']:,} tokens\n"
        f"gain from {worst['gain']:.2f}x ({worst['variants']} x {worst['tokens_per_lane']}) to {best['gain']:.2f}x "
        f"({best['variants']} x {best['tokens_per_lane']}); at most "
        f"{max(row['share_of_matrix_rate'] for row in cells):.0%} of {told['matrix_flops'] / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
