"""A run that names a task of lm-eval: asked of bodies, told in the verdict and on the page. lm-eval is an extra."""

import importlib.util
import json

import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra"),
]

TASK = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""


def test_a_run_tells_tasks_of_lm_eval_that_chose_nothing(garden, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": word, "choices": [" a", " self"], "answer": n % 2} for n, word in enumerate(("def", "return", "x"))]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "tiny.yaml").write_text(TASK % (tmp_path / "rows.jsonl"))
    run = garden.run(
        "tasks", f"evaluate.lm_eval={{tasks: [tiny_choices], folder: '{tmp_path}'}}", "population.scheduler={type: fifo}"
    )
    verdict = json.loads((run / "verdict.json").read_text())
    told = verdict["lm_eval"]["tasks"]["tiny_choices"]
    assert told["items"] == 3
    assert set(told["candidates"]) == {"seed", verdict["winner"], verdict["chosen"]}
    assert all(
        0.0 <= own["acc"]["low"] <= own["acc"]["value"] <= own["acc"]["high"] <= 1.0 for own in told["candidates"].values()
    )
    assert "Task tiny_choices of lm-eval" in (run / "report.html").read_text()
    assert "## Tasks of lm-eval" in (run / "imago" / "README.md").read_text()
