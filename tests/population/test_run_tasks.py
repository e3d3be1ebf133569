"""A run that names a task of lm-eval: asked of bodies, told in the verdict and on the page. lm-eval is an extra."""

import json

import pytest
from tiny_tasks import installed, write_tasks

pytestmark = [pytest.mark.ray, pytest.mark.slow, installed]


def test_a_run_tells_tasks_of_lm_eval_that_chose_nothing(garden, tmp_path, monkeypatch):
    folder = write_tasks(tmp_path, monkeypatch, 3)
    run = garden.run(
        "tasks", f"evaluate.lm_eval={{tasks: [tiny_choices], folder: '{folder}'}}", "population.scheduler={type: fifo}"
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
