"""On a real genome: variants learn, each the domain that its mix brightens."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
from training_texts import new_pack, place_fresh, variant

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.records import Epigenome
from chrysalis_ray.genome.build import build_genome
from chrysalis_ray.genome.tokens import TokenStore, tokenize_genome
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.step import train_chunk

STEPS = 24


@pytest.fixture(scope="module")
def store(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Python source and columns of numbers, as two domains."""
    root = tmp_path_factory.mktemp("genome")
    for domain in ("code", "numbers"):
        (root / domain).mkdir()
    for number, block in enumerate(inspect.getsource(argparse).split("\n\n\n")):
        (root / "code" / f"{number}.txt").write_text(block)
        squares = "\n".join(f"{value} {value * value + number}" for value in range(number, 3 * number + 30))
        (root / "numbers" / f"{number}.txt").write_text(squares)
    sources = [{"type": "folder", "path": name, "domain": name} for name in ("code", "numbers")]  # no path of this machine
    spec = GenomeSpec.model_validate({"sources": sources, "split": {"select": 0.2, "report": 0.2}})
    return tokenize_genome(build_genome(spec, root / "genome", root), tiny_base, root / "tokens", 48)


def select_loss(pack: Pack, store: TokenStore, slot: int, domain: str) -> float:
    rows = store.batch([(domain, row) for row in range(min(8, store.rows(domain, "select")))], "select")
    return pack.score([slot], rows).sum().item() / (rows.labels != -100).sum().item()


def test_a_variant_learns_what_its_epigenome_expresses(tiny_base: Path, store: TokenStore) -> None:
    pack = new_pack(tiny_base, 2)
    for slot, express in enumerate(({"code": 1.0}, {"numbers": 1.0})):
        member = variant(slot, rank=8, learning_rate=2e-2, alpha=16.0)
        place_fresh(pack, slot, replace(member, epigenome=Epigenome(express), steps=STEPS, rows_per_step=4))
    before = {domain: [select_loss(pack, store, slot, domain) for slot in range(2)] for domain in store.domains}
    first = train_chunk(pack, [0, 1], store, STEPS // 2)
    last = train_chunk(pack, [0, 1], store, STEPS // 2)
    for slot, own, other in ((0, "code", "numbers"), (1, "numbers", "code")):
        assert set(last[slot].domain_tokens) == {own}
        assert last[slot].tokens == STEPS * 4 * 48
        assert (last[slot].train_loss or 9.9) < (first[slot].train_loss or 0.0)
        learnt = before[own][slot] - select_loss(pack, store, slot, own)
        assert learnt > 0.03, learnt  # the frozen head of a random base leaves little room
        assert learnt > before[other][slot] - select_loss(pack, store, slot, other)
