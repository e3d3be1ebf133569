"""`merge` and `audit` as a user meets them: a process, its exit code, what it says, and what it imported."""

from __future__ import annotations

import json

import torch
from test_cli_verbs import chrysalis

from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter


def adapters(folder, count: int = 2) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        factors = {"layers.0.q": (torch.randn(2, 80, generator=generator), torch.randn(60, 2, generator=generator))}
        write_adapter(folder / f"a{number}", AdapterWeights("org/base", None, 2, 4.0, False, ("q",), factors))
    return [str(folder / f"a{number}") for number in range(count)]


def test_merge_says_what_it_did_and_imports_neither_ray_nor_a_model_library(tmp_path):
    names = adapters(tmp_path)
    out = str(tmp_path / "out")
    done = chrysalis("merge", *names, "--strategy", "ensemble", "--weights", "1,1", "--out", out)
    assert (done.returncode, done.stderr) == (0, "HEAVY ['torch']\n")
    assert "ensemble of 2 adapters of org/base" in done.stdout
    assert f"0.5000  {names[0]}" in done.stdout
    assert "--rank exact" in done.stdout  # two random adapters of rank 2 do not fit into rank 2
    again = chrysalis("merge", *names, "-s", "ensemble", "--weights", "1,1", "-o", out, "--json")
    assert json.loads(again.stdout)["done_before"] is True
    full = chrysalis(
        "merge", *names, "-s", "ties", "--set", "density=0.5", "--rank", "exact", "-o", str(tmp_path / "full"), "--json"
    )
    assert json.loads(full.stdout)["residual"] < 1e-6


def test_merge_refuses_with_a_remedy_and_the_right_code(tmp_path):
    names = adapters(tmp_path)
    for arguments, code, word in (
        (["--strategy", "teis"], 2, "did you mean 'ties'"),
        (["--strategy", "ties", "--set", "density=9"], 2, "must be <= 1"),
        (["--strategy", "ensemble", "--weights", "a,b"], 2, "no list of numbers"),
        (["--strategy", "ensemble", "--weights", "1"], 1, "1 weights for 2 adapters"),
        (["--strategy", "winner"], 1, "nothing has judged"),
        ([], 2, "give a --strategy"),
        (["--strategy", "regmean"], 1, "--base and a --text"),
        (["--strategy", "regmean", "--base", str(tmp_path)], 2, "belong together"),
    ):
        done = chrysalis("merge", *names, *arguments, "--out", str(tmp_path / "out"))
        assert (done.returncode, done.stdout) == (code, "")
        assert word in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_mergekit_config_says_all_of_it_or_is_refused_by_line_and_key(tmp_path):
    names = adapters(tmp_path)
    models = "".join(f"  - {{model: org/base+{name}, parameters: {{weight: {n + 1}}}}}\n" for n, name in enumerate(names))
    (tmp_path / "good.yaml").write_text(
        f"merge_method: task_arithmetic\nbase_model: org/base\nmodels:\n{models}dtype: bfloat16\n"
    )
    done = chrysalis("merge", str(tmp_path / "good.yaml"), "--rank", "exact", "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "HEAVY ['torch']\n")
    assert "task_arithmetic of 2 adapters of org/base" in done.stdout
    assert "bfloat16 is left aside" in done.stdout
    (tmp_path / "bad.yaml").write_text(f"merge_method: linear\nmodels:\n{models}slices: []\n")
    for arguments, word in (
        (["bad.yaml"], "bad.yaml:5: slices: layers are not taken apart"),
        (["good.yaml", "bad.yaml"], "a config says all of it"),
        (["good.yaml", "--strategy", "ties"], "a config says all of it"),
        (["absent.yaml"], "no such file"),
    ):
        line = [str(tmp_path / name) if name.endswith(".yaml") else name for name in arguments]
        done = chrysalis("merge", *line, "--out", str(tmp_path / "other"))
        assert (done.returncode, done.stdout) == (2, "")
        assert word in " ".join(done.stderr.replace("\u2502", " ").split())
    assert not (tmp_path / "other").exists()


def test_audit_tells_and_writes_nothing(tmp_path):
    names = adapters(tmp_path, 3)
    done = chrysalis("audit", *names)
    assert (done.returncode, done.stderr) == (0, "HEAVY ['torch']\n")
    assert "- separate adapters" in done.stdout
    found = json.loads(chrysalis("audit", *names, "--seed-adapter", names[0], "--json").stdout)
    assert found["adapters"][0]["norm"] == 0.0
    assert any("did not change" in sentence for sentence in found["findings"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a0", "a1", "a2"]
