"""What it costs several workers to share the gradients of a pack out: memory, numbers sent, seconds.

    python benchmarks/gradients.py [--workers 2 4] [--slots 8] [--rank 64] [--json FILE]

For each number of gloo workers on this machine, in fresh processes of one thread each:

    sums     the gradients of all slots summed by all-reduce on everybody (what was done before), and each on its owner alone
    training a few steps with `body.gradients` whole and sharded: the peak of memory of a worker, seconds per step

Random weights, random tokens, small lanes: little of the memory is activations, so that what gradients take can be seen.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

from chrysalis_ray.core.records import read_json, write_json

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS, LENGTH, STEPS, REPEATS = 16, 32, 3, 3


def work(order: dict[str, Any], rank: int) -> dict[str, float]:
    """One worker of one kind; what it tells is the same on all but for its peak."""
    import torch
    import torch.distributed as dist
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant
    from chrysalis_ray.training.engine import ReplicatedEngine
    from chrysalis_ray.training.measuring import synthetic_tokens
    from chrysalis_ray.training.memory import peak_memory
    from chrysalis_ray.training.owners import sum_to_owners
    from chrysalis_ray.training.pack import Pack
    from chrysalis_ray.training.step import train_chunk

    torch.set_num_threads(1)
    cpu, world, slots = torch.device("cpu"), order["workers"], order["slots"]
    dist.init_process_group("gloo", init_method=f"file://{order['folder']}/store", rank=rank, world_size=world)
    if order["kind"] == "sums":
        rows_SW = torch.randn(slots, 1 << 20, generator=torch.Generator().manual_seed(rank))
        owners = sorted(slot % world for slot in range(slots))
        told = {}
        for name, summed in (
            ("all_reduce", lambda: dist.all_reduce(rows_SW.clone())),
            ("to_owners", lambda: sum_to_owners(rows_SW[:, None].clone(), owners, rank, world)),
        ):
            seconds = []
            for _ in range(REPEATS):
                dist.barrier()
                began = time.perf_counter()
                summed()
                dist.barrier()
                seconds.append(time.perf_counter() - began)
            told[name] = min(seconds)
        return told
    config = Qwen3Config(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).requires_grad_(False).eval()
    pack = Pack(model, TARGETS, slots, order["rank"], ReplicatedEngine(cpu), gradients=order["kind"])
    for slot in range(slots):
        variant = Variant(
            variant_id=f"g{slot}", index=slot, rng_seed=slot, seed_sha256="", genome_id="measured", base_sha256="",
            hyperparameters=Hyperparameters(rank=order["rank"], learning_rate=1e-5), epigenome=Epigenome({"measured": 1.0}),
            steps=100, chunk_steps=1, rows_per_step=world, sequence_length=LENGTH,
        )  # fmt: skip
        tensors = {}
        for target in pack.bank.targets:
            tensors[f"weight/{target.name}.lora_A"] = torch.full((order["rank"], target.in_features), 0.01)
            tensors[f"weight/{target.name}.lora_B"] = torch.zeros(target.out_features, order["rank"])
        pack.place(slot, variant, tensors, {"optimizer_step": 0})
    tokens, everyone = synthetic_tokens(LENGTH, 512), list(range(slots))
    train_chunk(pack, everyone, tokens, 1)
    began = time.perf_counter()
    train_chunk(pack, everyone, tokens, STEPS)
    return {"step": (time.perf_counter() - began) / STEPS, "peak": peak_memory(cpu), "row": pack.bank.row_size * 4}


def run(kind: str, workers: int, slots: int, rank: int) -> list[dict[str, float]]:
    """What every worker told."""
    with tempfile.TemporaryDirectory() as folder:
        order = {"kind": kind, "workers": workers, "slots": slots, "rank": rank, "folder": folder}
        write_json(Path(folder) / "order.json", order)
        command = [sys.executable, __file__, "--order", f"{folder}/order.json", "--number"]
        processes = [subprocess.Popen([*command, str(number)]) for number in range(workers)]
        if any([process.wait() for process in processes]):
            sys.exit("a worker failed")
        return [read_json(Path(folder) / f"{number}.json") for number in range(workers)]


def compare(workers: int, slots: int, rank: int) -> dict[str, Any]:
    sums, whole, sharded = (run(kind, workers, slots, rank) for kind in ("sums", "whole", "sharded"))
    peaks = {kind: max(told["peak"] for told in all_told) for kind, all_told in (("whole", whole), ("sharded", sharded))}
    share = (workers - 1) / workers
    return {
        "workers": workers,
        "row_mib": whole[0]["row"] / 2**20,
        # a ring all-reduce sends every number twice, less a worker's own share; stepped rows then go out once
        "rows_sent_per_worker": {"all_reduce": round(2 * share * slots, 2), "to_owners": round(share * slots, 2)},
        "sum_seconds": {name: max(told[name] for told in sums) for name in sums[0]},
        "peak_mib": {kind: round(peak / 2**20) for kind, peak in peaks.items()},
        "saved_mib": round((peaks["whole"] - peaks["sharded"]) / 2**20),
        "gradients_whole_mib": round(slots * whole[0]["row"] / 2**20),
        "step_seconds": {"whole": max(t["step"] for t in whole), "sharded": max(t["step"] for t in sharded)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--order", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.order:
        write_json(arguments.order.with_name(f"{arguments.number}.json"), work(read_json(arguments.order), arguments.number))
        return
    results = [compare(workers, arguments.slots, arguments.rank) for workers in arguments.workers]
    told = {"machine": machine.describe(), "slots": arguments.slots, "rank": arguments.rank, "results": results}
    print(json.dumps(told, indent=2))
    if arguments.json:
        write_json(arguments.json, told)


if __name__ == "__main__":
    main()
