"""An adapter folded into its base: the same logits as side by side, peft's own sum, and nothing written for what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3ForCausalLM

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.records import sha256_of, sha256_of_file
from chrysalis_ray.evaluate import fold, folded_file
from chrysalis_ray.evaluate.fold import fold_adapter
from chrysalis_ray.seed.adapter import read_adapter

IDS = torch.arange(40).view(2, 20)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(str(folder), **{"dtype": torch.float32, **options}).eval()


def adapter(base, folder, targets=TARGETS, **options):
    """An adapter that peft itself drew and wrote."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    get_peft_model(load(base), config).save_pretrained(str(folder), save_embedding_layers=False)
    return str(folder)


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    return adapter(tiny_base, tmp_path_factory.mktemp("fold") / "adapter")


def in_peft(base, name, **options):
    return PeftModel.from_pretrained(load(base, **options), name).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def sharded(base, folder, dtype=torch.float32):
    """The same base in several files with an index."""
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    load(base).to(dtype).save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def all_tensors(folder):
    return {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def refused(tmp_path, match, name, base):
    """The typed error, and nothing written."""
    before = {path: sha256_of_file(path) for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(MergeError, match=match):
        fold_adapter(name, base, tmp_path / "out")
    assert {path: sha256_of_file(path) for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


# the sum ------------------------------------------------------------------------------------------------------------


def test_plain_transformers_gives_the_logits_of_base_and_adapter(tmp_path, tiny_base, trained):
    told = fold_adapter(trained, tiny_base, tmp_path / "out")
    assert (told["base_known_by"], told["untied"], told["modules"]) == ("weights", None, 6)
    model, peft = load(tmp_path / "out"), in_peft(tiny_base, trained)
    assert type(model) is Qwen3ForCausalLM
    assert model.lm_head.weight is model.get_input_embeddings().weight  # still tied
    torch.testing.assert_close(logits(model), logits(peft), atol=1e-5, rtol=0)
    assert float((logits(model) - logits(load(tiny_base))).abs().max()) > 1e-2
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tiny_base / file).read_bytes()
    assert fold_adapter(trained, tiny_base, tmp_path / "out") == {**told, "done_before": True}
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(MergeError, match="were changed since"):
        fold_adapter(trained, tiny_base, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_weight_is_the_fp64_sum_rounded_once_in_the_types_and_files_of_the_base(tmp_path, tiny_base, dtype, monkeypatch):
    monkeypatch.setattr(folded_file, "BLOCK_ENTRIES", 1000)  # a few rows at a time
    base = sharded(tiny_base, tmp_path / "base", dtype)
    trained = adapter(base, tmp_path / "a")
    fold_adapter(trained, base, tmp_path / "out")
    delta, before, after = read_adapter(Path(trained)), all_tensors(base), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {f"{module}.weight" for module in delta.factors}
    for name, weight in before.items():
        expected = weight
        if name in changed:
            a_ri, b_or = (side.double() for side in delta.factors[name.removesuffix(".weight")])
            expected = folded_file.rounded(weight.double() + delta.scale * b_or @ a_ri, dtype)
        assert torch.equal(after[name], expected), name
    for file in base.glob("*.safetensors*"):
        assert (tmp_path / "out" / file.name).stat().st_size == file.stat().st_size
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (base / index).read_bytes()


def test_it_is_pefts_merge_and_unload_but_for_the_rounding_of_fp32(tmp_path, tiny_base, trained):
    """Whose product of rank 4, times its scale, added, can be off by the textbook's bound of six roundings (Higham, 3.5)."""
    fold_adapter(trained, tiny_base, tmp_path / "out")
    theirs, ours = in_peft(tiny_base, trained).merge_and_unload().state_dict(), all_tensors(tmp_path / "out")
    delta, rounding = read_adapter(Path(trained)), torch.finfo(torch.float32).eps / 2
    for name, tensor in ours.items():
        bound = torch.zeros(())
        if (module := name.removesuffix(".weight")) in delta.factors:
            a_ri, b_or = delta.factors[module]
            bound = rounding * (2 * tensor.abs() + 6 * delta.scale * b_or.abs() @ a_ri.abs())
        assert bool(((tensor - theirs[name]).abs() <= bound).all()), name


def test_numbers_are_rounded_once():
    """The nearest number of 16 bits, also where the way over fp32 ends on the boundary between two."""
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        one = torch.ones(1, dtype=torch.float64)
        boundary = one + 2.0**-bits  # halfway between 1 and the next one, which is odd
        for sign in (1.0, -1.0):
            assert float(folded_file.rounded(sign * (boundary + 2.0**-40), dtype)) == sign * (1.0 + 2.0 ** (1 - bits))
            assert float(folded_file.rounded(sign * boundary, dtype)) == sign
            assert float((sign * (boundary + 2.0**-40)).to(dtype)) == sign  # what torch alone makes of it
        values = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        got = folded_file.rounded(values, dtype)
        wider = torch.stack([got.nextafter(torch.tensor(side, dtype=dtype)) for side in (-torch.inf, torch.inf)]).double()
        assert bool(((got.double() - values).abs() <= (wider - values).abs().min(0).values).all())
        assert torch.equal(folded_file.rounded(values.to(dtype).double(), dtype), values.to(dtype))


def test_rank_and_alpha_patterns_and_rslora_are_folded_as_peft_reads_them(tmp_path, tiny_base):
    name = adapter(tiny_base, tmp_path / "a", use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 11})
    fold_adapter(name, tiny_base, tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(in_peft(tiny_base, name)), atol=1e-5, rtol=0)


def gpt2(folder, bare=False):
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    model.save_pretrained(folder)
    if bare:  # as openai-community/gpt2 has them
        tensors = load_file(folder / "model.safetensors")
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("bare", [False, True], ids=["own-names", "hub-names"])
def test_weights_that_lie_in_by_out_are_folded_transposed(tmp_path, bare):
    base = gpt2(tmp_path / "base", bare)
    name = adapter(base, tmp_path / "a", ["c_attn", "c_proj"], fan_in_fan_out=True)  # c_proj of attention is square
    fold_adapter(name, base, tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(in_peft(base, name)), atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": False}))
    shutil.rmtree(tmp_path / "out")
    refused(tmp_path, "fan_in_fan_out: false", name, base)


# tied embeddings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_head_that_was_the_embedding_gets_weights_of_its_own(tmp_path, tiny_base, shards):
    """Folding into the shared matrix, as merge_and_unload does, would change the embedding as well."""
    base = sharded(tiny_base, tmp_path / "base") if shards else tiny_base
    name = adapter(base, tmp_path / "a", ["lm_head", "q_proj"])
    told = fold_adapter(name, base, tmp_path / "out")
    assert told["untied"] == "lm_head.weight"
    model = load(tmp_path / "out")
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, load(base).get_input_embeddings().weight)
    torch.testing.assert_close(logits(model), logits(in_peft(base, name)), atol=1e-5, rtol=0)
    wrong = logits(in_peft(base, name).merge_and_unload())
    assert float((wrong - logits(model)).abs().max()) > 1e-2


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_head_of_its_own_stays_where_it_is(tmp_path, tiny_untied_base):
    name = adapter(tiny_untied_base, tmp_path / "a", ["lm_head"])
    assert fold_adapter(name, tiny_untied_base, tmp_path / "out")["untied"] is None
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(in_peft(tiny_untied_base, name)), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_embeddings_and_heads_trained_as_one_are_refused(tmp_path, tiny_base):
    both = adapter(tiny_base, tmp_path / "both", ["embed_tokens", "lm_head"], ensure_weight_tying=True)
    refused(tmp_path, "lora_embedding", both, tiny_base)
    head = adapter(tiny_base, tmp_path / "head", ["lm_head"])
    config = json.loads((tmp_path / "head" / "adapter_config.json").read_text())
    (tmp_path / "head" / "adapter_config.json").write_text(json.dumps({**config, "ensure_weight_tying": True}))
    refused(tmp_path, "one delta", head, tiny_base)
    model = in_peft(tiny_base, adapter(tiny_base, tmp_path / "copied", ["lm_head"]))
    model.save_pretrained(str(tmp_path / "copied"))  # as peft does unless told otherwise
    refused(tmp_path, "save_embedding_layers=False", str(tmp_path / "copied"), tiny_base)


# what is refused ----------------------------------------------------------------------------------------------------


def test_another_base_is_refused_by_name_weights_shape_or_module(tmp_path, tiny_base, tiny_untied_base, trained):
    refused(tmp_path, "whose weights are not those", trained, tiny_untied_base)
    shutil.copytree(trained, tmp_path / "a")
    told = json.loads((tmp_path / "a" / "adapter_config.json").read_text())

    def named(**config):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**told, **config}))

    named(base_model_name_or_path="org/other")
    cached = tmp_path / "models--org--model" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    cached.mkdir(parents=True)
    for number, file in enumerate(sorted(tiny_base.iterdir())):  # as the hub keeps them: links to blobs
        shutil.copy(file, blobs / f"blob{number}")
        (cached / file.name).symlink_to(blobs / f"blob{number}")
    refused(tmp_path, "of 'org/other', and .* is 'org/model'", str(tmp_path / "a"), cached)
    named(base_model_name_or_path="org/model", revision="b" * 40)
    refused(tmp_path, "of revision bbbbbbbbbbbb", str(tmp_path / "a"), cached)
    named(base_model_name_or_path="org/model", revision="a" * 40)
    assert fold_adapter(str(tmp_path / "a"), cached, tmp_path / "known")["base_known_by"] == "revision"
    assert fold_adapter(str(tmp_path / "a"), tiny_base, tmp_path / "taken")["base_known_by"] == "shapes"
    named(base_model_name_or_path=None)
    refused(tmp_path, r"of \[64, 48\], which is \[128, 48\] there", str(tmp_path / "a"), wider(tiny_base, tmp_path / "wide"))
    refused(tmp_path, "has no such module", str(tmp_path / "a"), gpt2(tmp_path / "gpt2"))


def wider(base, folder):
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 32}))
    return folder


def test_a_base_that_this_program_grew_knows_its_name_and_that_it_was_not_changed(tmp_path, tiny_base, trained):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    hashes = {name: sha256_of_file(base / name) for name in ("model.safetensors", "config.json", "tokenizer.json")}
    (base / "base.json").write_text(json.dumps({"base": {"name": "embedded-1", "sha256": sha256_of(hashes)}}))
    shutil.copytree(trained, tmp_path / "a")
    told = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": "embedded-2"}))
    refused(tmp_path, "is 'embedded-1'", str(tmp_path / "a"), base)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": "embedded-1"}))
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    refused(tmp_path, "are not those that base.json tells of", str(tmp_path / "a"), base)
    shutil.copy(tiny_base / "config.json", base / "config.json")
    assert fold_adapter(str(tmp_path / "a"), base, tmp_path / "out")["base_known_by"] == "name"


def quantised(base):
    config = json.loads((base / "config.json").read_text())
    told = {**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(told))


def packed(base):
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, base / "model.safetensors", metadata={"format": "pt"})


def path_in_index(base):
    (base / "model.safetensors").rename(base / "shard.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../base/shard.safetensors"}}))


def shard_that_is_a_link(base):
    (base / "model.safetensors").rename(base.parent / "elsewhere.safetensors")
    (base / "model.safetensors").symlink_to(base.parent / "elsewhere.safetensors")


def tokenizer_that_is_a_link(base):
    (base / "vocab.json").symlink_to("/etc/hostname")


def index_that_lies(base):
    names = list(load_file(base / "model.safetensors"))
    (base / "model.safetensors").rename(base / "shard.safetensors")
    said = dict.fromkeys(names[1:], "shard.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": said}))


def torn(base):
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[:-8])


def pickled(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def remote_code(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))


def not_finite(base):
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 3] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def two_kinds_of_weights(base):
    (base / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("harm", "word"),
    [(quantised, "quantised .bitsandbytes"), (packed, "as I8: packed numbers"), (path_in_index, "no plain name"),
     (shard_that_is_a_link, "link out of its folder"), (tokenizer_that_is_a_link, "link out of its folder"),
     (index_that_lies, "do not belong together"), (torn, "no whole safetensors"), (pickled, "pytorch_model.bin"),
     (remote_code, "Python code"), (not_finite, "not finite"), (two_kinds_of_weights, "holds both")],
)  # fmt: skip
def test_a_base_that_cannot_be_added_to_is_refused(tmp_path, tiny_base, trained, harm, word):
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copytree(trained, tmp_path / "a")
    told = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": "org/base"}))
    harm(tmp_path / "base")
    refused(tmp_path, word, str(tmp_path / "a"), tmp_path / "base")


def test_a_full_disk_a_nan_and_a_folder_of_others_are_told_before_anything_is_written(
    tmp_path, tiny_base, trained, monkeypatch
):
    monkeypatch.setattr(fold, "SPARE", 1 << 60)
    refused(tmp_path, "GB left", trained, tiny_base)
    monkeypatch.undo()
    shutil.copytree(trained, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    refused(tmp_path, "not finite", str(tmp_path / "a"), tiny_base)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("mine")
    with pytest.raises(MergeError, match="not empty"):
        fold_adapter(trained, tiny_base, tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.txt"]


# killed -------------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from chrysalis_ray.evaluate import fold
write, count = fold.write_parts, 0
def counted(*arguments):
    global count
    count += 1
    if count == 3:
        arguments[2].write_bytes(b"torn")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
fold.write_parts = counted
fold.fold_adapter(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_a_killed_fold_goes_on_with_the_files_that_are_missing(tmp_path, tiny_base, monkeypatch):
    base = sharded(tiny_base, tmp_path / "base")
    trained = adapter(base, tmp_path / "a")
    ended = subprocess.run([sys.executable, "-c", KILLED, trained, str(base), str(tmp_path / "out")], check=False)
    assert ended.returncode == -9
    assert not (tmp_path / "out").exists()
    (unfinished,) = tmp_path.glob(".out.*")
    first, second = sorted((unfinished / "model").glob("model-*.safetensors"))
    second.write_bytes(b"rotten" + second.read_bytes()[6:])  # what the disk did not keep is written again
    (first.parent / ".config.json.x7_k2bqz").write_bytes(b"{")  # as a kill leaves of a small file
    written, write = [], fold.write_parts
    monkeypatch.setattr(
        fold, "write_parts", lambda file, parts, path: written.append(file.path.name) or write(file, parts, path)
    )
    fold_adapter(trained, base, tmp_path / "out")
    assert first.name not in written
    assert second.name in written
    assert not unfinished.exists()
    fold_adapter(trained, base, tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
