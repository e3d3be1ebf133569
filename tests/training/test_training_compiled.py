"""Compiled layers compute what eager ones do; static shapes are compiled once; what cannot be compiled is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training_texts import TextTokens, distance, new_pack, place_fresh, same, variant, weights

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.compiled import compile_layers
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.planning.hardware import check_compiler
from chrysalis_ray.training.step import train_chunk

ALL = range(3)


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


def full(base: Path, **options: object) -> Pack:
    pack = new_pack(base, 3, lanes="fixed", **options)
    for slot in ALL:
        place_fresh(pack, slot, variant(slot, rank=(8, 4, 2)[slot], epsilon=1e-4, dropout=(0.0, 0.1, 0.0)[slot]))
    return pack


def compiled_frames() -> int:
    return torch._dynamo.utils.counters["frames"]["ok"]


@pytest.mark.parametrize("recompute", [False, True])
def test_graphs_run_eagerly_give_the_same_bits(recompute: bool, tiny_base: Path, tokens: TextTokens) -> None:
    """The graphs are right; and when the shapes are known, nothing is compiled any more."""
    plain, graphs = full(tiny_base, recompute=recompute), full(tiny_base, recompute=recompute)
    compile_layers(graphs, backend="eager")
    batch = tokens.batch([("code", 0), ("prose", 1)], "select")
    for pack in (plain, graphs):
        train_chunk(pack, ALL, tokens, 2)
        pack.score(ALL, batch)
    known = compiled_frames()
    assert known > 0
    for pack in (plain, graphs):
        train_chunk(pack, (0, 2), tokens, 2)  # a lane that rests keeps its shape
    assert torch.equal(plain.score(ALL, batch), graphs.score(ALL, batch))
    assert all(same(plain.harvest(slot)[0], graphs.harvest(slot)[0]) for slot in ALL)
    assert compiled_frames() == known


def test_graphs_with_a_backward_of_their_own_agree(tiny_base: Path, tokens: TextTokens) -> None:
    plain, graphs = full(tiny_base), full(tiny_base)
    compile_layers(graphs, backend="aot_eager")
    for pack in (plain, graphs):
        train_chunk(pack, ALL, tokens, 3)
    assert all(distance(weights(graphs, slot), weights(plain, slot)) <= 1e-5 for slot in ALL)


@pytest.mark.slow
def test_kernels_of_inductor_agree(tiny_base: Path, tokens: TextTokens) -> None:
    check_compiler(on_gpu=False)
    plain, kernels = full(tiny_base), full(tiny_base)
    compile_layers(kernels)
    for pack in (plain, kernels):
        train_chunk(pack, ALL, tokens, 3)
    assert all(distance(weights(kernels, slot), weights(plain, slot)) <= 1e-4 for slot in ALL)


def test_what_cannot_be_compiled_is_refused(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="only fixed lanes"):
        compile_layers(new_pack(tiny_base, 2, lanes="compacted"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ModelError, match="needs a C\\+\\+ compiler"):
        check_compiler(on_gpu=False)
