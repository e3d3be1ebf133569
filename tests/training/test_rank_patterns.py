"""Modules with ranks and alphas of their own, by peft's `rank_pattern` and `alpha_pattern`: in a pack, exactly as in peft."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training_against_peft import VARIANTS, largest_difference, train_alone
from training_texts import PROJECTIONS, TextTokens, new_pack, place_fresh, same, variant, weights

from chrysalis_ray.config.blueprint import Lora
from chrysalis_ray.core.errors import ModelError, StoreCorrupt
from chrysalis_ray.core.patterns import PLAIN, Patterns
from chrysalis_ray.core.records import Variant
from chrysalis_ray.evaluate.judging import passes
from chrysalis_ray.evaluate.subjects import Candidate
from chrysalis_ray.population.harvest import adapter_of
from chrysalis_ray.seed.adapter import read_adapter, write_adapter
from chrysalis_ray.seed.solo import quiet, release_adapter
from chrysalis_ray.seed.soul import pack_seed, unpack_seed
from chrysalis_ray.seed.zero import write_adapter_zero
from chrysalis_ray.training.bank import Bank, Target
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.packed import PackedLinear
from chrysalis_ray.training.step import train_chunk

# One narrower and one wider than any variant, q, k and v of one layer together, one layer's module apart from the others'.
RANKS = {"layers.1.mlp.down_proj": 2, "down_proj": 12, "layers.0.self_attn.q_proj": 3, "layers.0.self_attn.k_proj": 3,
         "layers.0.self_attn.v_proj": 3, "gate_proj": 1}  # fmt: skip
ALPHAS = {"o_proj": 40.0, "layers.0.mlp.up_proj": 1.0, "down_proj": 6.0}
PATTERNS = Patterns(RANKS, ALPHAS)
THEIRS = {"rank_pattern": RANKS, "alpha_pattern": ALPHAS}
MEMBERS = tuple(replace(member, steps=8) for member in VARIANTS)


def patterned(base: Path, members: tuple[Variant, ...] = MEMBERS, **options: object) -> Pack:
    pack = new_pack(base, len(members), patterns=PATTERNS, **options)  # type: ignore[arg-type]
    for slot, member in enumerate(members):
        place_fresh(pack, slot, member)
    return pack


@pytest.mark.parametrize(
    ("dtype", "tolerance", "path"),
    [(torch.float64, 1e-12, "together"), (torch.float64, 1e-12, "module by module"), (torch.float32, 1e-5, "together")],
)
def test_a_pack_of_patterns_equals_separate_peft(
    dtype: torch.dtype, tolerance: float, path: str, tiny_base: Path, tokens: TextTokens
) -> None:
    """Variants of ranks 8, 4, 2 and 6, one of them with rsLoRA, under one pattern."""
    pack = patterned(tiny_base, dtype=dtype)
    for module in pack.shards.all[0].trunk.modules():
        if isinstance(module, PackedLinear) and path == "module by module":  # as on a sharded or quantised base
            module.group = None
    train_chunk(pack, range(len(MEMBERS)), tokens, 8)
    for slot, member in enumerate(MEMBERS):
        packed, alone = weights(pack, slot), train_alone(tiny_base, pack, member, tokens, dtype, **THEIRS)
        exact = alone if dtype == torch.float64 else train_alone(tiny_base, pack, member, tokens, torch.float64, **THEIRS)
        as_exact = dtype == torch.float32 and largest_difference(packed, exact) <= largest_difference(alone, exact)
        assert {name: value.shape for name, value in packed.items()} == {name: value.shape for name, value in alone.items()}
        assert largest_difference(packed, alone) <= tolerance or as_exact


def test_a_bank_is_as_wide_as_its_patterns_say_and_no_wider() -> None:
    targets = [Target(name, 64, 32) for name in ("a.q_proj", "a.k_proj", "a.v_proj")]
    plain, narrow = Bank(targets, 2, 16), Bank(targets, 2, 16, patterns=Patterns({"q_proj": 4}, {"v_proj": 3.0}))
    assert plain.row_size - narrow.row_size == 12 * (64 + 32)
    assert (plain.room, narrow.room) == (16, 4)
    assert plain.neighbours(["a.q_proj", "a.k_proj", "a.v_proj"])
    assert not narrow.neighbours(["a.q_proj", "a.k_proj"])
    assert not narrow.neighbours(["a.k_proj", "a.v_proj"])  # of one width, but counted otherwise


@pytest.mark.parametrize("threads", [1, 2])
def test_neighbours_and_slots_are_not_felt_under_patterns(threads: int, tiny_base: Path, tokens: TextTokens) -> None:
    """Bit for bit: a neighbour of NaN, and slots exchanged; with dropout in one of them."""
    members = tuple(variant(k, rank=rank, dropout=0.2 * (k == 2)) for k, rank in enumerate((8, 4, 16, 8)))
    calm, poisoned = (patterned(tiny_base, members, rank=16, threads=threads) for _ in range(2))
    poisoned.bank.flat_SP[1].fill_(float("nan"))
    shuffled = patterned(tiny_base, tuple(members[k] for k in (2, 0, 3, 1)), rank=16, threads=threads)
    for pack, slots in ((calm, range(4)), (poisoned, range(4)), (shuffled, (1, 3, 0, 2))):
        train_chunk(pack, slots, tokens, 3)
    assert all(same(calm.harvest(slot)[0], poisoned.harvest(slot)[0]) for slot in (0, 2, 3))
    assert all(same(calm.harvest(k)[0], shuffled.harvest(slot)[0]) for slot, k in enumerate((2, 0, 3, 1)))


def test_a_seed_of_patterns_goes_on_to_the_bit_in_another_slot(tiny_base: Path, tokens: TextTokens) -> None:
    through, until = (patterned(tiny_base, lanes="fixed") for _ in range(2))
    train_chunk(through, range(4), tokens, 6)
    train_chunk(until, range(4), tokens, 3)
    seeds = [unpack_seed(pack_seed(*until.harvest(slot))) for slot in range(4)]
    later = new_pack(tiny_base, 4, patterns=PATTERNS, lanes="fixed")
    for slot, (tensors, meta) in enumerate(reversed(seeds)):
        later.place(slot, MEMBERS[3 - slot], tensors, meta)
    train_chunk(later, range(4), tokens, 3)
    assert all(same(through.harvest(slot)[0], later.harvest(3 - slot)[0]) for slot in range(4))


def test_seeds_of_other_patterns_are_refused(tiny_base: Path, tokens: TextTokens) -> None:
    pack = patterned(tiny_base)
    train_chunk(pack, [0], tokens, 1)
    tensors, meta = pack.harvest(0)
    for other in (PLAIN, Patterns({**RANKS, "gate_proj": 2}, ALPHAS)):
        with pytest.raises(ModelError, match="rank_pattern"):
            new_pack(tiny_base, 1, patterns=other).place(0, MEMBERS[0], tensors, meta)
    for wrong in ({}, {"ranks": {"down_proj": 12}}, {"ranks": [3]}, "x"):
        with pytest.raises(ValueError, match=r"rank|patterns"):
            pack_seed(tensors, {**meta, "patterns": wrong})
    torn = pack_seed(tensors, meta).replace(b'gate_proj\\":1', b'gate_proj\\":2')
    with pytest.raises(StoreCorrupt, match="by its patterns"):
        unpack_seed(torn)


def test_a_folder_of_patterns_is_what_plain_peft_loads_and_what_is_read_again(
    tiny_base: Path, tokens: TextTokens, tmp_path: Path
) -> None:
    """Adapter zero, a trained variant as a folder, the same in peft, read, judged in slots, and released."""
    lora = Lora(rank=4, alpha=8.0, targets=PROJECTIONS, rank_pattern=RANKS, alpha_pattern=ALPHAS)
    write_adapter_zero(tiny_base, str(tiny_base), lora, lora.patterns.largest(4), 17, tmp_path / "seed")
    zero = read_adapter(tmp_path / "seed")
    pack, own = new_pack(tiny_base, 2, rank=4, patterns=lora.patterns), replace(MEMBERS[1], steps=8)
    begun = {f"weight/{m}.lora_{side}": t for m, pair in zero.factors.items() for side, t in zip("AB", pair, strict=True)}
    pack.place(0, own, begun, {"optimizer_step": 0})
    train_chunk(pack, [0], tokens, 4)
    tensors, meta = pack.harvest(0)
    folder, batch = tmp_path / "v01", tokens.batch([("code", 0), ("prose", 1)], "select")
    adapter = adapter_of(tensors, own.hyperparameters, zero, Patterns.from_json(meta["patterns"]))
    write_adapter(folder, adapter, like=tmp_path / "seed")
    expected = pack.score([0], batch)[0]

    from peft import PeftModel

    with quiet():
        loaded = PeftModel.from_pretrained(load_base(tiny_base, "fp32"), folder).eval()
    layers = {n.removeprefix("base_model.model."): m for n, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert {layer.r["default"] for layer in layers.values()} == {1, 2, 3, 4, 12}
    for name, layer in layers.items():
        assert layer.scaling["default"] == pytest.approx(PATTERNS.kind_of(name).scale(own.hyperparameters), rel=1e-12)
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    with torch.no_grad():
        logits = loaded(input_ids=ids, position_ids=positions, use_cache=False).logits
    labels = torch.from_numpy(batch.labels)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    torch.testing.assert_close(expected, losses, rtol=0, atol=2e-5)

    wide = {
        module: (torch.randn(9, a.shape[1]) / 8, torch.randn(b.shape[0], 9) / 8) for module, (a, b) in adapter.factors.items()
    }
    write_adapter(tmp_path / "wide", replace(zero, rank=9, alpha=9.0, factors=wide))
    found = {}
    for group, score, _, _ in passes(pack, [Candidate("v01", str(folder)), Candidate("wide", str(tmp_path / "wide"))], Path):
        found |= dict(zip((each.name for each in group), score(batch).losses, strict=True))
    torch.testing.assert_close(found["v01"], expected, rtol=0, atol=1e-6)  # in a slot: it fits to the last number
    with pytest.raises(ModelError, match="does not fit"):
        pack.load_adapter(1, wide, 1.0)
    release_adapter(folder, tmp_path / "imago", card="card")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "imago" / name).read_bytes() == (folder / name).read_bytes()


def test_keys_mean_what_they_mean_to_peft_in_any_order() -> None:
    from peft.utils.other import get_pattern_key

    names = [f"model.layers.{n}.{m}" for n in (0, 1, 11) for m in ("mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj")]
    told = PATTERNS.written(names)
    for pattern in (RANKS, told["rank_pattern"], dict(sorted(told["rank_pattern"].items()))):
        for name in names:
            assert pattern.get(get_pattern_key(pattern, name), 7) == PATTERNS.rank_of(name, 7)
    assert PATTERNS.written(names)["alpha_pattern"] == ALPHAS  # no key hides another: as it was written


def test_patterns_that_mean_nothing_are_refused_before_anything_trains(tiny_base: Path, tmp_path: Path) -> None:
    for pattern, words in (
        ({"layers.9.self_attn.q_proj": 2}, "no such module"),
        ({"self_atn.q_proj": 2}, r"did you mean 'self_attn\.q_proj'\?"),
        ({"q_proj": 1000}, "smaller side"),
    ):
        lora = Lora(targets=PROJECTIONS, rank_pattern=pattern)
        with pytest.raises(ModelError, match=words):
            write_adapter_zero(tiny_base, str(tiny_base), lora, lora.patterns.largest(8), 17, tmp_path / "seed")
