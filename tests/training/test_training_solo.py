"""What no pack can hold trains as plain PEFT would train it, is resumed to the bit, and is left as a folder that PEFT loads."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from training_texts import PROJECTIONS, TextTokens, new_pack, variant, weights

from chrysalis_ray.config.blueprint import Lora
from chrysalis_ray.core.errors import MergeError, ModelError
from chrysalis_ray.core.records import Variant
from chrysalis_ray.seed.adapter import AdapterWeights, read_adapter, write_adapter
from chrysalis_ray.seed.solo import quiet, read_solo, release_adapter, write_solo
from chrysalis_ray.seed.soul import pack_seed, unpack_seed
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import ReplicatedEngine
from chrysalis_ray.training.lanes import Feed
from chrysalis_ray.training.schedules import learning_rate_at
from chrysalis_ray.training.solo import SoloPack
from chrysalis_ray.training.step import train_chunk
from chrysalis_ray.training.trunk import checkpoint_activations

STEPS = 8
PRECISIONS = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "norms": {"modules_to_save": ("norm", "input_layernorm")},
    "head": {"modules_to_save": ("lm_head", "embed_tokens"), "use_dora": True},
    "patterns": {
        "use_dora": True,
        "rank_pattern": {"layers.0.mlp.down_proj": 1, "down_proj": 8, "q_proj": 2},
        "alpha_pattern": {"o_proj": 20.0, "q_proj": 3.0},
    },
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
}
EXACT = ("dora", "bias", "norms", "head", "patterns")  # peft moves a base in fp32 alone


def solo(base: Path, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> SoloPack:
    model = load_base(base, PRECISIONS[dtype])
    if options.pop("recompute", False):
        checkpoint_activations(model)
    lora = Lora(targets=PROJECTIONS, **KINDS.get(kind, {}))
    rows = torch.float64 if dtype == torch.float64 else torch.float32
    return SoloPack(model, lora, ReplicatedEngine(torch.device("cpu"), **options), dtype=rows)


def member(index: int = 0, **changes: Any) -> Variant:
    return variant(index, **{"rank": 4, "learning_rate": 1e-3, "weight_decay": 0.1, "clip": 0.5, "epsilon": 1e-4, **changes})


def zero_of(base: Path) -> dict[str, torch.Tensor]:
    """Adapter zero of rank 8: A is drawn, B is zero."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, module in load_base(base, "fp32").named_modules():
        if name.endswith(PROJECTIONS):
            out_features, in_features = module.weight.shape
            tensors[f"weight/{name}.lora_A"] = torch.randn(8, in_features, generator=generator) / in_features**0.5
            tensors[f"weight/{name}.lora_B"] = torch.zeros(out_features, 8)
    return tensors


def by_plain_peft(base: Path, kind: str, own: Variant, tokens: TextTokens, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The adapter's state after all steps of a loop that a user of peft would write."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    hyper, settings = own.hyperparameters, dict(KINDS[kind])
    config = LoraConfig(
        r=hyper.rank, lora_alpha=hyper.alpha, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM",
        init_lora_weights=settings.pop("init", True),
        **{key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
    )  # fmt: skip
    with quiet():
        model = get_peft_model(load_base(base, PRECISIONS[dtype]), config).eval()
    if kind not in ("pissa", "olora"):
        zero = zero_of(base)
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_A"):
                a_ri = zero[f"weight/{name.removeprefix('base_model.model.')}.lora_A"]
                layer.lora_A["default"].weight.data = a_ri[: layer.r["default"]].to(dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(parameters, eps=hyper.epsilon, weight_decay=hyper.weight_decay)
    feed = Feed(own, tokens)
    for step in range(STEPS):
        rows = tokens.batch(feed.step(step).rows, "train")
        adamw.param_groups[0]["lr"] = learning_rate_at(hyper, step, own.steps)
        logits = model(
            input_ids=torch.from_numpy(rows.input_ids), position_ids=torch.from_numpy(rows.position_ids), use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(rows.labels).flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, hyper.clip)
        adamw.step()
    with quiet():
        return {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}


def base_of(kind: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("tiny_untied_base" if kind == "head" else "tiny_base")


@pytest.mark.parametrize("kind", KINDS)
def test_a_solo_variant_is_what_plain_peft_makes_of_it(kind: str, tokens: TextTokens, request: pytest.FixtureRequest) -> None:
    base, dtype = base_of(kind, request), torch.float64 if kind in EXACT else torch.float32
    pack = solo(base, kind, dtype)
    pack.place(0, member(), zero_of(base), {"optimizer_step": 0})
    start = weights(pack, 0)
    metrics = train_chunk(pack, [0], tokens, STEPS)
    alone = by_plain_peft(base, kind, member(), tokens, dtype)
    mine = {name.removeprefix("weight/"): tensor for name, tensor in weights(pack, 0).items()}
    assert mine.keys() == alone.keys()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name, tensor in alone.items():
        assert (mine[name] - tensor).abs().max().item() <= tolerance, name
        moved = (mine[name] - start[f"weight/{name}"]).abs().max().item()
        assert moved > 1e-4, name  # all of it was trained
    assert metrics[0].train_loss is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_variant_that_goes_on_from_its_seed_ends_with_the_same_bytes(
    kind: str, tokens: TextTokens, request: pytest.FixtureRequest
) -> None:
    """Another variant has worn the base in between."""
    base = base_of(kind, request)
    whole, first = solo(base, kind), solo(base, kind)
    for pack, steps in ((whole, STEPS), (first, 3)):
        pack.place(0, member(dropout=0.1), zero_of(base), {"optimizer_step": 0})
        train_chunk(pack, [0], tokens, steps)
    kept = pack_seed(*first.harvest(0))
    first.place(0, member(1, rank=2), zero_of(base), {"optimizer_step": 0})
    train_chunk(first, [0], tokens, 2)
    for pack in (first, solo(base, kind)):
        pack.place(0, member(dropout=0.1), *unpack_seed(kept))
        train_chunk(pack, [0], tokens, STEPS - 3)
        assert sha256(pack_seed(*pack.harvest(0))).digest() == sha256(pack_seed(*whole.harvest(0))).digest()


@pytest.mark.parametrize("kind", KINDS)
def test_its_folder_gives_plain_peft_the_same_logits(
    kind: str, tokens: TextTokens, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from peft import PeftModel

    base = base_of(kind, request)
    pack = solo(base, kind)
    batch = tokens.batch([("code", 0), ("prose", 1)], "select")
    pack.clear(0)
    before = pack.score([0], batch)
    pack.place(0, member(), zero_of(base), {"optimizer_step": 0})
    train_chunk(pack, [0], tokens, STEPS)
    scored = pack.score([0], batch)
    folder = left_of(pack, base, tmp_path)

    with quiet():
        model = PeftModel.from_pretrained(load_base(base, "fp32"), folder).eval()
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten(), reduction="none"
    ).view(scored.shape[1:])
    torch.testing.assert_close(scored[0], losses, rtol=0, atol=2e-5)
    assert (scored - before).abs().max() > 1e-2

    judge = solo(base, kind)
    if kind in ("pissa", "olora"):
        adapter = read_adapter(folder)  # a plain LoRA, on the base that was not moved
        assert adapter.rank == 2 * member().hyperparameters.rank
        judge.load_adapter(0, adapter.factors, adapter.scale)
    else:
        with pytest.raises(MergeError):
            read_adapter(folder)
        judge.load_solo(0, *read_solo(folder, judge.worn))
    torch.testing.assert_close(judge.score([0], batch), scored, rtol=0, atol=2e-5)
    judge.clear(0)
    assert torch.equal(judge.score([0], batch), before)
    assert release_adapter(folder, tmp_path / "imago", card="# card\n")
    assert (tmp_path / "imago" / "README.md").read_text() == "# card\n"


def left_of(pack: SoloPack, base: Path, folder: Path) -> Path:
    """The PEFT folder that is left of the variant in a solo pack."""
    tensors, meta = pack.harvest(0)
    zero = zero_of(base)
    factors = {
        name.removeprefix("weight/").removesuffix(".lora_A"): (a_ri, zero[f"{name[:-1]}B"])
        for name, a_ri in zero.items()
        if name.endswith("A")
    }
    write_adapter(folder / "seed", AdapterWeights(str(base), None, 8, 8.0, False, PROJECTIONS, factors))
    content, told = unpack_seed(pack_seed(tensors, meta))
    write_solo(folder / "adapter", content, told, pack.occupant(0).variant.hyperparameters, folder / "seed")
    return folder / "adapter"


def test_a_plain_lora_with_dropout_in_the_solo_body_is_the_packed_one(tiny_base: Path, tokens: TextTokens) -> None:
    """The masks of dropout, too."""
    alone, packed = solo(tiny_base, "plain", torch.float64), new_pack(tiny_base, 2, dtype=torch.float64)
    own = member(dropout=0.2, plus_ratio=4.0)
    for pack in (alone, packed):
        pack.place(0, own, zero_of(tiny_base), {"optimizer_step": 0})
        train_chunk(pack, [0], tokens, STEPS)
    mine, theirs = weights(alone, 0), weights(packed, 0)
    for name, tensor in theirs.items():
        assert (mine[f"{name}.weight"] - tensor).abs().max().item() <= 1e-12


def test_recomputed_activations_change_no_bit(tiny_base: Path, tokens: TextTokens) -> None:
    plain, recomputed = solo(tiny_base, "dora"), solo(tiny_base, "dora", recompute=True)
    for pack in (plain, recomputed):
        pack.place(0, member(dropout=0.1), zero_of(tiny_base), {"optimizer_step": 0})
        train_chunk(pack, [0], tokens, 3)
    assert pack_seed(*plain.harvest(0)) == pack_seed(*recomputed.harvest(0))


def test_whole_modules_of_a_bf16_base_have_fp32_masters(tiny_base: Path, tokens: TextTokens) -> None:
    pack = solo(tiny_base, "norms", torch.bfloat16)
    pack.place(0, member(learning_rate=1e-4), zero_of(tiny_base), {"optimizer_step": 0})
    metrics = train_chunk(pack, [0], tokens, STEPS)
    norms = {name: tensor for name, tensor in weights(pack, 0).items() if name.endswith("norm.weight")}
    assert metrics[0].train_loss is not None
    for tensor in norms.values():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float())  # steps too small for bf16 add up in the master
        assert (tensor - 1.0).abs().max() > 1e-5


def test_a_variant_whose_gradient_is_no_number_is_evicted(tiny_base: Path, tokens: TextTokens) -> None:
    pack = solo(tiny_base, "dora")
    pack.place(0, member(), zero_of(tiny_base), {"optimizer_step": 0})
    pack.bank.flat_SP.fill_(float("nan"))
    (metrics,) = train_chunk(pack, [0], tokens, 4)
    assert (metrics.state, metrics.skipped, metrics.train_loss) == ("evicted", 4, None)


def test_what_does_not_suit_is_refused_with_the_reason(tiny_base: Path) -> None:
    def start(**settings: Any) -> None:
        pack = SoloPack(load_base(tiny_base, "fp32"), Lora(**settings), ReplicatedEngine(torch.device("cpu")))
        pack.place(0, member(), zero_of(tiny_base), {"optimizer_step": 0})

    with pytest.raises(ModelError, match="tied"):
        start(modules_to_save=("lm_head",))
    with pytest.raises(ModelError, match="no module of the base ends so"):
        start(modules_to_save=("classifier",))
    with pytest.raises(ModelError, match="holds modules of"):
        start(modules_to_save=("self_attn",))
    with pytest.raises(ModelError, match="does not have"):
        start(use_dora=True, targets=("query",))
    pack = solo(tiny_base, "dora")
    pack.place(0, member(), zero_of(tiny_base), {"optimizer_step": 0})
    tensors, meta = pack.harvest(0)
    with pytest.raises(ModelError, match="same rank"):
        pack.place(0, member(rank=2), tensors, meta)
    with pytest.raises(ModelError, match="not of this blueprint"):
        solo(tiny_base, "norms").place(0, member(), tensors, meta)
