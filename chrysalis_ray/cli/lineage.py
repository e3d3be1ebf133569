"""`chrysalis lineage`: where the released adapter comes from, and whether that is still true."""

from __future__ import annotations

from typing import Annotated

import typer

from chrysalis_ray.cli.arguments import Json, RunDirectory
from chrysalis_ray.cli.outcome import FAILED, print_json, print_lines
from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout


def lineage(
    run_directory: RunDirectory,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file of the lineage again.")] = False,
    json: Json = False,
) -> int:
    """Show where a run's adapter comes from.

    Genome, base, seed, variants, merge. With --verify every file is hashed again: exit 1 if a byte changed.

    \b
    chrysalis lineage runs/quickstart --verify
    """
    layout = RunLayout(run_directory.absolute())
    if verify:
        from chrysalis_ray.report.lineage import verify as verify_lineage

        problems = list(verify_lineage(layout.root))
        if json:
            print_json({"verified": not problems, "problems": problems})
        else:
            print_lines(map(str, problems or ["every file of the lineage is what it was when the adapter emerged"]))
        return FAILED if problems else 0
    record = _read(layout)
    if json:
        print_json(record)
    else:
        _print_tree(record, "")
    return 0


def _read(layout: RunLayout) -> dict[str, object]:
    from chrysalis_ray.core.records import read_json

    if not layout.lineage.is_file():
        raise RunError(
            f"no adapter has emerged from {layout.root} ({layout.lineage} is missing)", "finish it with `chrysalis run`"
        )
    return read_json(layout.lineage)


def _print_tree(value: object, indent: str) -> None:
    """Nested records as indented lines, one key each."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(item, dict | list) and item:
            print_lines([f"{indent}{key}"])
            _print_tree(item, indent + "  ")
        else:
            print_lines([f"{indent}{key}  {item}"])
