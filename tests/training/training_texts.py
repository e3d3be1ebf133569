"""Real text in rows, in memory: the part of the token store that training reads, for tests that need no genome."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer

from chrysalis_ray.core.patterns import PLAIN, Patterns
from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import Engine, make_engine
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.trunk import checkpoint_activations

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTH = 48
STEPS = 20


@dataclass(frozen=True)
class Rows:
    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    document: np.ndarray
    bytes: ClassVar[None] = None  # how much text each token stands for is not known here


class TextTokens:
    """Documents packed into rows of `sequence_length`; of a domain in `masked` every document's first tokens carry no label."""

    def __init__(self, tokenizer: Tokenizer, texts: dict[str, Iterable[str]], masked: dict[str, int], length: int = LENGTH):
        self.sequence_length = length
        self.domains = tuple(sorted(texts))
        self._rows = {domain: self._packed(tokenizer, texts[domain], masked.get(domain, 0)) for domain in self.domains}

    def _packed(self, tokenizer: Tokenizer, texts: Iterable[str], masked: int) -> Rows:
        rows: list[list[list[int]]] = [[]]
        for text in texts:
            ids = tokenizer.encode(text).ids[: self.sequence_length]
            if sum(map(len, rows[-1])) + len(ids) > self.sequence_length:
                rows.append([])
            rows[-1].append(ids)
        shape = (len(rows), self.sequence_length)
        packed = Rows(np.zeros(shape, int), np.zeros(shape, int), np.full(shape, -100), np.full(shape, -1, np.int32))
        document = 0
        for number, row in enumerate(rows):
            start = 0
            for ids in row:
                end = start + len(ids)
                packed.input_ids[number, start:end] = ids
                packed.position_ids[number, start:end] = range(len(ids))
                packed.labels[number, start : end - 1] = ids[1:]
                packed.labels[number, start : start + masked] = -100
                packed.document[number, start:end] = document
                start, document = end, document + 1
        return packed

    def rows(self, domain: str, split: str) -> int:
        return len(self._rows[domain].labels)

    def token_count(self, domain: str, split: str) -> int:
        return int((self._rows[domain].document >= 0).sum())

    def label_counts(self, domain: str, split: str) -> np.ndarray:
        return (self._rows[domain].labels != -100).sum(1)

    def batch(self, domain_rows: Sequence[tuple[str, int]], split: str) -> Rows:
        def take(name: str) -> np.ndarray:
            return np.stack([getattr(self._rows[domain], name)[row] for domain, row in domain_rows])

        return Rows(take("input_ids"), take("position_ids"), take("labels"), take("document"))


def text_tokens(base: Path, length: int = LENGTH) -> TextTokens:
    """Lines of the argparse module's code and of its docstrings as two domains; several of them share a row."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    code = [line.strip()[:30] for line in inspect.getsource(argparse).splitlines() if len(line.strip()) > 8][:200]
    docs = [inspect.getdoc(value) or "" for value in vars(argparse).values() if inspect.isclass(value)]
    prose = [line.strip()[:40] for text in docs for line in text.splitlines() if len(line.strip()) > 8]
    return TextTokens(tokenizer, {"code": code, "prose": prose}, {"prose": 3}, length)


def variant(index: int, rank: int = 4, **changes: object) -> Variant:
    """Variant number `index`, with a mix of its own; `changes` are hyperparameters."""
    hyperparameters = Hyperparameters(rank=rank, **{"alpha": 8.0, "learning_rate": 2e-3, **changes})  # type: ignore[arg-type]
    return Variant(
        variant_id=f"v{index:02d}",
        index=index,
        rng_seed=100 + index,
        seed_sha256="0" * 64,
        genome_id="texts",
        base_sha256="0" * 64,
        hyperparameters=hyperparameters,
        epigenome=Epigenome({"code": 1.0 + index, "prose": 2.0}),
        steps=STEPS,
        chunk_steps=5,
        rows_per_step=2,
        sequence_length=LENGTH,
    )


def new_pack(
    base: Path,
    slots: int,
    *,
    rank: int = 8,
    lanes: str = "compacted",
    dtype: torch.dtype = torch.float32,
    engine: Engine | None = None,
    targets: Sequence[str] = PROJECTIONS,
    threads: int = 1,
    recompute: bool = False,
    quantization: str = "none",
    gradients: str = "whole",
    tokens_per_pass: int | None = None,
    patterns: Patterns = PLAIN,
) -> Pack:
    precision = {torch.float32: "fp32", torch.float64: "fp64"}[dtype]
    engine = engine or make_engine(0, "none", precision, "cpu")
    model = load_base(base, precision, quantization)
    if recompute:
        checkpoint_activations(model)
    shape = {"lanes": lanes, "dtype": dtype, "threads": threads, "gradients": gradients, "tokens_per_pass": tokens_per_pass}
    return Pack(model, targets, slots, rank, engine, patterns=patterns, **shape)  # type: ignore[arg-type]


def fresh_adapter(pack: Pack, index: int) -> dict[str, torch.Tensor]:
    """An adapter of the bank's largest rank drawn from `index`; B is not zero, so that A learns from the first step."""
    generator, rank = torch.Generator().manual_seed(index), pack.bank.patterns.largest(pack.bank.rank)
    tensors = {}
    for target in pack.bank.targets:
        a_ri = torch.randn(rank, target.in_features, generator=generator) / target.in_features**0.5
        b_or = torch.randn(target.out_features, rank, generator=generator) * 0.02
        tensors[f"weight/{target.name}.lora_A"], tensors[f"weight/{target.name}.lora_B"] = a_ri, b_or
    return tensors


def place_fresh(pack: Pack, slot: int, variant: Variant) -> None:
    pack.place(slot, variant, fresh_adapter(pack, variant.index), {"optimizer_step": 0})


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference, as a share of the largest value."""
    assert left.keys() == right.keys()
    size = max(tensor.abs().max().item() for tensor in right.values())
    return max((left[name] - right[name]).abs().max().item() for name in left) / size


def weights(pack: Pack, slot: int) -> dict[str, torch.Tensor]:
    """Only the weights of a slot."""
    tensors, _ = pack.harvest(slot)
    return {name: tensor for name, tensor in tensors.items() if name.startswith("weight/")}
