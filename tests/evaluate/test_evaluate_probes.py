"""Probe tasks: likelihoods and greedy answers are those of plain transformers, one question at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chrysalis_ray.config.probes import read_probe
from chrysalis_ray.core.errors import ConfigError, EvaluationError
from chrysalis_ray.evaluate.probes import judge_probes
from chrysalis_ray.evaluate.questions import Reader, answered_rows
from chrysalis_ray.evaluate.subjects import Candidate
from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.pack import Pack

CHOICES = """
name: words
kind: multiple_choice
items:
  - {prompt: "def parse_args(self, ", choices: ["args=None", "größer", "x"], answer: 0}
  - {prompt: "import", choices: [" argparse as _argparse, sys", " os"], answer: 1}
  - {prompt: "return ", choices: ["namespace", "None", "self"], answer: 2}
"""
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path):
    generator = torch.Generator().manual_seed(1)
    factors = {NAME: (torch.randn(3, 48, generator=generator) * 0.5, torch.randn(64, 3, generator=generator) * 0.5)}
    write_adapter(tmp_path / "a", AdapterWeights("tiny", None, 3, 6.0, False, (NAME,), factors))
    return str(tmp_path / "a")


def probe_of(tmp_path, text):
    (tmp_path / "probe.yaml").write_text(text, encoding="utf-8")
    return read_probe(tmp_path / "probe.yaml")


def told(tiny_base, probes, adapter):
    pack = Pack(load_base(tiny_base, "fp32"), (NAME,), 2, 3, make_engine(0, "none", "fp32", "cpu"))
    candidates = [Candidate("base"), Candidate("a", adapter)]
    return judge_probes(pack, Reader(tiny_base), 256, probes, candidates, Path)


def likelihood(model, tokenizer, prompt, answer):
    """Log-likelihood of an answer after its prompt."""
    before, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
    start = next((n for n, (one, other) in enumerate(zip(before, whole, strict=False)) if one != other), len(before))
    with torch.no_grad():
        logs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(logs[place - 1, whole[place]]) for place in range(start, len(whole)))


def test_choices_are_those_of_plain_transformers(tiny_base, adapter, tmp_path):
    from peft import PeftModel

    probe = probe_of(tmp_path, CHOICES)
    found = told(tiny_base, [probe], adapter)["words"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    for name, folder in (("base", None), ("a", adapter)):
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, folder) if folder else model
        right, per_byte = 0, 0
        for item in probe.items:
            logs = [likelihood(model, tokenizer, item.prompt, choice) for choice in item.choices]
            sized = [value / len(choice.encode()) for value, choice in zip(logs, item.choices, strict=True)]
            right += max(range(len(logs)), key=logs.__getitem__) == item.answer
            per_byte += max(range(len(logs)), key=sized.__getitem__) == item.answer
        assert found[name]["accuracy"] == pytest.approx(right / 3)
        assert found[name]["accuracy_per_byte"] == pytest.approx(per_byte / 3)
        assert found[name]["low"] <= found[name]["accuracy"] <= found[name]["high"]


def test_an_exact_match_is_what_greedy_decoding_writes(tiny_base, adapter, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for prompt in ("import argparse", "self", "x = [", "return None", "the", "  if a:", "def f(", "string", "''", "%s"):
        ids = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=2, do_sample=False, min_new_tokens=2)[0, ids["input_ids"].shape[1] :]
        answer = tokenizer.decode(written)
        if tokenizer(prompt + answer)["input_ids"] == [*ids["input_ids"][0].tolist(), *written.tolist()]:
            break  # what was written reads back as the tokens that were written
    else:
        raise AssertionError("no prompt has an answer in whole characters")
    wrong = answer[:-1] + ("x" if answer[-1] != "x" else "y")
    lines = ["  - " + json.dumps({"prompt": prompt, "answer": text}) for text in (answer, wrong)]
    probe = probe_of(tmp_path, "\n".join(["name: greedy", "kind: exact_match", "items:", *lines]))
    found = told(tiny_base, [probe_of(tmp_path, CHOICES), probe], adapter)["greedy"]
    assert found["base"]["accuracy"] == 0.5
    assert found["base"]["items"] == 2


def test_a_token_over_the_seam_belongs_to_the_answer(tiny_base, tmp_path):
    probe = probe_of(tmp_path, 'name: seam\nkind: exact_match\nitems:\n  - {prompt: "sel", answer: "f.x"}')
    reader = Reader(tiny_base)
    (row,) = answered_rows(reader, probe, None)
    assert list(row.ids) == reader.encode(["self.x"])[0]
    assert 1 <= row.start < len(row.ids)
    with pytest.raises(EvaluationError, match="seam: 'sel'"):
        answered_rows(reader, probe, 2)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (CHOICES.replace("answer: 2", "answer: 3"), "numbered 0 to 2"),
        (CHOICES.replace('"os"', '"os"').replace('"None"', '"self"'), "same text"),
        (CHOICES.replace("multiple_choice", "guess"), "kind"),
        (CHOICES.replace("prompt: \"import\"", "promt: \"import\""), "promt"),
        ("name: none\nkind: exact_match\nitems: []\n", "items"),
        ("name: [", "probe.yaml:1: probe: not YAML"),
    ],
)  # fmt: skip
def test_a_probe_that_is_written_wrong_is_told_where(tmp_path, text, word):
    with pytest.raises(ConfigError) as caught:
        probe_of(tmp_path, text)
    assert word in str(caught.value)
    assert "probe.yaml" in str(caught.value)
