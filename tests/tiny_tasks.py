"""Small tasks of lm-eval whose data lie in a file beside them, for tests of several rooms; nothing is fetched."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra")

WORDS = ("self", "import os", "return", "def parse", "args", "for x in", "print", "class A", "with open", "if not")
HEAD = """
task: tiny_%s
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
"""
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
""",
    "normed": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{wanted}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


def write_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch, items: int) -> Path:
    """A folder with `TASKS`, named ``tiny_<name>``, each of so many items (at most 10). Returns it."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    where = folder / "tasks"
    where.mkdir()
    rows = [
        {
            "question": word,
            "choices": [" a", " self", "  x = 1"],
            "answer": number % 3,
            "wanted": "(",
            "text": f"{word} = 1\n" * 90,
        }
        for number, word in enumerate(WORDS[:items])
    ]
    (where / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for name, text in TASKS.items():
        (where / f"{name}.yaml").write_text(HEAD % (name, where / "rows.jsonl") + text)
    return where
