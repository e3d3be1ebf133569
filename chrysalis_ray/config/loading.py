"""Reading an experiment and its blueprint. Every mistake of both files is told at once, each with file, line and remedy.

text --yaml_tree--> tree with lines --overrides--> tree --pydantic--> Experiment, Blueprint --checks--> LoadedExperiment
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

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
from chrysalis_ray.config.lm_eval import with_task_folder
from chrysalis_ray.config.overrides import apply_overrides
from chrysalis_ray.config.problems import nearest, problem_at, problems_of
from chrysalis_ray.config.registry import with_registries, with_registry_allowed
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.config.selection import select_genome
from chrysalis_ray.config.synonyms import BLUEPRINT, EXPERIMENT
from chrysalis_ray.config.yaml_tree import Node, Tree, YamlRefused, read_tree
from chrysalis_ray.core.errors import ConfigError

__all__ = ["LoadedExperiment", "experiment_schema", "load_blueprint", "load_experiment", "shipped_blueprints"]

Model = TypeVar("Model", bound=BaseModel)

MAX_PROBLEMS = 50
_PACKAGE = Path(chrysalis_ray.__file__).resolve().parent
_INSTALLED, _CHECKOUT = _PACKAGE / "blueprints", _PACKAGE.parent / "blueprints"
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


def load_experiment(path: Path, overrides: Sequence[str] = (), choose: Chooser | None = None) -> LoadedExperiment:
    """The experiment at `path` with its blueprint, validated and cross-checked.

    `overrides` are ``a.b=c`` texts as of ``--set``; those that begin with ``blueprint.`` reach into the blueprint. `choose` is
    asked where the experiment says ``blueprint: auto``. Raises ConfigError whose `problems` name every mistake of both files.
    """
    from chrysalis_ray.config.probes import with_probes  # it reads its files as this one does

    path = Path(path)
    problems: list[str] = []
    text, tree = _read(path, str(path), "experiment")
    problems += tree.problems
    root, misplaced = apply_overrides(tree.root, [text for text in overrides if not text.startswith("blueprint.")])
    problems += misplaced
    root = with_registries(root, path, problems)
    patches = [text.removeprefix("blueprint.") for text in overrides if text.startswith("blueprint.")]
    numbered, is_open = without_auto_tokens(root)
    experiment = _validate(Experiment, numbered, EXPERIMENT, problems)
    chosen, blueprint_path = None, path
    if is_auto(root):
        both = choose_blueprint(experiment, root, path, is_open, choose, problems)
        if both is None:
            raise _refusal(path, problems)
        experiment, chosen = both
        blueprint_text, blueprint_root = chosen.text, chosen_tree(chosen, patches, problems)
        blueprint = _validate(Blueprint, blueprint_root, BLUEPRINT, problems)
    else:
        problems += auto_tokens_problems(root, is_open)
        found = _blueprint_path(path, root, problems)
        if found is None:
            raise _refusal(path, problems)
        blueprint_path = found
        blueprint_text, blueprint_root, blueprint = _read_blueprint(found, _display(path, found), patches, problems)
    if experiment is None or blueprint is None or problems:
        raise _refusal(path, problems)
    loaded = LoadedExperiment(experiment, blueprint, path, blueprint_path, text, blueprint_text, tuple(overrides), chosen)
    problems += check_experiment(loaded, root, blueprint_root)
    experiment = with_task_folder(with_probes(experiment, root, path.parent, problems), root, path.parent, problems)
    if problems:
        raise _refusal(path, problems)
    experiment, selected = select_genome(experiment, blueprint.genome)
    loaded = replace(loaded, experiment=experiment, selected=selected)
    loaded, problems = with_candidates(loaded, root, partial(load_experiment, choose=choose))
    if problems:
        raise _refusal(path, problems)
    return loaded


def load_blueprint(path: Path) -> Blueprint:
    """The blueprint at `path`, validated. Raises ConfigError."""
    path = Path(path)
    problems: list[str] = []
    _, root, blueprint = _read_blueprint(path, str(path), [], problems)
    if blueprint is not None and not problems:
        problems += check_blueprint(blueprint, root)
    if blueprint is None or problems:
        raise _refusal(path, problems)
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
    except YamlRefused as refused:
        problems += _refused(refused, path, "blueprint").problems
        return "", Node("map", name), None
    root, misplaced = apply_overrides(written, patches)
    problems += misplaced
    return text, root, _validate(Blueprint, root, BLUEPRINT, problems)


def _read(path: Path, name: str, what: str) -> tuple[str, Tree]:
    try:
        return read_tree(path, name)
    except YamlRefused as refused:
        raise _refused(refused, path, what) from refused


def _refused(refused: YamlRefused, path: Path, what: str) -> ConfigError:
    hint = _neighbours(path) if refused.what == "no such file" else ""
    return _refusal(path, [f"{refused.where}: {what}: {refused.what}{hint}"])


def _validate(model: type[Model], root: Node, home: str, problems: list[str]) -> Model | None:
    try:
        return model.model_validate(root.data(), strict=True)
    except ValidationError as error:
        problems += problems_of(error, root, model, home)
        return None


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


def _neighbours(path: Path) -> str:
    """`; did you mean ...?` from the YAML files that lie where `path` was looked for."""
    try:
        there = sorted(file.name for file in path.parent.glob("*.yaml"))[:20]
    except (OSError, ValueError):
        return ""
    if not there:
        return f"; there is no YAML file in {path.parent}"
    close = nearest(path.name, there)
    return f"; did you mean {close!r}?" if close else f"; there are {', '.join(there)}"


def _refusal(path: Path, problems: Sequence[str]) -> ConfigError:
    unique = tuple(dict.fromkeys(problems))
    count = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
    if len(unique) > MAX_PROBLEMS:
        unique = (*unique[:MAX_PROBLEMS], f"... and {len(unique) - MAX_PROBLEMS} more")
    return ConfigError("\n  ".join((f"{count} in {path}:", *unique)), problems=unique)
