"""`chrysalis genome forget`: a new genome without some documents, and an honest word on who learned from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chrysalis_ray.cli.arguments import Json, Runs
from chrysalis_ray.cli.genome import Directory, check_place, find_document, genome_folder
from chrysalis_ray.cli.outcome import print_json, print_lines
from chrysalis_ray.core.layout import RunLayout

if TYPE_CHECKING:
    from chrysalis_ray.genome.build import Genome

SHOWN = 12


def forget_documents(
    directory: Directory,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the new genome is to lie.", show_default=False)],
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; kept in every tombstone.", show_default=False)],
    documents: Annotated[
        list[str] | None,
        typer.Argument(metavar="DOCUMENT...", help="Documents: ids, starts of ids, or paths.", show_default=False),
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option("--source", metavar="NAME", help="All of a source: its url, path or name. Repeatable.")
    ] = None,
    licence: Annotated[
        list[str] | None,
        typer.Option("--licence", metavar="SPDX", help="All of a licence; * stands for anything. Repeatable."),
    ] = None,
    runs: Runs = Path("runs"),
    json: Json = False,
) -> None:
    """Make the next genome without some documents.

    DIRECTORY stays as it is. The new genome keeps a tombstone of each document (hash, path, reason, date), never its text; a
    build into its folder, or with `genome.forget: FOLDER/forgotten.jsonl`, leaves them out too. Adapters of the runs in
    --runs that learned from them are named: their weights are not unlearned.

    \b
    chrysalis genome forget runs/quickstart notes/3.txt --reason "asked by its author" --out genomes/clean
    """
    from chrysalis_ray.genome.build import open_genome
    from chrysalis_ray.genome.forgetting import forget, near_duplicates, of_licence, of_source
    from chrysalis_ray.population.witnesses import places_of_text, runs_of, witnesses

    folder, here = out.absolute(), genome_folder(directory)
    genome = open_genome(here)
    chosen: list[Mapping[str, Any]] = [find_document(genome, wanted) for wanted in documents or ()]
    chosen += [row for name in source or () for row in of_source(genome, name)]
    chosen += [row for pattern in licence or () for row in of_licence(genome, pattern)]
    rows = list({row["doc_id"]: row for row in chosen}.values())
    check_place(folder)
    made = forget(genome, rows, folder, reason, datetime.now(UTC).date().isoformat())
    doc_ids = {row["doc_id"] for row in rows}
    layouts = runs_of({runs, directory.absolute().parent} if here == RunLayout(directory.absolute()).genome else {runs})
    learned = witnesses(layouts, doc_ids)
    told = {
        "before": genome.genome_id,
        "genome_id": made.genome_id,
        "forgotten": rows,
        "near_duplicates": near_duplicates(genome.manifest["content"]["documents"], doc_ids),
        "runs_searched": len(layouts),
        "runs": [witness.to_json() for witness in learned],
        "text_remains": places_of_text(genome, layouts, [witness.run for witness in learned]),
    }
    print_json(told) if json else print_lines(_lines(told, made, runs))


def _lines(told: Mapping[str, Any], made: Genome, runs: Path) -> list[str]:
    domains = Counter(row["domain"] for row in told["forgotten"])
    counts = ", ".join(f"{count} of {domain}" for domain, count in sorted(domains.items()))
    left = len(made.manifest["content"]["documents"])
    lines = [f"{told['before'][:16]} -> {told['genome_id']}: {counts} forgotten, {left} documents stay, in {made.folder}"]
    if near := told["near_duplicates"]:
        lines.append(f"near-duplicates of them stay: {_shown([row['path'] for row in near])}; name them too if they are meant")
    lines.append(f"who learned from them, among {told['runs_searched']} runs of {runs}:")
    for run in told["runs"]:
        lines += _lines_of_run(run)
    if not any(run["variants"] or run["base"] or run["unknown"] for run in told["runs"]):
        lines.append("  nobody")
    else:
        lines.append("weights are not unlearned: what is named keeps what it learned until it is trained again without them")
    lines.append("their text still lies in " + ", ".join(told["text_remains"]) + ": delete what is not needed any more")
    return lines


def _lines_of_run(run: Mapping[str, Any]) -> list[str]:
    if run["unknown"]:
        return [f"  {run['run']}: cannot be told ({run['unknown']})"]
    lines = [f"  {run['run']}: its genome holds {run['documents']} of them"]
    lines += [
        f"    {name}: {seen['tokens']} tokens at {len(seen['steps'])} steps, {seen['steps'][0]} to {seen['steps'][-1]}"
        for name, seen in run["variants"].items()
    ]
    lines += ["    the embedded base, which was grown from the train split"] if run["base"] else []
    lines += [f"    adapters that carry it: {_shown(run['adapters'])}"] if run["adapters"] else []
    return lines


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
