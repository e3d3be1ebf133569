"""`chrysalis validate`: every mistake of any number of files, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chrysalis_ray.cli.outcome import tell
from chrysalis_ray.core.errors import ChrysalisError


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Experiments and blueprints.", show_default=False)],
) -> int:
    """Check experiments and blueprints.

    Every mistake of every file is told; exit 2 if there is one.

    \b
    chrysalis validate experiments/*.yaml blueprints/*.yaml
    """
    code = 0
    for file in files:
        try:
            print(f"{file}: {_load(file)}")
        except ChrysalisError as error:  # a base that nobody can fetch is no mistake of the file, and hides none of the others
            code = max(code, tell(error))
    return code


def _load(file: Path) -> str:
    """Load `file` as what its keys say it is, and return that word. Raises ConfigError."""
    from chrysalis_ray.config.loading import load_blueprint, load_experiment
    from chrysalis_ray.training.planning.choice import chooser

    if _is_blueprint(file):
        load_blueprint(file)
        return "a valid blueprint"
    load_experiment(file, choose=chooser())
    return "a valid experiment"


def _is_blueprint(file: Path) -> bool:
    """An experiment names a blueprint or a population; a blueprint none, but a base or what it extends. Unreadable files count
    as experiments."""
    from chrysalis_ray.config.yaml_tree import YamlRefused, read_tree

    try:
        keys = read_tree(file, str(file))[1].root.entries.keys()
    except YamlRefused:
        return False
    return bool({"base", "extends"} & set(keys)) and not {"blueprint", "population"} & set(keys)
