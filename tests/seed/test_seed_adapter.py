"""Adapters on disk: what we write loads in plain peft, what is wrong is refused by name."""

from __future__ import annotations

import io
import json
import math
import struct
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from chrysalis_ray.config.blueprint import Lora
from chrysalis_ray.core.errors import MergeError, ModelError
from chrysalis_ray.seed.adapter import CONFIG, WEIGHTS, AdapterWeights, read_adapter, write_adapter
from chrysalis_ray.seed.tensors import is_finite, tensor_bytes, write_floats
from chrysalis_ray.seed.zero import write_adapter_zero

CONFIG_OF_BASE = Qwen3Config(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, vocab_size=32, max_position_embeddings=32, tie_word_embeddings=True,
)  # fmt: skip


def base_model(rng_seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(rng_seed)
    return Qwen3ForCausalLM(CONFIG_OF_BASE).eval()


def adapter(rank: int = 3, alpha: float = 6.0, use_rslora: bool = False, rng_seed: int = 0) -> AdapterWeights:
    generator = torch.Generator().manual_seed(rng_seed)
    factors = {}
    for layer in range(2):
        for name, out in (("q_proj", 16), ("k_proj", 8)):
            a_ri = torch.randn(rank, 16, generator=generator)
            b_or = torch.randn(out, rank, generator=generator)
            factors[f"model.layers.{layer}.self_attn.{name}"] = (a_ri, b_or)
    return AdapterWeights("base", None, rank, alpha, use_rslora, ("k_proj", "q_proj"), factors)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_plain_peft_loads_what_we_write(tmp_path, use_rslora):
    weights = adapter(use_rslora=use_rslora)
    write_adapter(tmp_path / "a", weights)
    ids = torch.arange(8)[None]
    loaded = PeftModel.from_pretrained(base_model(), str(tmp_path / "a"))(ids).logits
    dense = base_model()
    with torch.no_grad():
        for module in weights.factors:
            dense.get_submodule(module).weight += weights.delta(module)
    torch.testing.assert_close(loaded, dense(ids).logits, atol=2e-5, rtol=1e-4)


def test_a_config_like_anothers_is_the_config_that_peft_would_give(tmp_path):
    write_adapter(tmp_path / "first", adapter(rank=5, alpha=7.5, use_rslora=True))
    asked = write_adapter(tmp_path / "asked", adapter(rank=3))
    like = write_adapter(tmp_path / "like", adapter(rank=3), like=tmp_path / "first")
    assert like == asked


def test_written_and_read_is_the_same_adapter_and_the_same_bytes(tmp_path):
    weights = adapter(alpha=5.5)
    first = write_adapter(tmp_path / "a", weights, card="# card\n", extra={"merge.json": b"{}"})
    second = write_adapter(tmp_path / "b", read_adapter(tmp_path / "a"))
    assert first == second
    again = read_adapter(tmp_path / "b")
    assert (again.rank, again.alpha, again.targets, again.base_model) == (3, 5.5, ("k_proj", "q_proj"), "base")
    for module, (a_ri, b_or) in weights.factors.items():
        assert torch.equal(again.factors[module][0], a_ri)
        assert torch.equal(again.factors[module][1], b_or)
    assert (tmp_path / "a" / "README.md").read_text() == "# card\n"
    assert (tmp_path / "a" / "merge.json").read_bytes() == b"{}"


def test_dropout_is_told_as_peft_spells_it(tmp_path):
    write_adapter(tmp_path / "a", replace(adapter(), dropout=0.15))
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["lora_dropout"] == 0.15
    assert LoraConfig.from_pretrained(str(tmp_path / "a")).lora_dropout == 0.15
    assert read_adapter(tmp_path / "a").dropout == 0.15
    for wrong in (1.0, -0.1, "much", True):
        config = json.loads((tmp_path / "a" / CONFIG).read_text())
        (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, "lora_dropout": wrong}))
        with pytest.raises(MergeError, match="lora_dropout"):
            read_adapter(tmp_path / "a")


def test_writing_again_keeps_foreign_files_and_leaves_no_litter(tmp_path):
    write_adapter(tmp_path / "a", adapter(rng_seed=1))
    (tmp_path / "a" / "notes.txt").write_text("mine")
    sha256 = write_adapter(tmp_path / "a", adapter(rng_seed=2))
    assert sha256 == write_adapter(tmp_path / "b", adapter(rng_seed=2))
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", CONFIG, "README.md", ""])
def test_extra_files_stay_in_the_folder(tmp_path, name):
    with pytest.raises(MergeError):
        write_adapter(tmp_path / "a", adapter(), extra={name: b""})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_loaded_is_not_written(tmp_path):
    good = adapter()
    module, (a_ri, b_or) = next(iter(good.factors.items()))
    for factors in (
        {},
        {module: (a_ri[:2], b_or)},
        {module: (a_ri, b_or.T.contiguous()[:, :1])},
        {module: (a_ri * float("nan"), b_or)},
        {"../x": (a_ri, b_or)},
        {"model.layers.0.mlp.up_proj": (a_ri, b_or)},
    ):
        with pytest.raises(MergeError):
            write_adapter(tmp_path / "a", AdapterWeights("base", None, 3, 6.0, False, ("q_proj",), factors))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_plain_peft_is_read(tmp_path):
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False,
                        rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3})  # fmt: skip
    model = get_peft_model(base_model(), config)
    model.save_pretrained(str(tmp_path / "a"))
    weights = read_adapter(tmp_path / "a")
    assert weights.rank == 4
    for module in weights.factors:
        layer = model.base_model.model.get_submodule(module)
        torch.testing.assert_close(weights.delta(module), layer.get_delta_weight("default"), atol=1e-6, rtol=1e-5)
    write_adapter(tmp_path / "b", weights)
    ids = torch.arange(8)[None]
    loaded = PeftModel.from_pretrained(base_model(), str(tmp_path / "b"))(ids).logits
    torch.testing.assert_close(loaded, model.eval()(ids).logits, atol=1e-5, rtol=1e-4)


def test_configs_of_other_peft_versions_are_read(tmp_path):
    write_adapter(tmp_path / "a", adapter())
    old = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj"], "bias": "none"}
    for config in (old, {**old, "a_key_of_2031": {"x": 1}, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}):
        (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
        assert read_adapter(tmp_path / "a").scale == 2.0
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**old, "target_modules": "(a+)+$"}))
    assert read_adapter(tmp_path / "a").targets == tuple(sorted(adapter().factors))


WRONG_CONFIGS = [
    {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"peft_type": "IA3"},
    {"peft_type": None}, {"r": 0}, {"r": "3"}, {"r": True}, {"r": 4}, {"lora_alpha": "6"}, {"lora_alpha": 0},
    {"lora_alpha": -1},
    {"use_rslora": "yes"}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "loftq"}, {"layer_replication": [[0, 2]]},
    {"trainable_token_indices": [1]}, {"target_parameters": ["w"]}, {"kasa_config": {"x": 1}},
    {"rank_pattern": {"(a+)+$": 2}},
    {"rank_pattern": {"q_proj": 2}}, {"rank_pattern": [1]},
    {"alpha_pattern": {"q_proj": "x"}}, {"alpha_pattern": {"q_proj": 0}}, {"base_model_name_or_path": 7},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG_CONFIGS, ids=json.dumps)
def test_a_config_that_changes_the_delta_is_refused(tmp_path, change):
    write_adapter(tmp_path / "a", adapter())
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(MergeError):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"r": 1, "r": 2}', b"\xff\xfe", b"[" * 100_000, b"NaN"])
def test_a_config_that_is_no_config_is_refused(tmp_path, text):
    write_adapter(tmp_path / "a", adapter())
    (tmp_path / "a" / CONFIG).write_bytes(text)
    with pytest.raises(MergeError):
        read_adapter(tmp_path / "a")


def wrong_tensors(name):
    tensors = {
        f"base_model.model.{m}.lora_{s}.weight": t for m, ab in adapter().factors.items() for s, t in zip("AB", ab, strict=True)
    }
    first = sorted(tensors)[0]
    if name == "nan":
        tensors[first][0, 0] = float("nan")
    elif name == "infinite":
        tensors[first][0, 0] = float("inf")
    elif name == "half a pair":
        del tensors[first]
    elif name == "transposed":
        tensors[first] = tensors[first].T.contiguous()
    elif name == "a vector":
        tensors[first] = tensors[first][0].clone()
    elif name == "integers":
        tensors[first] = tensors[first].to(torch.int8)
    elif name == "too large for fp32":
        tensors[first] = tensors[first].double() * 1e300
    elif name == "a magnitude":
        tensors[first.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(3)
    elif name == "a bias":
        tensors[first.replace("lora_A.weight", "lora_B.bias")] = torch.ones(3)
    elif name == "an embedding":
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(3, 4)
    elif name == "a path":
        tensors["base_model.model.../../etc/x.lora_A.weight"] = torch.ones(3, 16)
    elif name == "nothing":
        tensors = {}
    return tensors


@pytest.mark.parametrize("name", ["nan", "infinite", "half a pair", "transposed", "a vector", "integers", "too large for fp32",
                                  "a magnitude", "a bias", "an embedding", "a path", "nothing"])  # fmt: skip
def test_wrong_tensors_are_refused(tmp_path, name):
    write_adapter(tmp_path / "a", adapter())
    save_file(wrong_tensors(name), tmp_path / "a" / WEIGHTS)
    with pytest.raises(MergeError):
        read_adapter(tmp_path / "a")


def test_a_cut_file_is_refused_at_every_length(tmp_path):
    write_adapter(tmp_path / "a", adapter())
    whole = (tmp_path / "a" / WEIGHTS).read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        (tmp_path / "a" / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(MergeError):
            read_adapter(tmp_path / "a")
    for content in (whole + b"x", b"\xff" * 64, struct.pack("<Q", 2) + b"[]"):
        (tmp_path / "a" / WEIGHTS).write_bytes(content)
        with pytest.raises(MergeError):
            read_adapter(tmp_path / "a")


def test_a_tensor_named_twice_is_refused(tmp_path):
    write_adapter(tmp_path / "a", adapter())
    plain = save({"x": torch.ones(2)})
    (length,) = struct.unpack("<Q", plain[:8])
    entry = plain[8 : 8 + length].strip()[1:-1]
    header = b"{" + entry + b"," + entry + b"}"
    (tmp_path / "a" / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + plain[8 + length :])
    with pytest.raises(MergeError, match="twice"):
        read_adapter(tmp_path / "a")


def test_pickles_and_missing_files_are_refused(tmp_path):
    with pytest.raises(MergeError, match=CONFIG):
        read_adapter(tmp_path / "absent")
    write_adapter(tmp_path / "a", adapter())
    (tmp_path / "a" / WEIGHTS).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(MergeError, match="pickle"):
        read_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").unlink()
    with pytest.raises(MergeError, match=WEIGHTS):
        read_adapter(tmp_path / "a")


def test_half_precision_is_read_as_fp32(tmp_path):
    write_adapter(tmp_path / "a", adapter())
    half = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(tmp_path / "a" / WEIGHTS).items()}
    save_file(half, tmp_path / "a" / WEIGHTS)
    assert {t.dtype for ab in read_adapter(tmp_path / "a").factors.values() for t in ab} == {torch.float32}


# adapter zero -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    CONFIG_OF_BASE.save_pretrained(folder)
    return folder


def test_adapter_zero_has_the_modules_and_the_distribution_of_peft(tmp_path, base_folder):
    lora = Lora(rank=64, alpha=128.0)
    write_adapter_zero(base_folder, "base", lora, 64, 7, tmp_path / "zero")
    zero = read_adapter(tmp_path / "zero")
    real = get_peft_model(
        base_model(), LoraConfig(r=64, lora_alpha=128, target_modules=list(lora.targets), task_type="CAUSAL_LM")
    )
    theirs = {name.removesuffix(".lora_A.default.weight").removeprefix("base_model.model."): p
              for name, p in real.named_parameters() if "lora_A" in name}  # fmt: skip
    assert set(theirs) == set(zero.factors)
    for module, their_a in theirs.items():
        a_ri, b_or = zero.factors[module]
        assert a_ri.shape == their_a.shape
        assert not b_or.any()
        bound = a_ri.shape[1] ** -0.5
        for sample in (a_ri, their_a.detach()):
            assert 0.95 * bound < float(sample.abs().max()) <= bound
            assert abs(float(sample.mean())) < 0.12 * bound
            assert abs(float(sample.std()) / bound - 3**-0.5) < 0.06


def test_adapter_zero_is_one_function_of_rng_seed_and_module(tmp_path, base_folder):
    few, many = Lora(targets=("q_proj",)), Lora(targets=("up_proj", "q_proj"))
    first = write_adapter_zero(base_folder, "base", few, 4, 7, tmp_path / "a")
    assert first == write_adapter_zero(base_folder, "base", few, 4, 7, tmp_path / "b")
    assert first != write_adapter_zero(base_folder, "base", few, 4, 8, tmp_path / "c")
    write_adapter_zero(base_folder, "base", many, 4, 7, tmp_path / "d")
    small, large = read_adapter(tmp_path / "a"), read_adapter(tmp_path / "d")
    assert len(large.factors) == 2 * len(small.factors)
    for module in small.factors:
        assert torch.equal(small.factors[module][0], large.factors[module][0])


@pytest.mark.parametrize("target", ["q_porj", "embed_tokens", "self_attn"])
def test_a_target_that_is_not_linear_is_named_beside_those_that_are(tmp_path, base_folder, target):
    with pytest.raises(ModelError, match=r"down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"):
        write_adapter_zero(base_folder, "base", Lora(targets=("q_proj", target)), 4, 7, tmp_path / "a")


def test_a_base_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ModelError):
        write_adapter_zero(tmp_path, "base", Lora(), 4, 7, tmp_path / "a")


def test_what_is_written_a_tensor_at_a_time_has_the_bytes_of_the_library():
    tensors = {"b.lora_A.weight": torch.randn(3, 4), "b.c.lora_A.weight": torch.zeros(2, 0), "é.weight": torch.randn(1, 1)}
    stream = io.BytesIO()
    write_floats(stream, {name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__, "format", "pt")
    assert stream.getvalue() == save(tensors, metadata={"format": "pt"}) == tensor_bytes(tensors, "format", "pt")
    for wrong in (math.nan, math.inf, -math.inf):
        broken = {"a": torch.tensor([1.0, wrong, 2.0])}
        with pytest.raises(ValueError, match="holds 1 values that are not finite"):
            write_floats(io.BytesIO(), {"a": (3,)}, broken.__getitem__, "format", "pt")
    assert is_finite(torch.full((5,), 3e38))  # a sum beyond fp32 of values that are not
