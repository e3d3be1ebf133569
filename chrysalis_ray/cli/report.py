"""`chrysalis report`: compare the variants of a run, finished or not."""

from __future__ import annotations

from chrysalis_ray.cli.arguments import Json, RunDirectory
from chrysalis_ray.cli.outcome import print_json


def report(run_directory: RunDirectory, json: Json = False) -> None:
    """Compare the variants of a run.

    Prints variants and merges, best first, and writes report.html; works while it trains and after it failed.

    \b
    chrysalis report runs/quickstart
    """
    from chrysalis_ray.report.comparison import read_run

    comparison = read_run(run_directory)
    if json:
        print_json(comparison.to_json())
        return
    from rich.console import Console

    from chrysalis_ray.report.html import write_report
    from chrysalis_ray.report.table import comparison_tables

    Console().print(comparison_tables(comparison))
    print(f"\n{write_report(run_directory)}")
