"""Reading what other rooms wrote: JSON from a folder that a person may have touched, never trusted to have a shape."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.records import read_json


def manifest(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is no such file."""
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not JSON: {error}", "delete it; the stage that writes it runs again") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} is not a JSON object", "delete it; the stage that writes it runs again")
    return value


def mapping(value: Any) -> dict[str, Any]:
    """`value` as a dict, empty where it is none."""
    return dict(value) if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """`value` as a finite float, None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a mapping, by key."""
    return {str(key): checked for key, item in mapping(value).items() if (checked := number(item)) is not None}
