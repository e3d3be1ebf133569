"""`chrysalis VERB FILE [--set a.b=c] [--json]`: the verbs and nothing else. Knobs live in the YAML, not here.

Exit codes: 0 well, 1 failed, 2 wrong usage or an invalid file, 3 does not fit this hardware, 130 interrupted,
143 terminated.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

import typer

from chrysalis_ray import __version__
from chrysalis_ray.cli.audit import audit
from chrysalis_ray.cli.blueprint import choose_blueprint, show_blueprint
from chrysalis_ray.cli.doctor import doctor
from chrysalis_ray.cli.evaluate import evaluate
from chrysalis_ray.cli.fold import fold
from chrysalis_ray.cli.forget import forget_documents
from chrysalis_ray.cli.genome import (
    build_genome,
    diff_genomes,
    export_genome,
    show_genome,
    tell_exposure,
    verify_genome,
)
from chrysalis_ray.cli.lineage import lineage
from chrysalis_ray.cli.merge import merge
from chrysalis_ray.cli.outcome import verb
from chrysalis_ray.cli.plan import plan
from chrysalis_ray.cli.report import report
from chrysalis_ray.cli.run import run
from chrysalis_ray.cli.schema import schema
from chrysalis_ray.cli.validate import validate

app = typer.Typer(
    name="chrysalis",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help starts in half the time
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
blueprint_app = typer.Typer(no_args_is_help=True, help="Look at a blueprint, or have one chosen.")
BLUEPRINT_VERBS: dict[str, Callable[..., None]] = {"show": show_blueprint, "choose": choose_blueprint}
genome_app = typer.Typer(no_args_is_help=True, help="Build a sealed genome, and look after it.")
GENOME_VERBS: dict[str, Callable[..., None]] = {
    "build": build_genome,
    "verify": verify_genome,
    "show": show_genome,
    "diff": diff_genomes,
    "export": export_genome,
    "exposure": tell_exposure,
    "forget": forget_documents,
}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chrysalis {__version__}")
        raise typer.Exit


@app.callback()
def chrysalis(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Grow a population of LoRA variants from one seed on Ray, merge it, and say honestly whether that helped.

    \b
    chrysalis plan experiments/quickstart.yaml      what would be built, without building it
    chrysalis run experiments/quickstart.yaml       grow it; the same command again goes on after any end
    chrysalis report runs/quickstart                compare the variants
    """


for function in (run, plan, report, merge, fold, audit, evaluate, validate, lineage, schema, doctor):
    app.command(function.__name__)(verb(function))
for name, look_after in GENOME_VERBS.items():
    genome_app.command(name)(verb(look_after))
for name, choose in BLUEPRINT_VERBS.items():
    blueprint_app.command(name)(verb(choose))
app.add_typer(genome_app, name="genome")
app.add_typer(blueprint_app, name="blueprint")


def main() -> None:
    """The console script."""
    # OpenMP threads that wait spin by default. With another process on one of the cores, two spinning threads wait for each
    # other's time slices: pre-training the quickstart's base took 100 times as long. Read when torch is loaded, so set here.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    app(prog_name="chrysalis")
