"""The seed stage from files to files: adapter zero whose A comes from the genome's own train split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chrysalis_ray import lifecycle
from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.genome.tokens import open_tokens
from chrysalis_ray.seed.adapter import read_adapter
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.eva import leading_directions

EXPERIMENT = """\
name: seeded
rng_seed: 5
blueprint: ./blueprint.yaml
genome:
  sources: [{{type: folder, path: texts, domain: texts, glob: "*.py"}}]
population:
  variants: 2
  tokens_per_variant: 256
  reports: 2
  epigenomes: {{type: listed, mixes: [{{name: all, express: {{texts: 1}}}}]}}
merge: [{{method: winner}}, {{method: ensemble, rank: 6}}]
"""
BLUEPRINT = """\
name: seeded
base: {{type: pretrained, model: {base}}}
lora: {{rank: 4, init: {init}, targets: [q_proj, down_proj]}}
lanes: {{sequence_length: 32, rows_per_step: 2}}
"""


class Listener:
    def __init__(self) -> None:
        self.told: list[str] = []

    def stage(self, name: str, sentence: str) -> None:
        self.told.append(f"{name}: {sentence}")


def seed_of(folder: Path, base: Path, init: str) -> tuple[Any, Any]:
    (folder / "experiment.yaml").write_text(EXPERIMENT.format())
    (folder / "blueprint.yaml").write_text(BLUEPRINT.format(base=base, init=init))
    loaded = load_experiment(folder / "experiment.yaml")
    run = lifecycle.open_run(loaded, RunLayout((folder / "runs" / init).resolve()), Listener())  # type: ignore[arg-type]
    genome = lifecycle.seal_genome(run)
    described = lifecycle.pin_base(run, genome)
    lifecycle.tokenise(run, genome, described)
    first = lifecycle.write_seed(run, described)
    assert lifecycle.write_seed(run, described) == first
    return run, read_adapter(run.layout.seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import argparse
    import textwrap

    (tmp_path / "texts").mkdir()
    for module in (argparse, textwrap):
        lines = Path(module.__file__).read_text(encoding="utf-8").split("\n\n")
        for number in range(0, len(lines), 4):
            (tmp_path / "texts" / f"{module.__name__}{number}.py").write_text("\n\n".join(lines[number : number + 4]))
    return tmp_path


def test_the_seed_is_drawn_or_comes_from_the_train_split(folder: Path, tiny_base: Path) -> None:
    """It has the rank of the bank, which a merge raised here, and is what the base and the tokens on disk give."""
    run, zero = seed_of(folder, tiny_base, "eva")
    _, drawn = seed_of(folder, tiny_base, "kaiming")
    expected = leading_directions(load_base(tiny_base, "fp32"), ("q_proj", "down_proj"), open_tokens(run.layout.tokens), 6, 5)
    assert zero.factors.keys() == drawn.factors.keys() == expected.keys()
    for name, (a_ri, b_or) in zero.factors.items():
        assert torch.equal(a_ri, expected[name])
        assert not torch.equal(a_ri, drawn.factors[name][0])
        assert not b_or.any()
        assert a_ri.shape[0] == 6
    assert "seed: adapter zero of rank 6, its A from the train split" in " ".join(run.story.told)
