"""Merging N adapters of Qwen3-0.6B's shapes: time and peak memory, ours against PEFT and against reading and writing the files.

    python benchmarks/merge.py
    python benchmarks/merge.py --adapters 8 --rank 16 --peft-layers 1 --json

Adapters are random: a merge does not know better. Ours is `chrysalis merge` after its imports: opening, hashing, merging all 28
layers, writing. PEFT's is `add_weighted_adapter(combination_type="svd")` alone, without loading anything, on a model of
`--peft-layers` of the 28 layers, which are all alike; its seconds are multiplied up. PEFT's memory is that of a process which
has loaded the base in bf16 and all adapters, before it merges anything: a lower bound. The limit is reading every input, and
writing and syncing as many bytes as come out. Every side is a process of its own; memory is the kernel's peak resident size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine

from chrysalis_ray.core.records import write_json

RESULTS = Path(__file__).resolve().parent / "results"
LAYERS = 28
# out, in of every target of one layer
SHAPES = {
    "self_attn.q_proj": (2048, 1024), "self_attn.k_proj": (1024, 1024), "self_attn.v_proj": (1024, 1024),
    "self_attn.o_proj": (1024, 2048), "mlp.gate_proj": (3072, 1024), "mlp.up_proj": (3072, 1024), "mlp.down_proj": (1024, 3072),
}  # fmt: skip
OURS = ("ensemble", "consensus", "ties")


def base_config(layers: int) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers,
                       num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)  # fmt: skip


def write_adapters(folder: Path, count: int, rank: int, layers: int) -> None:
    """`count` adapters of random factors, as PEFT folders."""
    import torch

    from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter

    targets = tuple(name.rpartition(".")[2] for name in SHAPES)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        factors = {
            f"model.layers.{layer}.{name}": (
                torch.randn(rank, inn, generator=generator) / inn**0.5, torch.randn(out, rank, generator=generator) / out**0.5
            )
            for layer in range(layers)
            for name, (out, inn) in SHAPES.items()
        }  # fmt: skip
        weights = AdapterWeights(str(folder / "base"), None, rank, 2.0 * rank, False, targets, factors)
        write_adapter(folder / f"layers{layers}" / f"a{number}", weights)


def play_ours(folder: Path, count: int, rank: int, method: str) -> dict[str, Any]:
    from chrysalis_ray.config.merges import read_merge
    from chrysalis_ray.evaluate.folders import merge_folders

    spec = read_merge(method, [f"rank={rank}"])
    names = [str(folder / f"layers{LAYERS}" / f"a{number}") for number in range(count)]
    told, manifest = timed(lambda: merge_folders(names, spec, folder / f"out-{method}"))
    return {**told, "residual": manifest["residual"]}


def play_peft(folder: Path, count: int, rank: int, layers: int, merge: bool) -> dict[str, Any]:
    """PEFT with its base and all adapters in memory; with `merge` also its SVD merge, which is all that is timed."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(base_config(layers), dtype=torch.bfloat16)
    for number in range(count):
        adapter = folder / f"layers{layers}" / f"a{number}"
        if number == 0:
            model = PeftModel.from_pretrained(model, str(adapter), adapter_name="a0")
        else:
            model.load_adapter(str(adapter), adapter_name=f"a{number}")
    if not merge:
        return {"seconds": 0.0, "cpu_seconds": 0.0}
    names = [f"a{number}" for number in range(count)]
    weights = [1.0 / count] * count
    told, _ = timed(lambda: model.add_weighted_adapter(names, weights, "merged", combination_type="svd", svd_rank=rank))
    return {**{key: value * LAYERS / layers for key, value in told.items()}, "measured": told, "layers": layers}


def play_limit(folder: Path, count: int) -> dict[str, Any]:
    def read_and_write() -> None:
        size = 0
        for number in range(count):
            size = len((folder / f"layers{LAYERS}" / f"a{number}" / "adapter_model.safetensors").read_bytes())
        with (folder / "written").open("wb") as stream:
            stream.write(bytes(size))
            os.fsync(stream.fileno())

    return timed(read_and_write)[0]


def timed(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """What `work` took, by the clock and on all cores together: the second is less disturbed by others on the machine."""
    began, busy = time.perf_counter(), time.process_time()
    result = work()
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - busy}, result


def peak_mib() -> float:
    """The kernel's peak resident size of this process since it began, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


def sides(count: int, rank: int, methods: list[str], peft_layers: int, repeats: int) -> Iterator[dict[str, Any]]:
    """One row per side, each from a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        for layers in {LAYERS, peft_layers}:
            write_adapters(Path(temporary), count, rank, layers)
        roles = ["limit", "ours: ensemble", "peft: svd", "peft: loaded"]
        roles += [f"ours: {method}" for method in methods if method != "ensemble"]
        for role in roles:
            answers = []
            for repeat in range(1 if role.startswith("peft") else repeats):
                common = [f"--adapters={count}", f"--rank={rank}", f"--peft-layers={peft_layers}", f"--folder={temporary}"]
                command = [sys.executable, __file__, f"--role={role}", f"--repeat={repeat}", *common]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                answers.append(json.loads(done.stdout.splitlines()[-1]))
            best = min(answers, key=lambda answer: answer["seconds"])
            yield {"side": role, **best, "all_seconds": [answer["seconds"] for answer in answers], "load": machine.load_now()}


def play(asked: argparse.Namespace) -> dict[str, Any]:
    folder = Path(asked.folder)
    side, _, what = asked.role.partition(": ")
    if side == "ours":
        target = folder / f"repeat{asked.repeat}"
        target.mkdir(exist_ok=True)
        if not (target / f"layers{LAYERS}").exists():
            (target / f"layers{LAYERS}").symlink_to(folder / f"layers{LAYERS}")
        answer = play_ours(target, asked.adapters, asked.rank, what)
    elif side == "peft":
        layers = LAYERS if what == "loaded" else asked.peft_layers
        answer = play_peft(folder, asked.adapters, asked.rank, layers, what == "svd")
    else:
        answer = play_limit(folder, asked.adapters)
    return {**answer, "peak_mib": peak_mib()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--methods", nargs="*", default=list(OURS), choices=OURS, help="of ours; ensemble always")
    parser.add_argument("--peft-layers", type=int, default=1, help="of 28; PEFT's seconds are multiplied up")
    parser.add_argument("--repeats", type=int, default=3, help="of our sides and the limit; the fastest counts")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "merge.json", help="also write JSON, by default here")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.role:
        print(json.dumps(play(asked)))
        return
    rows = []
    print(f"{'side':<20}{'seconds':>10}{'CPU s':>10}{'peak MiB':>10}")
    for row in sides(asked.adapters, asked.rank, asked.methods, asked.peft_layers, asked.repeats):
        rows.append(row)
        print(f"{row['side']:<20}{row['seconds']:>10.2f}{row['cpu_seconds']:>10.2f}{row['peak_mib']:>10.0f}", flush=True)
    by = {row["side"]: row for row in rows}
    ours = by["ours: ensemble"]
    ratios = {
        "peft_svd_to_ours": by["peft: svd"]["seconds"] / ours["seconds"],
        "peft_svd_to_ours_in_cpu_seconds": by["peft: svd"]["cpu_seconds"] / ours["cpu_seconds"],
        "ours_to_limit": ours["seconds"] / by["limit"]["seconds"],
        "peft_memory_to_ours_at_least": by["peft: loaded"]["peak_mib"] / ours["peak_mib"],
    }
    print("\n".join(f"{name:<32}{value:>8.1f}x" for name, value in ratios.items()))
    if asked.json:
        content = {
            "machine": machine.describe(),
            "adapters": asked.adapters,
            "rank": asked.rank,
            "rows": rows,
            "ratios": ratios,
        }
        write_json(asked.json, content)


if __name__ == "__main__":
    main()
