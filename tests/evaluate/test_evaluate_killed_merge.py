"""A merge that is killed in the middle goes on with what it had finished, and what comes out is a function of its request."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chrysalis_ray.config.merges import read_merge
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.records import sha256_of
from chrysalis_ray.evaluate import folders
from chrysalis_ray.evaluate.folders import merge_folders
from chrysalis_ray.merge import run
from chrysalis_ray.merge.finished import BYTES, LINES, finished_modules
from chrysalis_ray.merge.gram import stack
from chrysalis_ray.seed.adapter import WEIGHTS, AdapterWeights, adapter_sha256, write_adapter
from chrysalis_ray.seed.streamed import open_adapter

SHAPES = {f"layers.{layer}.{name}": shape for layer in range(3) for name, shape in (("q", (30, 24)), ("up", (40, 24)))}
MERGES = [("ensemble", ["rank=2"]), ("ensemble", ["rank=exact"]), ("consensus", []), ("ties", ["space=dense"])]
every_merge = pytest.mark.parametrize(("method", "settings"), MERGES, ids=["-".join([m, *s]) for m, s in MERGES])

# Merges in a process that kills itself once it has kept `count` modules; with `torn`, within the line of the next one.
KILLED = """
import os, signal, sys
from chrysalis_ray.config.merges import read_merge
from chrysalis_ray.evaluate.folders import merge_folders
from chrysalis_ray.merge.finished import FinishedModules
import torch
torch.set_num_threads(1)
names, out, method, settings, count, torn = eval(sys.argv[1])
add, kept = FinishedModules.add, []
def add_or_die(self, module, merged):
    if len(kept) == count:
        if torn:
            add(self, module, merged)
            self._lines.truncate(self._lines.seek(0, os.SEEK_END) - 20)
        os.kill(os.getpid(), signal.SIGKILL)
    kept.append(module)
    return add(self, module, merged)
FinishedModules.add = add_or_die
from pathlib import Path
merge_folders(names, read_merge(method, settings), Path(out))
"""


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        factors = {
            m: (torch.randn(2, inn, generator=generator), torch.randn(out, 2, generator=generator))
            for m, (out, inn) in SHAPES.items()
        }
        write_adapter(folder / str(number), AdapterWeights("base", None, 2, 4.0, False, ("q", "up"), factors))
    return [str(folder / str(number)) for number in range(3)]


def kill_in_the_middle(names, out, method, settings, count, torn=False):
    asked = repr((names, str(out), method, settings, count, torn))
    done = subprocess.run([sys.executable, "-c", KILLED, asked], env={**os.environ}, stderr=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (unfinished,) = out.parent.iterdir()
    return unfinished


def spied(monkeypatch):
    """The modules that are really merged from now on."""
    merged, real = [], run._merge_module
    monkeypatch.setattr(run, "_merge_module", lambda *asked: merged.append(asked[-1]) or real(*asked))
    return merged


@every_merge
@pytest.mark.slow
def test_a_killed_merge_goes_on_and_ends_with_the_same_bytes(tmp_path, names, method, settings, monkeypatch):
    spec = read_merge(method, settings)
    whole = merge_folders(names, spec, tmp_path / "whole" / "out")
    out = tmp_path / "killed" / "out"
    kill_in_the_middle(names, out, method, settings, count=3, torn=method == "consensus")
    merged = spied(monkeypatch)
    resumed = merge_folders(names, spec, out)
    assert sorted(merged) == sorted(SHAPES)[3:]
    assert resumed == whole
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_bytes_that_changed_and_lines_that_tore_are_merged_again(tmp_path, names, monkeypatch):
    spec = read_merge("ensemble", ["rank=2"])
    whole = merge_folders(names, spec, tmp_path / "whole" / "out")
    out = tmp_path / "killed" / "out"
    unfinished = kill_in_the_middle(names, out, "ensemble", ["rank=2"], count=4, torn=True)
    with (unfinished / BYTES).open("r+b") as stream:
        place = json.loads((unfinished / LINES).read_bytes().split(b"\n")[2])["start"] + 100  # in the second module
        stream.seek(place)
        byte = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte[0] ^ 1]))
    merged = spied(monkeypatch)
    assert merge_folders(names, spec, out)["sha256"] == whole["sha256"]
    assert sorted(merged) == [sorted(SHAPES)[1], *sorted(SHAPES)[4:]]


def test_what_was_finished_of_another_request_is_not_taken(tmp_path, names, monkeypatch):
    first, second = read_merge("ensemble", ["rank=2"]), read_merge("ensemble", ["rank=3"])
    whole = merge_folders(names, second, tmp_path / "whole" / "out")
    out = tmp_path / "killed" / "out"
    unfinished = kill_in_the_middle(names, out, "ensemble", ["rank=2"], count=4)
    shutil.move(unfinished, out.with_name(f".out.{whole['request_sha256'][:16]}"))
    merged = spied(monkeypatch)
    assert merge_folders(names, second, out)["sha256"] == whole["sha256"]
    assert sorted(merged) == sorted(SHAPES)
    assert merge_folders(names, first, tmp_path / "other" / "out")["sha256"] != whole["sha256"]


def test_two_processes_do_not_make_one_merge(tmp_path, names):
    spec = read_merge("ensemble", ["rank=2"])
    request = merge_folders(names, spec, tmp_path / "whole" / "out")["request_sha256"]
    out = tmp_path / "out"
    with finished_modules(out.with_name(f".out.{request[:16]}"), request):
        with pytest.raises(MergeError, match="another process"):
            merge_folders(names, spec, out)
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_refused_merge_leaves_nothing_and_an_interrupted_one_what_it_finished(tmp_path, names, monkeypatch):
    spec = read_merge("ensemble", ["rank=2"])
    real = run._merge_module
    for error, left in ((MergeError("refused"), 0), (KeyboardInterrupt(), 1)):

        def stop(*asked, error=error):
            if asked[-1] == "layers.2.q":
                raise error
            return real(*asked)

        monkeypatch.setattr(run, "_merge_module", stop)
        with pytest.raises(type(error)):
            merge_folders(names, spec, tmp_path / "out")
        assert len(list(tmp_path.iterdir())) == left
    (unfinished,) = tmp_path.iterdir()
    assert (unfinished / LINES).read_bytes().count(b"\n") >= 5


@every_merge
def test_a_merge_is_a_function_of_its_request(tmp_path, names, method, settings):
    """The manifest names all that a merge depends on: neither the place nor the number of threads changes a byte."""
    threads = torch.get_num_threads()
    made = []
    try:
        for number, count in enumerate((1, 2, 3)):
            torch.set_num_threads(count)
            adapters = [shutil.copytree(name, tmp_path / f"from{number}" / str(place)) for place, name in enumerate(names)]
            made.append(merge_folders([str(a) for a in adapters], read_merge(method, settings), tmp_path / f"to{number}"))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert len({manifest["sha256"] for manifest in made}) == 1
    request = made[0]["request"]
    assert sha256_of(request) == made[0]["request_sha256"]
    again = merge_folders(
        names, read_merge(request["spec"]["method"], settings), tmp_path / "again", None, request["given_weights"]
    )
    assert (again["request"], again["sha256"]) == (request, made[0]["sha256"])


def test_what_is_stacked_stays_as_it_was():
    """Threads stack modules side by side: no memory is shared between two of them."""
    one = stack([(torch.ones(2, 5), torch.ones(4, 2))])
    before = one.b_OK.clone()
    stack([(torch.zeros(2, 5), torch.zeros(4, 2))])
    assert torch.equal(one.b_OK, before)


@pytest.mark.parametrize(("method", "settings"), [("ensemble", ["rank=2"]), ("tsv", []), ("ties", ["space=dense"])])
def test_modules_in_their_place_in_the_file_are_the_file_that_would_be_written(tmp_path, names, method, settings, monkeypatch):
    spec = read_merge(method, settings)
    linked = merge_folders(names, spec, tmp_path / "linked")
    read = open_adapter(tmp_path / "linked")
    again = replace(read, factors=dict(read.factors))
    assert write_adapter(tmp_path / "written", again, like=tmp_path / "linked") == linked["sha256"]
    monkeypatch.setattr(folders, "layout_of", lambda *asked: None)
    assert merge_folders(names, spec, tmp_path / "apart") == linked
    assert (tmp_path / "linked" / WEIGHTS).stat().st_nlink == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apart", "linked", "written"]


def test_a_file_that_has_become_an_adapters_is_never_written_to_again(tmp_path, names):
    """Killed after the last rename, and the merge moved away as we advise: what is left must not reach into it."""
    spec = read_merge("ensemble", ["rank=2"])
    out = tmp_path / "out"
    made = merge_folders(names, spec, out)
    moved = shutil.move(out, tmp_path / "moved")
    unfinished = out.with_name(f".out.{made['request_sha256'][:16]}")
    unfinished.mkdir()
    os.link(tmp_path / "moved" / WEIGHTS, unfinished / BYTES)
    (unfinished / LINES).write_bytes(b"of another request\n")
    assert merge_folders(names, spec, out) == made
    assert adapter_sha256(Path(moved)) == made["sha256"]
    assert not os.path.samefile(out / WEIGHTS, tmp_path / "moved" / WEIGHTS)


def test_without_links_the_file_is_copied(tmp_path, names, monkeypatch):
    def no_links(*asked):
        raise OSError(errno.EPERM, "no links here")

    spec = read_merge("ensemble", ["rank=2"])
    linked = merge_folders(names, spec, tmp_path / "linked")
    monkeypatch.setattr(os, "link", no_links)
    assert merge_folders(names, spec, tmp_path / "copied") == linked


def test_a_module_that_only_members_without_weight_have_leaves_no_hole(tmp_path, names):
    """The file was laid out for it; what comes out has no such module, and is written anew."""
    factors = {"layers.9.q": (torch.ones(2, 24), torch.ones(30, 2))}
    write_adapter(tmp_path / "more", AdapterWeights("base", None, 2, 4.0, False, ("q",), factors))
    merge_folders([*names, str(tmp_path / "more")], read_merge("ensemble", ["rank=2"]), tmp_path / "out", None, (1, 1, 1, 0))
    assert set(open_adapter(tmp_path / "out").factors) == set(SHAPES)


def test_what_comes_out_beyond_fp32_is_refused_and_leaves_nothing(tmp_path):
    for name, sign in (("0", 1.0), ("1", 2.0)):
        factors = {"q": (torch.full((2, 24), 3e30), torch.full((30, 2), sign * 3e30))}
        write_adapter(tmp_path / "in" / name, AdapterWeights("base", None, 2, 4.0, False, ("q",), factors))
    for settings in (["rank=2"], ["rank=exact"]):
        with pytest.raises(MergeError, match="beyond what fp32 holds"):
            merge_folders(
                [str(tmp_path / "in" / "0"), str(tmp_path / "in" / "1")],
                read_merge("task_arithmetic", ["coefficient=1e30", *settings]),
                tmp_path / "out",
            )
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
