"""`fold` as a user meets it: its exit code and what it says."""

from __future__ import annotations

import json

import torch
from typer.testing import CliRunner

from chrysalis_ray.cli.main import app
from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter


def chrysalis(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_fold_says_what_it_did_on_what_grounds_and_refuses_with_a_remedy(tmp_path, tiny_base):
    generator = torch.Generator().manual_seed(0)
    factors = {"lm_head": (torch.randn(2, 48, generator=generator), torch.randn(512, 2, generator=generator))}
    write_adapter(tmp_path / "a", AdapterWeights("org/base", None, 2, 4.0, False, ("lm_head",), factors))
    arguments = ("fold", str(tmp_path / "a"), "--base", str(tiny_base), "--out", str(tmp_path / "out"))
    done = chrysalis(*arguments)
    assert done.exit_code == 0, done.stderr
    assert "1 modules folded" in done.stdout
    assert "taken because the adapter's modules fit it" in done.stdout
    assert "weights of its own, lm_head.weight" in done.stdout
    again = json.loads(chrysalis(*arguments, "--json").stdout)
    assert (again["done_before"], again["untied"], again["base_known_by"]) == (True, "lm_head.weight", "shapes")
    refused = chrysalis("fold", str(tmp_path / "a"), "--base", str(tmp_path / "a"), "--out", str(tmp_path / "other"))
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "has no config.json" in refused.stderr
    assert "remedy: " in refused.stderr
    assert not (tmp_path / "other").exists()
