"""Arguments that several verbs share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Experiment = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="An experiment YAML.", show_default=False)]
RunDirectory = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_DIRECTORY", help="A folder that `chrysalis run` wrote.", show_default=False, exists=True, file_okay=False
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace one value of the experiment; `blueprint.KEY=VALUE` reaches into its blueprint. Repeatable.",
    ),
]
Adapters = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER...", help="PEFT LoRA folders, or hub ids like owner/adapter.", show_default=False),
]
SeedAdapter = Annotated[
    str | None,
    typer.Option(
        "--seed-adapter", metavar="ADAPTER", help="The adapter they were all branched from; changes count from there."
    ),
]
Runs = Annotated[Path, typer.Option(metavar="DIR", help="Where run directories lie; on a cluster, a folder all nodes see.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for programs.")]
