"""lm-eval through the packed pass: what its own model class finds for every adapter by itself. An extra, and slow to import."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tiny_tasks import installed, write_tasks
from typer.testing import CliRunner

from chrysalis_ray.cli.main import app
from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.evaluate.alone import Tasks, evaluate_folders
from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter

MODULES = {"model.layers.0.self_attn.q_proj": (64, 48), "model.layers.1.mlp.down_proj": (48, 96)}


@pytest.fixture
def adapters(tmp_path):
    names = []
    for number, rank in enumerate((2, 5)):
        generator = torch.Generator().manual_seed(number)
        factors = {
            module: (torch.randn(rank, width, generator=generator) * 0.5, torch.randn(height, rank, generator=generator) * 0.5)
            for module, (height, width) in MODULES.items()
        }
        write_adapter(tmp_path / f"a{number}", AdapterWeights("tiny", None, rank, 2.0 * rank, False, tuple(MODULES), factors))
        names.append(str(tmp_path / f"a{number}"))
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return write_tasks(tmp_path, monkeypatch, 10)


def by_lm_eval(base, adapter, folder, tasks):
    """What lm-eval's own model class finds."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(base), peft=adapter, dtype="float32", device="cpu", batch_size=1, max_length=256)
    found = simple_evaluate(model, tasks=tasks, task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0)
    return {task: {key.partition(",")[0]: value for key, value in told.items()} for task, told in found["results"].items()}


@installed
@pytest.mark.slow
def test_every_adapter_gets_what_lm_eval_finds_for_it_alone(tiny_base, adapters, folder):
    tasks = ("tiny_normed", "tiny_written", "tiny_rolling")
    found = evaluate_folders(adapters, None, tiny_base, tasks=Tasks(tasks, folder))["lm_eval"]
    assert list(found["tasks"]) == list(tasks)
    for name in ("base", *adapters):
        expected = by_lm_eval(tiny_base, None if name == "base" else name, folder, list(tasks))
        told = {task: found["tasks"][task]["candidates"][name] for task in tasks}
        assert found["tasks"]["tiny_normed"]["items"] == 10
        for metric in ("acc", "acc_norm"):
            assert told["tiny_normed"][metric] == pytest.approx(expected["tiny_normed"][metric])
        assert told["tiny_written"]["exact_match"] == pytest.approx(expected["tiny_written"]["exact_match"])
        for metric in ("word_perplexity", "bits_per_byte"):
            assert told["tiny_rolling"][metric] == pytest.approx(expected["tiny_rolling"][metric], rel=1e-3)
    assert len({str(found["tasks"]["tiny_normed"]["candidates"][name]) for name in ("base", *adapters)}) > 1


@installed
@pytest.mark.slow
def test_the_verb_asks_tasks_without_a_genome_and_refuses_what_is_not_there(tiny_base, adapters, folder):
    asked = ["evaluate", *adapters, "--base", str(tiny_base), "--lm-eval-path", str(folder), "--limit", "4"]
    told = CliRunner().invoke(app, [*asked, "--lm-eval", "tiny_choices"])
    assert told.exit_code == 0, told.output
    assert "tiny_choices, by lm-eval 0.4" in told.stdout
    assert "acc 0." in told.stdout
    again = json.loads(CliRunner().invoke(app, [*asked, "--lm-eval", "tiny_choices", "--json"]).stdout)
    assert again["lm_eval"]["tasks"]["tiny_choices"]["items"] == 4
    with pytest.raises(EvaluationError, match="no task 'tiny_choises'; close to it: tiny_choices"):
        evaluate_folders(adapters, None, tiny_base, tasks=Tasks(("tiny_choises",), folder))
    with pytest.raises(EvaluationError, match="the data of arc_easy cannot be loaded"):
        evaluate_folders(adapters, None, tiny_base, tasks=Tasks(("arc_easy",)))
    (folder / "drawn.yaml").write_text(
        (folder / "written.yaml")
        .read_text()
        .replace("do_sample: false", "do_sample: true")
        .replace("tiny_written", "tiny_drawn")
    )
    with pytest.raises(EvaluationError, match="drawn or searched"):
        evaluate_folders(adapters, None, tiny_base, tasks=Tasks(("tiny_drawn",), folder))


def test_without_the_extra_the_error_says_how_to_install_it(tiny_base, adapters, monkeypatch):
    monkeypatch.delitem(sys.modules, "chrysalis_ray.evaluate.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    with pytest.raises(EvaluationError, match=r"lm-eval is not installed\n.*\[lm-eval\]"):
        evaluate_folders(adapters, None, tiny_base, tasks=Tasks(("arc_easy",)))
    with pytest.raises(EvaluationError, match="nothing to judge by"):
        evaluate_folders(adapters, None, tiny_base)
