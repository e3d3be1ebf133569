"""Merging N adapters: time and peak memory, ours against PEFT and against reading and writing the files.

    python benchmarks/merge.py
    python benchmarks/merge.py --ours ensemble --peft svd --json
    python benchmarks/merge.py --model qwen3-8b --ours ensemble --peft svd --peft-targets q_proj k_proj v_proj --no-peft-loaded

Adapters are random, of every linear module of the model: a merge does not know better. Ours is `chrysalis merge` after its
imports: opening, hashing, merging all layers, writing, syncing. PEFT's is `add_weighted_adapter` alone, without loading or
saving anything, on one layer of the model, of `--peft-targets` only where the whole layer would take too long (then it is a
lower bound); its seconds are multiplied by the number of layers, which are all alike. Every side is measured several times,
ours and the limit turn by turn; of each the run in the middle counts, and all are kept. PEFT's memory is that of a process
which has loaded the base in bf16 and all adapters, before it merges anything: a lower bound too. The limit is reading every
input, and writing and syncing as many bytes as come out, of `ensemble-uncut`, where nothing is cut, N times as many. Every side
is a process of its own; memory is the kernel's peak resident size. CPU seconds are those of all cores: on a busy machine the
better measure, though OpenMP spends some on waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import machine

from chrysalis_ray.core.records import write_json

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Model:
    """Sizes of a Qwen3, as its config calls them."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    tied: bool
    head_dim: int = 128

    def shapes(self) -> dict[str, tuple[int, int]]:
        """out, in of every linear module of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up = (self.intermediate, self.hidden)
        return {
            "self_attn.q_proj": (queries, self.hidden), "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden), "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": (self.hidden, self.intermediate),
        }  # fmt: skip

    def config(self, layers: int) -> Any:
        from transformers import Qwen3Config

        return Qwen3Config(
            vocab_size=151936, hidden_size=self.hidden, intermediate_size=self.intermediate, num_hidden_layers=layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=self.head_dim,
            tie_word_embeddings=self.tied,
        )  # fmt: skip


MODELS = {
    "qwen3-0.6b": Model(28, 1024, 3072, 16, 8, tied=True),
    "qwen3-8b": Model(36, 4096, 12288, 32, 8, tied=False),
}
# side -> method and settings; {rank} is that of the adapters, {columns} the sum of all ranks: nothing is cut
OURS = {
    "ensemble": ("ensemble", ["rank={rank}"]),
    "ensemble-uncut": ("ensemble", ["rank={columns}"]),
    "slerp": ("slerp", ["rank={rank}"]),
    "consensus": ("consensus", ["rank={rank}"]),
    "ties": ("ties", ["rank={rank}"]),
    "ties-dense": ("ties", ["rank={rank}", "space=dense"]),
}
PEFT = {"svd": {}, "ties_svd": {"density": 0.2}}
# what of ours does the same as what of PEFT's
SAME = {"svd": "ensemble", "ties_svd": "ties-dense"}


def write_adapters(folder: Path, model: Model, count: int, rank: int, layers: int, targets: Sequence[str]) -> None:
    """`count` adapters of random factors, as PEFT folders."""
    import torch

    from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter

    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        factors = {
            f"model.layers.{layer}.{name}": (
                torch.randn(rank, inn, generator=generator) / inn**0.5, torch.randn(out, rank, generator=generator) / out**0.5
            )
            for layer in range(layers)
            for name, (out, inn) in model.shapes().items() if name.rpartition(".")[2] in targets
        }  # fmt: skip
        weights = AdapterWeights(str(folder / "base"), None, rank, 2.0 * rank, False, tuple(targets), factors)
        write_adapter(folder / f"a{number}", weights)


def play_ours(adapters: Path, out: Path, count: int, rank: int, side: str) -> dict[str, Any]:
    from chrysalis_ray.config.merges import read_merge
    from chrysalis_ray.evaluate.folders import merge_folders

    method, settings = OURS[side]
    spec = read_merge(method, [text.format(rank=rank, columns=rank * count) for text in settings])
    told, manifest = timed(lambda: merge_folders([str(adapters / f"a{number}") for number in range(count)], spec, out))
    shutil.rmtree(out)
    return {**told, "residual": manifest["residual"]}


def play_peft(adapters: Path, model: Model, count: int, rank: int, layers: int, kind: str | None) -> dict[str, Any]:
    """PEFT with `layers` of its base and all adapters in memory; with `kind` also a merge, which is all that is timed."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_config(model.config(layers), dtype=torch.bfloat16)
    for number in range(count):
        adapter = str(adapters / f"a{number}")
        if number == 0:
            loaded = PeftModel.from_pretrained(loaded, adapter, adapter_name="a0")
        else:
            loaded.load_adapter(adapter, adapter_name=f"a{number}")
    if kind is None:
        return {"seconds": 0.0, "cpu_seconds": 0.0}
    names = [f"a{number}" for number in range(count)]
    told, _ = timed(
        lambda: loaded.add_weighted_adapter(
            names, [1.0 / count] * count, "merged", combination_type=kind, svd_rank=rank, **PEFT[kind]
        )
    )
    return {**{key: value * model.layers for key, value in told.items()}, "measured": told, "layers": layers}


def play_limit(adapters: Path, count: int, outputs: int) -> dict[str, Any]:
    """Read every adapter, write and sync as many bytes as `outputs` of them have."""

    def read_and_write() -> None:
        size = 0
        for number in range(count):
            size = len((adapters / f"a{number}" / "adapter_model.safetensors").read_bytes())
        with (adapters / "written").open("wb") as stream:
            for _ in range(outputs):
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


def sides(asked: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """One row per side, each from a process of its own, turn by turn: what disturbs one disturbs them all."""
    model = MODELS[asked.model]
    every_target = [name.rpartition(".")[2] for name in model.shapes()]
    write_adapters(folder / "whole", model, asked.adapters, asked.rank, model.layers, every_target)
    write_adapters(folder / "part", model, asked.adapters, asked.rank, 1, asked.peft_targets or every_target)
    roles = ["limit", *(["limit: uncut"] if "ensemble-uncut" in asked.ours else [])]
    roles += [f"ours: {side}" for side in asked.ours]
    answers: dict[str, list[dict[str, Any]]] = {}
    for _ in range(asked.repeats):
        for role in roles:
            answers.setdefault(role, []).append(in_a_process(asked, folder, role))
    for role in [f"peft: {kind}" for kind in asked.peft]:
        answers[role] = [in_a_process(asked, folder, role) for _ in range(asked.peft_repeats)]
    if asked.peft_loaded:
        answers["peft: loaded"] = [in_a_process(asked, folder, "peft: loaded")]
    for role, own in answers.items():
        yield {"side": role, **in_the_middle(own), "all_seconds": [answer["seconds"] for answer in own],
               "all_cpu_seconds": [answer["cpu_seconds"] for answer in own]}  # fmt: skip


def in_the_middle(answers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The run as many others were slower than as were faster; of an even number, the faster one of the two."""
    return sorted(answers, key=lambda answer: answer["seconds"])[(len(answers) - 1) // 2]


def in_a_process(asked: argparse.Namespace, folder: Path, role: str) -> dict[str, Any]:
    common = [f"--adapters={asked.adapters}", f"--rank={asked.rank}", f"--model={asked.model}", f"--folder={folder}"]
    done = subprocess.run([sys.executable, __file__, f"--role={role}", *common], check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "load": machine.load_now()}


def play(asked: argparse.Namespace) -> dict[str, Any]:
    folder, model = Path(asked.folder), MODELS[asked.model]
    side, _, what = asked.role.partition(": ")
    if side == "ours":
        answer = play_ours(folder / "whole", folder / "out", asked.adapters, asked.rank, what)
    elif side == "peft" and what == "loaded":
        answer = play_peft(folder / "whole", model, asked.adapters, asked.rank, model.layers, None)
    elif side == "peft":
        answer = play_peft(folder / "part", model, asked.adapters, asked.rank, 1, what)
    else:
        answer = play_limit(folder / "whole", asked.adapters, asked.adapters if what == "uncut" else 1)
    return {**answer, "peak_mib": peak_mib()}


def ratios_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Ours against PEFT and the limit, by the clock and by CPU seconds, and PEFT's memory against ours."""
    ratios = {}
    for kind, side in SAME.items():
        peft, ours = rows.get(f"peft: {kind}"), rows.get(f"ours: {side}")
        if peft and ours:
            ratios[f"peft_{kind}_to_ours"] = peft["seconds"] / ours["seconds"]
            ratios[f"peft_{kind}_to_ours_in_cpu_seconds"] = median_low(peft["all_cpu_seconds"]) / median_low(
                ours["all_cpu_seconds"]
            )
            least = min(peft["all_seconds"]) / max(ours["all_seconds"])  # the fastest of theirs, the slowest of ours
            ratios[f"peft_{kind}_to_ours_at_least"] = least
    for role, row in rows.items():
        if role.startswith("ours: "):
            name = role.removeprefix("ours: ")
            limit = rows["limit: uncut" if name == "ensemble-uncut" else "limit"]
            ratios[f"{name}_to_limit"] = row["seconds"] / limit["seconds"]
            if "peft: loaded" in rows:
                ratios[f"peft_memory_to_{name}_at_least"] = rows["peft: loaded"]["peak_mib"] / row["peak_mib"]
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--ours", nargs="*", default=list(OURS), choices=OURS)
    parser.add_argument("--peft", nargs="*", default=list(PEFT), choices=PEFT)
    parser.add_argument("--peft-targets", nargs="*", help="of one layer, the only modules that PEFT merges")
    parser.add_argument("--peft-loaded", action=argparse.BooleanOptionalAction, default=True, help="PEFT's memory, too")
    parser.add_argument("--repeats", type=int, default=5, help="of our sides and the limit; the run in the middle counts")
    parser.add_argument("--peft-repeats", type=int, default=3, help="of each of PEFT's kinds of merge")
    parser.add_argument("--json", type=Path, nargs="?", const=Path(), help="also write JSON, by default here")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.role:
        print(json.dumps(play(asked)))
        return
    rows = []
    print(f"{'side':<20}{'seconds':>10}{'CPU s':>10}{'peak MiB':>10}")
    with tempfile.TemporaryDirectory() as temporary:
        for row in sides(asked, Path(temporary)):
            rows.append(row)
            print(f"{row['side']:<20}{row['seconds']:>10.2f}{row['cpu_seconds']:>10.2f}{row['peak_mib']:>10.0f}", flush=True)
    ratios = ratios_of({row["side"]: row for row in rows})
    print("\n".join(f"{name:<44}{value:>8.1f}x" for name, value in ratios.items()))
    if asked.json is not None:
        path = asked.json if asked.json != Path() else RESULTS / f"merge-{asked.model}.json"
        content = {key: getattr(asked, key) for key in ("model", "adapters", "rank", "peft_targets")}
        write_json(path, {"machine": machine.describe(), **content, "rows": rows, "ratios": ratios})


if __name__ == "__main__":
    main()
