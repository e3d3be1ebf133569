"""Reading one file of YAML into a model, and telling everything that is wrong with it at once."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from chrysalis_ray.config.problems import nearest, problems_of
from chrysalis_ray.config.yaml_tree import Node, Tree, YamlRefused, read_tree
from chrysalis_ray.core.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

MAX_PROBLEMS = 50


def read(path: Path, name: str, what: str) -> tuple[str, Tree]:
    """Text and tree of the YAML at `path`, which is a `what` and is called `name` in messages. Raises ConfigError."""
    try:
        return read_tree(path, name)
    except YamlRefused as error:
        raise refused(error, path, what) from error


def refused(error: YamlRefused, path: Path, what: str) -> ConfigError:
    """What to raise for a file that is no YAML, or not there."""
    hint = _neighbours(path) if error.what == "no such file" else ""
    return refusal(path, [f"{error.where}: {what}: {error.what}{hint}"])


def validate(model: type[Model], root: Node, home: str, problems: list[str]) -> Model | None:
    """The model of a tree; None if it is none, with what is wrong added to `problems`, in the words of `home`."""
    try:
        return model.model_validate(root.data(), strict=True)
    except ValidationError as error:
        problems += problems_of(error, root, model, home)
        return None


def _neighbours(path: Path) -> str:
    """`; did you mean ...?` from the YAML files that lie where `path` was looked for, or under its name a folder below."""
    try:
        below = sorted(path.parent.glob(f"*/{glob.escape(path.stem)}.yaml"))
        there = {file.stem: file for file in sorted(path.parent.glob("*.yaml"))[:20]}
    except (OSError, ValueError):
        return ""
    close = nearest(path.stem, there)
    if found := [*below, *([there[close]] if close else [])]:
        return f"; did you mean {str(found[0])!r}?"
    if not there:
        return f"; there is no YAML file in {path.parent}"
    return f"; there {'is' if len(there) == 1 else 'are'} {', '.join(file.name for file in there.values())}"


def refusal(path: Path, problems: Sequence[str]) -> ConfigError:
    """What to raise for a file with `problems`: each once, `MAX_PROBLEMS` at most."""
    unique = tuple(dict.fromkeys(problems))
    count = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
    if len(unique) > MAX_PROBLEMS:
        unique = (*unique[:MAX_PROBLEMS], f"... and {len(unique) - MAX_PROBLEMS} more")
    return ConfigError("\n  ".join((f"{count} in {path}:", *unique)), problems=unique)
