"""Reading an experiment and its blueprint. Every mistake of both files is told at once, each with file, line and remedy.

text --yaml_tree--> tree with lines --overrides--> tree --pydantic--> Experiment, Blueprint --checks--> LoadedExperiment
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import chrysalis_ray
from chrysalis_ray.config.auto import (
    AUTO,
    Chooser,
    auto_tokens_problems,
    choose_blueprint,
    chosen_tree,
    is_auto,
    without_auto_tokens,
)
from chrysalis_ray.config.blueprint import Blueprint
from chrysalis_ray.config.candidates import with_candidates
from chrysalis_ray.config.checks import check_blueprint, check_experiment
from chrysalis_ray.config.experiment import Experiment
from chrysalis_ray.config.extending import KEY, read_extending
from chrysalis_ray.config.overrides import apply_overrides
from chrysalis_ray.config.probes import with_probes
from chrysalis_ray.config.problems import nearest, problem_at
from chrysalis_ray.config.reading import read, refusal, refused, validate
from chrysalis_ray.config.registry import with_registries, with_registry_allowed
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.config.selection import select_genome
from chrysalis_ray.config.synonyms import BLUEPRINT, EXPERIMENT
from chrysalis_ray.config.task_folder import with_task_folder
from chrysalis_ray.config.yaml_tree import Node, YamlRefused

__all__ = ["LoadedExperiment", "experiment_schema", "load_blueprint", "load_experiment", "shipped_blueprints"]

_PACKAGE = Path(chrysalis_ray.__file__).resolve().parent
_INSTALLED, _CHECKOUT = _PACKAGE / "blueprints", _PACKAGE.parent / "blueprints"
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


def load_experiment(path: Path, overrides: Sequence[str] = (), choose: Chooser | None = None) -> LoadedExperiment:
    """The experiment at `path` with its blueprint, validated and cross-checked.

    `overrides` are ``a.b=c`` texts as of ``--set``; those that begin with ``blueprint.`` reach into the blueprint. `choose` is
    asked where the experiment says ``blueprint: auto``. Raises ConfigError whose `problems` name every mistake of both files.
    """
    path = Path(path)
    problems: list[str] = []
    text, tree = read(path, str(path), "experiment")
    problems += tree.problems
    root, misplaced = apply_overrides(tree.root, [text for text in overrides if not text.startswith("blueprint.")])
    problems += misplaced
    root = with_registries(root, path, problems)
    patches = [text.removeprefix("blueprint.") for text in overrides if text.startswith("blueprint.")]
    numbered, is_open = without_auto_tokens(root)
    experiment = validate(Experiment, numbered, EXPERIMENT, problems)
    chosen, blueprint_path = None, path
    if is_auto(root):
        both = choose_blueprint(experiment, root, path, is_open, choose, problems)
        if both is None:
            raise refusal(path, problems)
        experiment, chosen = both
        blueprint_text, blueprint_root = chosen.text, chosen_tree(chosen, patches, problems)
        blueprint = validate(Blueprint, blueprint_root, BLUEPRINT, problems)
    else:
        problems += auto_tokens_problems(root, is_open)
        found = _blueprint_path(path, root, problems)
        if found is None:
            raise refusal(path, problems)
        blueprint_path = found
        blueprint_text, blueprint_root, blueprint = _read_blueprint(found, _display(path, found), patches, problems)
    if experiment is None or blueprint is None or problems:
        raise refusal(path, problems)
    loaded = LoadedExperiment(experiment, blueprint, path, blueprint_path, text, blueprint_text, tuple(overrides), chosen)
    problems += check_experiment(loaded, root, blueprint_root)
    experiment = with_task_folder(with_probes(experiment, root, path.parent, problems), root, path.parent, problems)
    if problems:
        raise refusal(path, problems)
    experiment, selected = select_genome(experiment, blueprint.genome)
    loaded = replace(loaded, experiment=experiment, selected=selected)
    loaded, problems = with_candidates(loaded, root, partial(load_experiment, choose=choose))
    if problems:
        raise refusal(path, problems)
    return loaded


def load_blueprint(path: Path) -> Blueprint:
    """The blueprint at `path`, validated. Raises ConfigError."""
    path = Path(path)
    problems: list[str] = []
    _, root, blueprint = _read_blueprint(path, str(path), [], problems)
    if blueprint is not None and not problems:
        problems += check_blueprint(blueprint, root)
    if blueprint is None or problems:
        raise refusal(path, problems)
    return blueprint


def shipped_blueprints() -> dict[str, Path]:
    """Blueprints that come with the package, by bare name."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}


def experiment_schema() -> dict[str, Any]:
    """JSON schema of an experiment file, for editors (``# yaml-language-server: $schema=...``)."""
    schema = with_registry_allowed(Experiment.model_json_schema())
    budget = schema["$defs"]["Population"]["properties"]
    budget["tokens_per_variant"] = {"anyOf": [budget["tokens_per_variant"], {"const": AUTO}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def blueprint_schema() -> dict[str, Any]:
    """JSON schema of a blueprint file, for editors. What a file extends need not be said again."""
    schema = Blueprint.model_json_schema()
    extends = {"type": "string", "description": "A shipped blueprint or a path: what this one starts from."}
    either = {"anyOf": [{"required": [KEY]}, {"required": schema.pop("required")}]}
    properties = {KEY: extends, **schema.pop("properties")}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "properties": properties, **either}


def _read_blueprint(path: Path, name: str, patches: Sequence[str], problems: list[str]) -> tuple[str, Node, Blueprint | None]:
    try:
        text, written = read_extending(path, name, shipped_blueprints(), problems)
    except YamlRefused as error:
        problems += refused(error, path, "blueprint").problems
        return "", Node("map", name), None
    root, misplaced = apply_overrides(written, patches)
    problems += misplaced
    return text, root, validate(Blueprint, root, BLUEPRINT, problems)


def _blueprint_path(path: Path, root: Node, problems: list[str]) -> Path | None:
    """The file that `blueprint:` names: relative to the experiment, or the bare name of a shipped blueprint."""
    written = root.entries["blueprint"][1].value if "blueprint" in root.entries else None
    if not isinstance(written, str):
        return None  # pydantic has said so
    shipped = shipped_blueprints()
    if written in shipped:
        return shipped[written]
    candidate = path.parent / written
    try:
        exists = candidate.is_file()
    except (OSError, ValueError):
        exists = False
    if exists:
        return candidate
    close = nearest(Path(written).stem, shipped)
    guess = f"; did you mean {close!r}?" if close else ""
    known = ", ".join(shipped) or "none"
    what = f"no blueprint {written!r}: not {AUTO}, not a shipped one ({known}), and there is no file {candidate}{guess}"
    problems.append(problem_at(root, ("blueprint",), what))
    return None


def _display(experiment: Path, blueprint: Path) -> str:
    """A short name of the blueprint's file for messages: relative to the working folder if it lies below."""
    resolved, here = blueprint.resolve(), Path.cwd()
    return str(resolved.relative_to(here)) if resolved.is_relative_to(here) and not experiment.is_absolute() else str(blueprint)
