"""What the verdict tells of probes stands on the page, in the card, in the terminal and in what W&B gets."""

from __future__ import annotations

import io

from rich.console import Console

from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.report.card import imago_card
from chrysalis_ray.report.comparison import read_run
from chrysalis_ray.report.html import report_page
from chrysalis_ray.report.probes import probe_metrics
from chrysalis_ray.report.table import comparison_tables


def with_probes(layout):
    verdict = read_json(layout.verdict)
    candidates = {
        name: {"items": 40, "accuracy": share, "low": share - 0.1, "high": share + 0.1}
        for name, share in {"seed": 0.2, verdict["winner"]: 0.5, "ensemble": 0.625}.items()
    }
    verdict["probes"] = {
        "plu<b>rals": {
            "kind": "multiple_choice", "by": "likelihood", "items": 40, "candidates": candidates,
            "differences": [{"of": "ensemble", "against": "seed", "mean": 0.425, "low": 0.2, "high": 0.6}],
        }
    }  # fmt: skip
    write_json(layout.verdict, verdict)
    return read_run(layout.root)


def test_probes_are_told_everywhere(judged):
    comparison = with_probes(judged)
    page = report_page(comparison)
    assert "<h2>Probes</h2>" in page
    assert "plu&lt;b&gt;rals" in page
    assert "plu<b>" not in page
    assert "ensemble against seed: +42.5%, interval +20.0% to +60.0%" in page
    card = imago_card(judged.root)
    assert (
        "| plu&lt;b&gt;rals | multiple_choice by likelihood, 40 items | 62.5% [52.5%, 72.5%] | 20.0% [10.0%, 30.0%] |" in card
    )
    stream = io.StringIO()
    Console(file=stream, width=160).print(comparison_tables(comparison))
    assert "probe plu<b>rals: multiple_choice by likelihood, 40 items" in stream.getvalue()
    assert "52.5% to 72.5%" in stream.getvalue()
    assert probe_metrics(comparison.probes, "ensemble") == {"probe/plu<b>rals": 0.625}


def test_a_run_without_probes_says_nothing_of_them(judged):
    assert "Probes" not in report_page(read_run(judged.root))
    assert "Probes" not in imago_card(judged.root)
