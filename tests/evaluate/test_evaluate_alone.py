"""Adapters judged in one process have the losses that plain transformers finds, on every document of a split."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from chrysalis_ray.cli.main import app
from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.errors import EvaluationError, GenomeError, MergeError, ModelError
from chrysalis_ray.evaluate.alone import BASE, TOGETHER, evaluate_folders
from chrysalis_ray.genome.build import build_genome
from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter

MODULES = {"model.layers.0.self_attn.q_proj": (64, 48), "model.layers.1.mlp.down_proj": (48, 96)}
TEXTS = {
    "notes": [
        f"note {number}: naïve größe → {'x' * number} was told {number * 7} times, or so they say" for number in range(30)
    ],
    "code": [f"def f{number}(x):\n    return x * {number} + {number * 3}\n" for number in range(30)],
}


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    sources = []
    for domain, texts in TEXTS.items():
        (folder / f"{domain}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        sources.append({"type": "jsonl", "path": f"{domain}.jsonl", "domain": domain})
    spec = GenomeSpec.model_validate({"sources": sources, "split": {"select": 0.2, "report": 0.2}, "exclude": []})
    return build_genome(spec, folder / "genome", folder)


@pytest.fixture
def adapters(tmp_path):
    names = []
    for number, rank in enumerate((2, 5)):
        generator = torch.Generator().manual_seed(number)
        factors = {
            module: (torch.randn(rank, width, generator=generator) * 0.2, torch.randn(height, rank, generator=generator) * 0.2)
            for module, (height, width) in list(MODULES.items())[: number + 1]
        }
        adapter = AdapterWeights("tiny", None, rank, 2.0 * rank, False, tuple(sorted(factors)), factors)
        write_adapter(tmp_path / f"a{number}", adapter)
        names.append(str(tmp_path / f"a{number}"))
    return names


def by_hand(base, genome, split, adapter=None):
    """Loss, bits per byte and accuracy by domain, with peft, one document at a time."""
    from peft import PeftModel

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    told = {}
    for domain in genome.domains:
        loss, tokens, size, hits = 0.0, 0, 0, 0
        for document in genome.documents(domain, split):
            ids = tokenizer(document.text)["input_ids"]
            ids = torch.tensor([*ids, tokenizer.eos_token_id] if ids[-1] != tokenizer.eos_token_id else ids)
            with torch.no_grad():
                logits = model(ids[None]).logits[0, :-1]
            loss += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
            tokens, hits = tokens + len(ids) - 1, hits + int((logits.argmax(-1) == ids[1:]).sum())
            size += len(document.text.encode()) - len(tokenizer.decode(ids[:1]).encode())
        told[domain] = (loss / tokens, loss / size / math.log(2), hits / tokens)
    return told


def kl_by_hand(base, genome, split, adapter, other):
    """KL(other || adapter) in nats per token and the share of tokens both find likeliest, the means over domains, with peft."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(base)
    models = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), name).eval()
        for name in (adapter, other)
    ]
    told = []
    for domain in genome.domains:
        apart, agreed, tokens = 0.0, 0, 0
        for document in genome.documents(domain, split):
            ids = tokenizer(document.text)["input_ids"]
            ids = torch.tensor([*ids, tokenizer.eos_token_id] if ids[-1] != tokenizer.eos_token_id else ids)
            with torch.no_grad():
                own, its = (model(ids[None]).logits[0, :-1].double().log_softmax(-1) for model in models)
            apart += float((its.exp() * (its - own)).sum())
            agreed, tokens = agreed + int((own.argmax(-1) == its.argmax(-1)).sum()), tokens + len(ids) - 1
        told.append((apart / tokens, agreed / tokens))
    return tuple(sum(column) / len(told) for column in zip(*told, strict=True))


@pytest.mark.parametrize("split", ["select", "report"])
def test_what_is_told_of_adapters_is_what_peft_finds(tiny_base, genome, adapters, split):
    found = evaluate_folders(adapters, genome.folder, tiny_base, split)
    assert list(found["candidates"]) == [BASE, *adapters, TOGETHER]
    for name in (None, *adapters):
        told = found["candidates"][name or BASE]
        for domain, (loss, bits, accuracy) in by_hand(tiny_base, genome, split, name).items():
            assert told["domains"][domain]["loss"] == pytest.approx(loss, rel=1e-5)
            assert told["domains"][domain]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
            assert told["domains"][domain]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
            assert told["domains"][domain]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert 0.0 <= found["candidates"][TOGETHER]["accuracy"] <= 1.0
    first, second, base = (found["agreement"][name] for name in (*adapters, BASE))
    assert (first["members"], second["members"], base["members"]) == ([adapters[1]], [adapters[0]], adapters)
    apart, agreed = kl_by_hand(tiny_base, genome, split, *adapters)
    assert first["divergence"]["mean"] == pytest.approx(apart, rel=1e-4)  # KL(the other || this)
    assert first["agreement"]["mean"] == second["agreement"]["mean"] == pytest.approx(agreed)
    assert first["spread"] == pytest.approx(0.0, abs=1e-6)  # of one member
    apart = found["against_base"][adapters[0]]
    assert apart["low"] <= apart["mean"] <= apart["high"]
    assert apart["mean"] == pytest.approx(found["candidates"][adapters[0]]["loss"] - found["candidates"][BASE]["loss"])


def test_what_cannot_be_judged_is_refused_with_its_reason(tiny_base, genome, adapters, tmp_path):
    with pytest.raises(EvaluationError, match="held-out split"):
        evaluate_folders(adapters, genome.folder, tiny_base, "train")
    for twice in ([adapters[0]] * 2, ["base"]):
        with pytest.raises(EvaluationError, match="two candidates"):
            evaluate_folders(twice, genome.folder, tiny_base)
    with pytest.raises(EvaluationError, match="which base"):
        evaluate_folders(adapters, genome.folder)
    with pytest.raises(GenomeError):
        evaluate_folders(adapters, tmp_path, tiny_base)
    with pytest.raises(MergeError, match="no folder"):
        evaluate_folders([str(tmp_path / "nothing")], genome.folder, tiny_base)
    other = {"model.layers.0.self_attn.q_proj": (torch.ones(1, 40), torch.ones(64, 1))}
    write_adapter(tmp_path / "other", AdapterWeights("tiny", None, 1, 1.0, False, ("q_proj",), other))
    with pytest.raises(ModelError, match="q_proj"):
        evaluate_folders([str(tmp_path / "other")], genome.folder, tiny_base)
    elsewhere = {"model.layers.7.self_attn.q_proj": (torch.ones(1, 48), torch.ones(64, 1))}
    write_adapter(tmp_path / "elsewhere", AdapterWeights("tiny", None, 1, 1.0, False, ("q_proj",), elsewhere))
    with pytest.raises(ModelError, match=r"layers\.7"):
        evaluate_folders([str(tmp_path / "elsewhere")], genome.folder, tiny_base)


def test_the_verb_tells_the_best_first_and_writes_nothing(tiny_base, genome, adapters, tmp_path):
    before = sorted(path.name for path in tmp_path.rglob("*"))
    asked = ["evaluate", *adapters, "--base", str(tiny_base), "--genome", str(genome.folder)]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0, told.output
    heads, *lines = told.stdout.splitlines()[1:]
    lines, (below, *agreements) = lines[:4], lines[4:]
    assert below.split() == ["KL(another", "||", "this),", "nats", "same", "token", "as", "their", "mixture"]
    assert {line.split()[-1] for line in agreements} == {BASE, *adapters}
    assert heads.split() == ["loss", "perplexity", "bits/byte", "accuracy", "against", "the", "base"]
    losses = [float(line.split()[0]) for line in lines]
    assert losses == sorted(losses)
    assert {line.split()[-1] for line in lines} == {BASE, TOGETHER, *adapters}
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    again = json.loads(CliRunner().invoke(app, [*asked, "--split", "report", "--json"]).stdout)
    assert again["split"] == "report"
    wrong = CliRunner().invoke(app, [*asked, "--split", "train"])
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "select or report" in wrong.stderr
