"""What the verdict tells of tasks of lm-eval stands on the page, in the card, in the terminal and in what W&B gets."""

from __future__ import annotations

import io

from rich.console import Console

from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.report.card import imago_card
from chrysalis_ray.report.comparison import read_run
from chrysalis_ray.report.html import report_page
from chrysalis_ray.report.table import comparison_tables
from chrysalis_ray.report.tasks import task_metrics, task_section


def with_tasks(layout):
    verdict = read_json(layout.verdict)
    shares = {"seed": 0.2, verdict["winner"]: 0.5, "ensemble": 0.625}
    verdict["lm_eval"] = {
        "version": "0.4.13",
        "tasks": {
            "arc<b>": {
                "items": 40,
                "candidates": {
                    name: {"acc": {"value": share, "low": share - 0.1, "high": share + 0.1}, "bleu": {"value": 3.0}}
                    for name, share in shares.items()
                },
                "differences": [{"of": "ensemble", "against": "seed", "metric": "acc", "mean": 0.425, "low": 0.2, "high": 0.6}],
            }
        },
    }
    write_json(layout.verdict, verdict)
    return read_run(layout.root)


def test_tasks_are_told_everywhere(judged):
    comparison = with_tasks(judged)
    page = report_page(comparison)
    assert "<h2>Tasks</h2>" in page
    assert "arc&lt;b&gt;" in page
    assert "arc<b>" not in page
    assert "acc of ensemble against seed: +42.5%, interval +20.0% to +60.0%" in page
    assert "| arc&lt;b&gt; | acc | 0.6250 [0.5250 to 0.7250] | 0.2000 [0.1000 to 0.3000] |" in imago_card(judged.root)
    stream = io.StringIO()
    Console(file=stream, width=160).print(comparison_tables(comparison))
    assert "task arc<b>: by lm-eval 0.4.13, 40 items" in stream.getvalue()
    assert "0.5250 to 0.7250" in stream.getvalue()
    assert task_metrics(comparison.lm_eval, "ensemble") == {"lm_eval/arc<b>/acc": 0.625, "lm_eval/arc<b>/bleu": 3.0}


def test_a_run_without_tasks_has_no_section_of_them(judged):
    comparison = read_run(judged.root)
    assert task_section(comparison.lm_eval, "ensemble") == ""
    assert "Tasks of lm-eval" not in imago_card(judged.root)
