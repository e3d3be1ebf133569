"""A blueprint as YAML that `loading` reads back as the same blueprint."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from chrysalis_ray.config.blueprint import Blueprint


def blueprint_text(blueprint: Blueprint, comments: Sequence[str] = ()) -> str:
    """Every field of `blueprint` that has a value, below one line of comment for each of `comments`."""
    content = blueprint.model_dump(mode="json", exclude_none=True)
    body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return "".join(f"# {' '.join(comment.split())}\n" for comment in comments) + body
