"""What adapters feed the modules of their base: measured packed, by several workers or alone, it is what a plain model sees."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from test_evaluate_heldout import TARGETS, Rows, adapters, base_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from chrysalis_ray.config.merges import EnsembleMerge, RegmeanMerge
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.evaluate.folders import Texts, merge_folders
from chrysalis_ray.evaluate.heldout import score_rows
from chrysalis_ray.evaluate.inputs import input_directions, measure_slot, read_inputs, read_rows, write_inputs
from chrysalis_ray.seed.adapter import read_adapter
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.pack import Pack

REGMEAN = RegmeanMerge(method="regmean", rank="exact")


def measured(lanes="compacted", threads=1):
    pack = Pack(base_model(), TARGETS, 4, 3, make_engine(0, "none", "fp32", "cpu"), lanes=lanes)
    for slot, factors in enumerate(adapters()):
        pack.load_adapter(slot, factors, 2.0)
    directions = input_directions(adapters())
    roots = [measure_slot(pack, slot, Rows(), "select", 9, directions, batch_rows=2) for slot in (2, 0, 1)]
    assert list(score_rows(pack, [2, 0, 1], Rows(), "select", 9)) == [2, 0, 1]  # nothing listens any more
    return dict(zip((2, 0, 1), roots, strict=True)), directions


def plain_moment(model, module, directions):
    """E[(x V)^T (x V)] over the tokens of all documents, each fed alone to an ordinary model."""
    seen = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda linear, args: seen.append(args[0][0]))
    with torch.no_grad():
        for parts in Rows().texts.values():
            for ids in parts:
                model(torch.from_numpy(ids)[None])
    handle.remove()
    x_TV = torch.cat(seen).double() @ directions[module]
    return x_TV.T @ x_TV / len(x_TV)


@pytest.mark.parametrize("lanes", ["compacted", "fixed"])
def test_packed_inputs_are_those_of_each_adapter_alone(lanes):
    found, directions = measured(lanes)
    for slot, factors in enumerate(adapters()):
        dense = copy.deepcopy(base_model())
        with torch.no_grad():
            for module, (a_ri, b_or) in factors.items():
                dense.get_submodule(module).weight += 2.0 * (b_or @ a_ri)
        for module, v in directions.items():
            narrow = v.T @ found[slot][module].double()
            torch.testing.assert_close(narrow @ narrow.T, plain_moment(dense, module, directions), atol=1e-4, rtol=1e-4)
    module = "model.layers.1.mlp.down_proj"
    assert float((found[0][module] - found[1][module]).norm()) > 1e-2


def _moments(roots):
    return {str(slot): {m: (root @ root.T).tolist() for m, root in own.items()} for slot, own in roots.items()}


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(_moments(measured()[0])))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_measure_what_one_does(tmp_path):
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for slot, own in _moments(measured()[0]).items():
        for module, moment in own.items():
            torch.testing.assert_close(torch.tensor(first[slot][module]), torch.tensor(moment), atol=1e-4, rtol=1e-4)


def test_files_of_inputs_are_read_as_written_or_refused(tmp_path):
    found, _ = measured()
    write_inputs(tmp_path / "x" / "a.safetensors", found[0])
    again = read_inputs(tmp_path / "x" / "a.safetensors")
    assert {m: root.tolist() for m, root in again.items()} == {m: root.tolist() for m, root in found[0].items()}
    (tmp_path / "cut").write_bytes((tmp_path / "x" / "a.safetensors").read_bytes()[:-1])
    save_file({"q": torch.tensor([[float("nan")]])}, tmp_path / "nan")
    for name in ("cut", "nan", "absent"):
        with pytest.raises(MergeError):
            read_inputs(tmp_path / name)


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_base):
    """Two adapters of peft, and two texts."""
    folder = tmp_path_factory.mktemp("two")
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    for number, settings in enumerate((
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "use_rslora": True},
    )):  # fmt: skip
        torch.manual_seed(number)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
        model.save_pretrained(str(folder / f"a{number}"))
    (folder / "code.txt").write_text(Path(__file__).read_text()[:6000])
    (folder / "text.txt").write_text("Butterflies rest while their wings dry. " * 60)
    return tiny_base, [str(folder / "a0"), str(folder / "a1")], (folder / "code.txt", folder / "text.txt")


def outputs_apart(base, names, files, folder):
    """Mean squared distance of an adapter's outputs from each member's, on the inputs that peft's model of that member has."""
    merged, total = read_adapter(folder), 0.0
    for name, file in zip(names, files, strict=True):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), name).eval()
        own = read_adapter(Path(name))
        seen = {module: [] for module in merged.factors}
        for module, into in seen.items():
            place = model.base_model.model.get_submodule(module)
            place.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0]))
        with torch.no_grad():
            for row in read_rows(file, base):
                model(torch.tensor([row]))
        for module, parts in seen.items():
            x = torch.cat([part.flatten(0, 1) for part in parts])
            apart = merged.delta(module) - (own.delta(module) if module in own.factors else 0.0)
            total += float((x @ apart.T).square().sum(1).mean())
    return total


def test_adapters_from_anywhere_are_merged_by_their_own_inputs(tmp_path, two):
    base, names, files = two
    manifest = merge_folders(names, REGMEAN, tmp_path / "out", texts=Texts(base, files))
    merge_folders(names, EnsembleMerge(method="ensemble", rank="exact"), tmp_path / "mean")
    nearer, mean = (outputs_apart(base, names, files, tmp_path / name) for name in ("out", "mean"))
    assert manifest["notes"]["error_to_mean"] == pytest.approx(nearer / mean, rel=1e-3)
    assert nearer < 0.98 * mean
    assert merge_folders(names, REGMEAN, tmp_path / "out", texts=Texts(base, files))["done_before"]
    with pytest.raises(MergeError, match="another merge"):
        merge_folders(names, REGMEAN, tmp_path / "out", texts=Texts(base, files[::-1]))


@pytest.mark.parametrize("wrong", ["no text", "another method", "three texts", "no such text", "no such base", "not UTF-8",
                                   "empty", "another base"])  # fmt: skip
def test_texts_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, two, wrong):
    base, names, files = two
    texts, spec = Texts(base, files), REGMEAN
    if wrong == "no text":
        texts = None
    elif wrong == "another method":
        spec = EnsembleMerge(method="ensemble")
    elif wrong == "three texts":
        texts = Texts(base, (*files, files[0]))
    elif wrong == "no such text":
        texts = Texts(base, (files[0], tmp_path / "absent.txt"))
    elif wrong == "no such base":
        texts = Texts(tmp_path / "absent", files)
    elif wrong == "not UTF-8":
        (tmp_path / "t").write_bytes(b"\xff\xfe\x00")
        texts = Texts(base, (tmp_path / "t",))
    elif wrong == "empty":
        (tmp_path / "t").write_bytes(b"")
        texts = Texts(base, (tmp_path / "t",))
    elif wrong == "another base":
        base_model().save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
        texts = Texts(tmp_path / "base", files)
    with pytest.raises(MergeError):
        merge_folders(names, spec, tmp_path / "out", texts=texts)
    assert not (tmp_path / "out").exists()
