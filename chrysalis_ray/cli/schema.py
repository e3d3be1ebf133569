"""`chrysalis schema`: JSON schema for editors."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from chrysalis_ray.cli.outcome import print_json


def schema(
    of: Annotated[Literal["experiment", "blueprint"], typer.Argument(help="Which kind of file.")] = "experiment",
) -> None:
    """Print the JSON schema for editors.

    With it an editor completes and checks an experiment or a blueprint.

    \b
    chrysalis schema > .vscode/experiment.schema.json
    first line of the YAML:  # yaml-language-server: $schema=.vscode/experiment.schema.json
    """
    from chrysalis_ray.config.loading import blueprint_schema, experiment_schema

    print_json(experiment_schema() if of == "experiment" else blueprint_schema())
