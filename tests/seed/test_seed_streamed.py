"""An adapter read a module at a time is the adapter that is read at once, and is refused for the same reasons."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_seed_adapter import WRONG_CONFIGS, adapter, base_model, wrong_tensors

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.seed.adapter import CONFIG, WEIGHTS, AdapterWeights, read_adapter, write_adapter
from chrysalis_ray.seed.streamed import open_adapter


@pytest.mark.parametrize("use_rslora", [False, True])
def test_of_any_ranks_and_alphas_the_deltas_are_the_same(tmp_path, use_rslora):
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, use_rslora=use_rslora,
                        rank_pattern={"layers.1.self_attn.q_proj": 6}, alpha_pattern={"v_proj": 3})  # fmt: skip
    get_peft_model(base_model(), config).save_pretrained(str(tmp_path / "a"))
    whole, streamed = read_adapter(tmp_path / "a"), open_adapter(tmp_path / "a")
    assert (streamed.rank, streamed.targets, streamed.base_model) == (whole.rank, whole.targets, whole.base_model)
    assert list(streamed.factors) == list(whole.factors)
    assert streamed.factors.shape("model.layers.1.self_attn.q_proj") == (16, 6, 16)
    for module in whole.factors:
        torch.testing.assert_close(streamed.delta(module), whole.delta(module), atol=1e-6, rtol=1e-5)


def test_half_precision_is_read_as_fp32(tmp_path):
    write_adapter(tmp_path / "a", adapter())
    half = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(tmp_path / "a" / WEIGHTS).items()}
    save_file(half, tmp_path / "a" / WEIGHTS)
    whole, streamed = read_adapter(tmp_path / "a"), open_adapter(tmp_path / "a")
    for module in whole.factors:
        assert torch.equal(streamed.factors[module][0], whole.factors[module][0])
        assert torch.equal(streamed.factors[module][1], whole.factors[module][1])


def read_through(folder):
    for _ in open_adapter(folder).factors.values():
        pass


@pytest.mark.parametrize("change", WRONG_CONFIGS, ids=json.dumps)
def test_the_same_configs_are_refused(tmp_path, change):
    write_adapter(tmp_path / "a", adapter())
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(MergeError):
        read_through(tmp_path / "a")


@pytest.mark.parametrize("name", ["nan", "infinite", "half a pair", "transposed", "a vector", "integers", "too large for fp32",
                                  "a magnitude", "a bias", "an embedding", "a path", "nothing"])  # fmt: skip
def test_the_same_tensors_are_refused(tmp_path, name):
    write_adapter(tmp_path / "a", adapter())
    save_file(wrong_tensors(name), tmp_path / "a" / WEIGHTS)
    with pytest.raises(MergeError):
        read_through(tmp_path / "a")


def test_cut_files_twins_and_pickles_are_refused_before_anything_is_read(tmp_path):
    write_adapter(tmp_path / "a", adapter())
    path = tmp_path / "a" / WEIGHTS
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    entry = whole[8 : 8 + length].strip()[1:-1]
    twins = b"{" + entry + b"," + entry + b"}"
    cuts = [whole[:size] for size in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1)]
    for content in (*cuts, whole + b"x", b"\xff" * 64, len(twins).to_bytes(8, "little") + twins + whole[8 + length :]):
        path.write_bytes(content)
        with pytest.raises(MergeError):
            open_adapter(tmp_path / "a")
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(MergeError, match="pickle"):
        open_adapter(tmp_path / "a")
    with pytest.raises(MergeError, match=CONFIG):
        open_adapter(tmp_path / "absent")


def test_a_file_in_any_order_and_of_two_types_is_the_same_adapter(tmp_path):
    """B before A, other tensors between them, one side stored in bf16: what is not side by side is read apart."""
    generator = torch.Generator().manual_seed(0)
    factors = {
        m: (torch.randn(2, 5, generator=generator).bfloat16(), torch.randn(4, 2, generator=generator)) for m in ("q", "up")
    }
    write_adapter(tmp_path / "a", AdapterWeights("base", None, 2, 4.0, False, ("q", "up"), {
        m: (a.float(), b) for m, (a, b) in factors.items()
    }))  # fmt: skip
    order = [("up", 1), ("q", 1), ("up", 0), ("q", 0)]
    header, content = {}, b""
    for module, side in order:
        tensor = factors[module][side]
        raw = tensor.view(torch.uint8).numpy().tobytes()
        header[f"base_model.model.{module}.lora_{'AB'[side]}.weight"] = {
            "dtype": "F32" if side else "BF16", "shape": list(tensor.shape),
            "data_offsets": [len(content), len(content) + len(raw)],
        }  # fmt: skip
        content += raw
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + content)
    opened = open_adapter(tmp_path / "a").factors
    for module, (a_ri, b_or) in factors.items():
        assert torch.equal(opened[module][0], a_ri.float())
        assert torch.equal(opened[module][1], b_or)


def test_a_file_that_is_cut_while_it_is_open_is_told(tmp_path):
    factors = {"q": (torch.randn(2, 5), torch.randn(4, 2))}
    write_adapter(tmp_path / "a", AdapterWeights("base", None, 2, 4.0, False, ("q",), factors))
    opened = open_adapter(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(MergeError, match="became shorter"):
        opened.factors["q"]
