"""Merging what is odd but legal, into places that are odd: the right numbers, or one typed error and nothing written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chrysalis_ray.config.merges import METHOD_NAMES, make_merge
from chrysalis_ray.core.errors import ConfigError, MergeError
from chrysalis_ray.evaluate.folders import Texts, audit_folders, merge_folders
from chrysalis_ray.seed.adapter import CONFIG, WEIGHTS, adapter_sha256, read_adapter

MEAN = make_merge({"method": "ensemble", "rank": "exact"})
PREFIX = "base_model.model."
METHODS = [name for name in METHOD_NAMES if name not in ("winner", "regmean")]  # those that need neither judge nor text


def write(folder: Path, rng_seed=0, rank=2, dtype=torch.float32, modules=("layers.0.q",), out=12, inn=10, **config) -> str:
    folder.mkdir(parents=True)
    generator, tensors = torch.Generator().manual_seed(rng_seed), {}
    for module in modules:
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, inn, generator=generator).to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator).to(dtype)
    save_file(tensors, folder / WEIGHTS)
    targets = sorted({module.rpartition(".")[2] for module in modules})
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "base_model_name_or_path": "b"}
    (folder / CONFIG).write_text(json.dumps({**told, **config}))
    return str(folder)


def mean_of(names, module="layers.0.q"):
    return sum(read_adapter(Path(name)).delta(module).double() for name in names) / len(names)


def assert_mean(names, out, module="layers.0.q"):
    torch.testing.assert_close(read_adapter(out).delta(module).double(), mean_of(names, module), atol=1e-5, rtol=1e-5)


def everything(folder: Path):
    return {str(path.relative_to(folder)): os.lstat(path).st_mtime_ns for path in folder.rglob("*")}


# what goes in -------------------------------------------------------------------------------------------------------


def test_sixty_four_adapters_are_merged_by_every_method(tmp_path):
    names = [write(tmp_path / str(n), n) for n in range(64)]
    merge_folders(names, MEAN, tmp_path / "mean")
    assert_mean(names, tmp_path / "mean")
    for method in METHODS:
        told = merge_folders(names, make_merge({"method": method}), tmp_path / method)
        assert (told["notes"]["members"], len(told["notes"]["cosines"])) == (64, 64)
    assert len(audit_folders(names)["adapters"]) == 64


def test_rank_one_beside_rank_512_and_every_type_of_number(tmp_path):
    names = [write(tmp_path / "one", 1, rank=1), write(tmp_path / "many", 2, rank=512)]
    types = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    names += [write(tmp_path / str(n), n, rank=3, dtype=dtype) for n, dtype in enumerate(types)]
    told = merge_folders(names, MEAN, tmp_path / "mean")
    assert told["rank"] == 10  # of an [12, 10] module
    assert_mean(names, tmp_path / "mean")
    for method in METHODS:
        assert merge_folders(names, make_merge({"method": method}), tmp_path / method)["rank"] == 512
    assert audit_folders(names)["adapters"][1]["rank"] == 512


def test_the_same_deltas_however_their_scale_is_written_are_merged_alike(tmp_path):
    """alpha/r, alpha/sqrt(r), a pattern for one module: and what comes out is plain, with a scale of one."""
    modules = ("layers.0.q", "layers.1.q")
    plain = write(tmp_path / "plain", 0, rank=4, modules=modules, lora_alpha=8)
    ways = [
        write(tmp_path / "root", 0, rank=4, modules=modules, lora_alpha=4, use_rslora=True),
        write(
            tmp_path / "pattern", 0, rank=4, modules=modules, lora_alpha=12, alpha_pattern={"layers.0.q": 8, "layers.1.q": 8}
        ),
        write(tmp_path / "ranks", 0, rank=4, modules=modules, r=16, rank_pattern={"q": 4}, alpha_pattern={"q": 8}),
    ]
    other = write(tmp_path / "other", 1, rank=3, modules=modules)
    for method in ("ensemble", "ties", "consensus"):
        spec = make_merge({"method": method})
        merge_folders([plain, other], spec, tmp_path / method)
        expected = read_adapter(tmp_path / method)
        assert (expected.alpha, expected.use_rslora, expected.scale) == (float(expected.rank), False, 1.0)
        for number, way in enumerate(ways):
            merge_folders([way, other], spec, tmp_path / f"{method}{number}")
            found = read_adapter(tmp_path / f"{method}{number}")
            for module in modules:
                torch.testing.assert_close(found.delta(module), expected.delta(module), atol=1e-5, rtol=1e-5)


def test_a_head_is_a_linear_module_and_an_embedding_is_none(tmp_path):
    names = [write(tmp_path / "a", 0, modules=("lm_head", "layers.0.q")), write(tmp_path / "b", 1)]
    told = merge_folders(names, MEAN, tmp_path / "out")
    assert told["notes"]["modules_missing_as_zero"] == {names[1]: 1}
    half = read_adapter(Path(names[0])).delta("lm_head") / 2
    torch.testing.assert_close(read_adapter(tmp_path / "out").delta("lm_head"), half, atol=1e-5, rtol=1e-5)
    words = tmp_path / "words"
    write(words)
    both = {f"{PREFIX}embed.lora_embedding_A": torch.ones(2, 9), f"{PREFIX}embed.lora_embedding_B": torch.ones(8, 2)}
    save_file(both, words / WEIGHTS)
    with pytest.raises(MergeError, match="no LoRA factor of a linear module"):
        merge_folders([*names, str(words)], MEAN, tmp_path / "none")


def test_targets_without_tensors_and_no_targets_at_all_change_nothing(tmp_path):
    lists = (["q", "nowhere"], [], None, "all-linear")
    names = [write(tmp_path / str(n), n, target_modules=targets) for n, targets in enumerate(lists)]
    merge_folders(names, MEAN, tmp_path / "out")
    assert_mean(names, tmp_path / "out")


def test_an_alpha_of_nothing_is_refused_with_what_to_do(tmp_path):
    names = [write(tmp_path / "a"), write(tmp_path / "b", lora_alpha=0)]
    with pytest.raises(MergeError, match="leave that adapter out"):
        merge_folders(names, MEAN, tmp_path / "out")


def test_names_in_any_script_and_links_to_folders_are_names(tmp_path):
    names = [write(tmp_path / "ä ö" / "名 前, two"), write(tmp_path / "b", 1)]
    (tmp_path / "a link").symlink_to(names[0])
    out = tmp_path / "auß er" / "der Reihe"
    told = merge_folders([str(tmp_path / "a link"), names[1]], MEAN, out)
    assert told["adapters"] == [str(tmp_path / "a link"), names[1]]
    assert_mean(names, out)
    assert audit_folders(names)["adapters"][0]["name"] == names[0]


@pytest.mark.parametrize("name", ["", "n" * 300, "x/" + "y" * 300, "loop"])
def test_names_that_no_folder_has_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = everything(tmp_path)
    with pytest.raises(MergeError, match="no folder"):
        merge_folders(["a", name], MEAN, tmp_path / "out")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("given", [[float("nan"), 1.0], [float("inf"), 1.0], [-1.0, 2.0], [0.0, 0.0], [1.0]])
def test_weights_that_are_no_shares_are_refused_before_anything_is_read(tmp_path, given):
    with pytest.raises(MergeError, match="weights"):
        merge_folders(["absent", "absent too"], MEAN, tmp_path / "out", given=given)


def test_a_rank_beyond_what_is_read_again_is_refused():
    with pytest.raises(ConfigError, match="rank"):
        make_merge({"method": "ensemble", "rank": 65537})


def test_a_base_that_is_none_is_refused_and_leaves_nothing(tmp_path):
    names = [write(tmp_path / "a"), write(tmp_path / "b", 1)]
    (tmp_path / "text").write_text("words")
    before = everything(tmp_path)
    for space in ("core", "dense"):
        spec = make_merge({"method": "regmean", "space": space})
        with pytest.raises(MergeError, match=r"has no config\.json"):
            merge_folders(names, spec, tmp_path / "out", texts=Texts(tmp_path / "a", (tmp_path / "text",)))
    assert everything(tmp_path) == before


# where it goes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["/", "o" * 230, "o" * 300, "o" * 300 + "/out", "a file/out", "a file/b/c", "loop/out", "/proc/self/status/out"]
)
def test_places_where_no_folder_can_be_are_refused(tmp_path, place):
    names = [write(tmp_path / "a")]
    (tmp_path / "a file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = everything(tmp_path)
    with pytest.raises(MergeError):
        merge_folders(names, MEAN, tmp_path / place)
    assert everything(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_nothing_may_be_written_into_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(MergeError, match="nothing can be written into"):
        merge_folders(["absent"], MEAN, tmp_path / "closed" / "out")


def test_a_link_to_an_empty_folder_is_that_folder(tmp_path):
    names = [write(tmp_path / "a"), write(tmp_path / "b", 1)]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    merge_folders(names, MEAN, tmp_path / "out")
    assert_mean(names, tmp_path / "elsewhere")
    assert (tmp_path / "out").is_symlink()
    assert merge_folders(names, MEAN, tmp_path / "out")["done_before"]


# what happens meanwhile ---------------------------------------------------------------------------------------------

MERGE = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from chrysalis_ray.config.merges import make_merge
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.evaluate.folders import merge_folders
from chrysalis_ray.merge.finished import FinishedModules
names, out, rank, end_after = eval(sys.argv[1])
add, kept = FinishedModules.add, []
def add_or_end(self, module, merged):
    kept.append(module)
    if len(kept) == end_after:
        os.kill(os.getpid(), signal.SIGTERM)
    return add(self, module, merged)
FinishedModules.add = add_or_end
print("ready", flush=True)
sys.stdin.readline()
try:
    merge_folders(names, make_merge({"method": "ensemble", "rank": rank}), Path(out))
except MergeError as error:
    print(error)
    sys.exit(3)
"""


def start(names, out, rank, end_after=0, most_bytes=None):
    def limited():
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    asked = repr((names, str(out), rank, end_after))
    return subprocess.Popen(
        [sys.executable, "-c", MERGE, asked], preexec_fn=limited, env={**os.environ}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    modules = tuple(f"layers.{n}.q" for n in range(12))
    return [write(folder / str(n), n, rank=8, modules=modules, out=60, inn=80) for n in range(3)]


@pytest.mark.slow
def test_a_merge_that_is_told_to_end_or_finds_the_disk_full_goes_on_later(tmp_path, many):
    whole = merge_folders(many, make_merge({"method": "ensemble", "rank": 8}), tmp_path / "whole")
    for number, settings in enumerate(({"end_after": 5}, {"most_bytes": 20_000})):
        out = tmp_path / f"place{number}" / "out"
        out.parent.mkdir()
        process = start(many, out, 8, **settings)
        _, errors = process.communicate("\n", timeout=120)
        assert not out.exists()
        if "end_after" in settings:
            assert process.returncode == -signal.SIGTERM
        else:
            assert "File too large" in errors
        assert merge_folders(many, make_merge({"method": "ensemble", "rank": 8}), out)["sha256"] == whole["sha256"]
        assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.slow
def test_of_merges_into_one_place_at_once_one_is_there_whole(tmp_path, many):
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    processes = [start(many, out, rank) for rank in (8, 8, 8, 6)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    ends = []
    for process in processes:
        told, errors = process.communicate(timeout=120)
        assert process.returncode in (0, 3), errors
        assert process.returncode == 0 or any(word in told for word in ("another process", "somebody else", "another merge")), (
            told
        )
        ends.append(process.returncode)
    assert 0 in ends
    manifest = json.loads((out / "merge.json").read_text())
    assert adapter_sha256(out) == manifest["sha256"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
