import io
from dataclasses import replace

import pytest
from example_run import metrics_row, write_branch
from rich.console import Console

from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.report.live import LiveTable


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def _console(kind: str) -> Console:
    return Console(file=io.StringIO(), width=160, force_terminal=kind == "terminal")


def test_lines_where_there_is_no_terminal(layout: RunLayout) -> None:
    variants = write_branch(layout)
    console = _console("pipe")
    with LiveTable(variants, console=console) as live:
        live.update([metrics_row(variants[0], 1), metrics_row(variants[1], 1)])
        live.update([{"variant": variants[0].variant_id, "state": "stopped"}])
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("v000-api_docs: training, step 8/64, 4,096 tokens, 9,000 tokens/s, train ")
    assert "\x1b" not in console.file.getvalue()
    assert lines[2].startswith("v000-api_docs: stopped, step 8/64")


def test_a_table_on_a_terminal(layout: RunLayout) -> None:
    variants = write_branch(layout)
    console = _console("terminal")
    with LiveTable(variants, console=console) as live:
        live.update(metrics_row(variant, 2) for variant in variants)
    text = console.file.getvalue()
    assert "v007-code" in text
    assert "code 44 %" in text
    assert "16/64" in text
    assert "8 of 8 variants at work" in text


def test_quiet_says_nothing(layout: RunLayout) -> None:
    variants = write_branch(layout)
    console = _console("terminal")
    with LiveTable(variants, mode="quiet", console=console) as live:
        live.update([metrics_row(variants[0], 1)])
    assert console.file.getvalue() == ""


def test_the_time_left_counts_only_variants_at_work(layout: RunLayout) -> None:
    variants = write_branch(layout)[:2]
    live = LiveTable(variants, mode="quiet", console=_console("pipe"))
    assert live.eta_seconds is None
    # the first turn moved both variants by one chunk in 10 seconds
    rows = [{**metrics_row(variant, 1), "seconds": 10.0, "packed_with": 1} for variant in variants]
    chunk, left = rows[0]["step"], variants[0].steps - rows[0]["step"]
    live.update(rows)
    assert live.eta_seconds == pytest.approx(10 * left / chunk)
    live.update([{"variant": variants[1].variant_id, "state": "stopped"}])
    assert live.eta_seconds == pytest.approx(10 * left / chunk)
    live.update([{"variant": variants[0].variant_id, "state": "finished"}])
    assert live.eta_seconds == 0.0


def test_names_are_text_and_missing_numbers_are_dashes(layout: RunLayout) -> None:
    variants = write_branch(layout)[:1]
    console = _console("pipe")
    live = LiveTable(variants, mode="lines", console=console)
    live.update([{"variant": "[red]x[/red]", "state": "failed", "train_loss": float("nan")}])
    assert "[red]x[/red]: failed" in console.file.getvalue()
    assert "train -" in console.file.getvalue()
    with pytest.raises(ValueError, match="mode"):
        LiveTable(variants, mode="loud")


def test_the_time_left_is_the_same_for_steps_of_any_size(layout: RunLayout) -> None:
    """A report is one share of every budget, whether it is many small steps or few large ones."""
    small, large = write_branch(layout)[:2]
    large = replace(large, rows_per_step=4 * large.rows_per_step, steps=large.steps // 4, chunk_steps=large.chunk_steps // 4)
    for newest in (small, large):
        live = LiveTable([small, large], mode="quiet", console=_console("pipe"))
        told = {"seconds": 10.0, "packed_with": 1}
        for member in sorted((small, large), key=lambda member: member is newest):
            live.update([{**metrics_row(member, 1), "step": member.chunk_steps, **told}])
        assert live.eta_seconds == pytest.approx(10 * (small.steps / small.chunk_steps - 1))
