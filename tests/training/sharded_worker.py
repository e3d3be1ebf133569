"""One of several gloo processes of a data-parallel pack; run by the tests, not collected by them.

python sharded_worker.py OUT_FOLDER RANK WORLD CASE=BASE ...

CASE: whole | sharded | offloaded | nvme | batches | fixed | patterns | strict | strict-sharded | solo | adalora; all but the
last four also with "-layered" after it. What an nvme case keeps on disk lies in OUT_FOLDER.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from training_texts import PROJECTIONS, new_pack, place_fresh, text_tokens, variant

from chrysalis_ray.config.adapters import AdaLora
from chrysalis_ray.config.blueprint import Lora
from chrysalis_ray.core.patterns import PLAIN, Patterns
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import ReplicatedEngine, ShardedEngine
from chrysalis_ray.training.owners import sum_to_owners
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.packed import find_targets
from chrysalis_ray.training.solo import SoloPack
from chrysalis_ray.training.step import train_chunk


def train_solo(base: Path, worn: Lora | AdaLora) -> dict[str, torch.Tensor]:
    """The seed of a variant that no pack can hold after a few steps, resumed once in between."""
    torch.set_num_threads(1)
    model = load_base(base, "fp32")
    pack, own = SoloPack(model, worn, ReplicatedEngine(torch.device("cpu"))), variant(0, rank=4, epsilon=1e-4)
    own = replace(own, steps=6)
    shapes = {target.name: target for target in find_targets(load_base(base, "fp32"), PROJECTIONS)}
    zero = {f"weight/{name}.lora_A": torch.full((4, shape.in_features), 0.01) for name, shape in shapes.items()}
    tokens = text_tokens(base)
    pack.place(0, own, zero, {"optimizer_step": 0})
    for _ in range(2):
        train_chunk(pack, [0], tokens, 3)  # type: ignore[arg-type]
        tensors, meta = pack.harvest(0)
        pack.place(0, own, tensors, meta)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("running/")}  # the owner's alone
    return {**tensors, "scores": pack.score([0], tokens.batch([("code", 0)], "select")), "moments": own_moments(pack)}


OWNERS = (0, 0, 2, 2, 2)  # of the rows below; the second of three workers owns none


def rows_of(worker: int) -> torch.Tensor:
    """Five rows of numbers in two parts whose sum depends on the order."""
    return torch.randn(5, 2, 1000, generator=torch.Generator().manual_seed(worker)) * 1000.0**worker


def owned_sums() -> dict[str, torch.Tensor]:
    """The rows that this worker owns, summed over all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    total = sum_to_owners(rows_of(rank), OWNERS, rank, world)
    told = dict(zip([f"{row}/gradient" for row, owner in enumerate(OWNERS) if owner == rank], total, strict=True))
    return {"moments": torch.zeros(1), **told}


def own_moments(pack: Pack) -> torch.Tensor:
    """Numbers that this worker keeps in optimizers."""
    counts = (tensor.numel() for seat in pack._occupants.values() for tensor in seat.optimizer.moments().values())
    return torch.tensor(float(sum(counts)))


def train_case(case: str, base: Path, disk: Path | None = None) -> dict[str, torch.Tensor]:
    """Gradients, losses, scores and seeds of three variants after a few steps, together and apart."""
    if case == "solo":
        return train_solo(base, Lora(use_dora=True, modules_to_save=("norm",), targets=PROJECTIONS))
    if case == "adalora":
        return train_solo(base, AdaLora(type="adalora", targets=PROJECTIONS, rank=4, target_r=2, tinit=1, tfinal=1))
    if case == "sums":
        return owned_sums()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    layered, case = case.endswith("-layered"), case.removesuffix("-layered")
    offload = {"offloaded": "cpu", "nvme": "nvme"}.get(case, "none")
    replicated = case in ("whole", "batches", "fixed", "patterns", "strict")
    virtual = 4 if case.startswith("strict") else None
    if replicated:
        engine = ReplicatedEngine(cpu, virtual)
    else:
        engine = ShardedEngine(cpu, offload, "fp32", persist=0, virtual_workers=virtual, nvme_path=str(disk))
    lanes, gradients = "fixed" if case == "fixed" or virtual else "compacted", "sharded" if layered else "whole"
    patterns = Patterns({"down_proj": 12, "layers.0.self_attn.q_proj": 1}, {"v_proj": 3.0}) if case == "patterns" else PLAIN
    pack = new_pack(base, 3, engine=engine, lanes=lanes, gradients=gradients, patterns=patterns)
    sizes, at_once = ((1, 2, 5), 2) if case in ("batches", "fixed") else ((3, 6, 5), 5) if virtual else ((2, 2, 2), None)
    for index in range(3):
        # AdamW divides by the gradient's size: with a tiny epsilon the rounding of a gradient that is nearly zero is blown up
        kind = ("adamw", "nadam", "sgd")[index] if case == "batches" else "adamw"
        member = variant(index, rank=(8, 4, 2)[index], epsilon=1e-4, optimizer=kind, momentum=0.0)
        place_fresh(pack, index, replace(member, rows_per_step=sizes[index]))
    tokens = text_tokens(base)
    result, losses = {}, []
    for steps in (1, 4):
        metrics = train_chunk(pack, [0, 1, 2], tokens, steps, at_once)  # type: ignore[arg-type]
        losses.append([metric.train_loss for metric in metrics])
        for slot in range(3):
            seat = pack.occupant(slot)
            if seat.owner in (None, engine.rank) and seat.optimizer.gradient_P is not None:  # summed there alone
                result.setdefault(f"{slot}/gradient", seat.optimizer.gradient_P.clone())
        for slot in range(3):  # what is kept apart is put together in a seed, and taken apart again
            pack.place(slot, pack.occupant(slot).variant, *pack.harvest(slot))
    train_chunk(pack, [2, 0], tokens, 2, at_once)  # type: ignore[arg-type]
    result["scores"] = pack.score([0, 1, 2], tokens.batch([("code", 0), ("prose", 1)], "select"))  # type: ignore[arg-type]
    result["losses"] = torch.tensor(losses, dtype=torch.float64)
    for slot in range(3):
        tensors, meta = pack.harvest(slot)
        result |= {f"{slot}/{name}": tensor for name, tensor in tensors.items()}
        result[f"{slot}/counted"] = torch.tensor([meta["updates"], *meta.get("scalars", {}).values()], dtype=torch.float64)
    result["moments"] = own_moments(pack)
    scratch = 0 if pack.bank.scratch is None else pack.bank.scratch.numbers_SW.numel()
    rows = [row.numel() for row in pack._own_gradients.values()]
    result["gradient_numbers"] = torch.tensor([pack.bank.gflat_SP.numel(), sum(rows), scratch])
    if not replicated:
        parameters = list(pack.shards.all[0].trunk.parameters())
        result["own_share"] = torch.tensor(sum(p.ds_tensor.numel() for p in parameters) / sum(p.ds_numel for p in parameters))
    return result


def main(out: str, rank: str, world: str, *cases: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=int(rank), world_size=int(world))
    for number, case in enumerate(cases):
        kind, _, base = case.partition("=")
        save_file(train_case(kind, Path(base), Path(out)), Path(out) / f"{number}.{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
