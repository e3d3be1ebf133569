"""pydantic's errors in words for the person who wrote the file: where, what is wrong, what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from chrysalis_ray.config.synonyms import ABSENT, BLUEPRINT, CONVERSIONS, EXPERIMENT, GLOBS, SYNONYMS
from chrysalis_ray.config.yaml_tree import Node

Location = tuple[str | int, ...]
Finding = tuple[Location, str]  # dotted path, what is wrong and what was meant

_NUMBER = re.compile(r"[-+]?(\.\d+|\d[\d_,]*(\.\d*)?)([eE][-+]?\d+)?")
_RANGE = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
_BOUND = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be, or None."""
    by_lower = {name.lower().replace("-", "_"): name for name in known}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), list(by_lower), 1, 0.6)
    return by_lower[found[0]] if found else None


def suggestion(word: str, known: Sequence[str]) -> str:
    """``did you mean 'a'? known: a, b`` as far as that helps."""
    close = nearest(word, known)
    guess = f"did you mean {close!r}? " if close else ""
    return f"{guess}known: {', '.join(known)}"


def problem_at(tree: Node, path: Location, what: str) -> str:
    """``where: dotted.path: what``; where is that of the deepest node on `path` that exists."""
    return f"{locate(tree, path)}: {'.'.join(str(part) for part in path) or 'file'}: {what}"


def locate(tree: Node, path: Location) -> str:
    """Where the last existing part of `path` was written: ``file:line`` of its key, or ``--set``."""
    node, where = tree, tree.where
    for part in path:
        if node.kind == "map" and part in node.entries:
            where, node = node.entries[str(part)]
        elif node.kind == "list" and isinstance(part, int) and part < len(node.items):
            node = node.items[part]
            where = node.where
        else:
            break
    return where


def problems_of(error: ValidationError, tree: Node, model: type[BaseModel], home: str) -> list[str]:
    """One line per mistake in the file that `tree` was read from. `home` is ``experiment`` or ``blueprint``."""
    lines: dict[Location, str] = {}
    missing: set[Location] = set()
    for detail in error.errors(include_url=False, include_context=True):
        location: Location = detail["loc"]
        if _is_echo(detail):
            continue
        path = written_path(tree, location)
        if detail["type"] == "union_tag_invalid":
            path = (*path, detail["ctx"]["discriminator"].strip("'"))
        if detail["type"] == "missing":
            missing.add(path)
        what = _explain(dict(detail), path, _owner(model, location), model, home)
        lines.setdefault(path, problem_at(tree, path, what))
    for path in missing:  # a key that is misspelt is not missing as well
        if any(other[:-1] == path[:-1] and f"did you mean {path[-1]!r}" in line for other, line in lines.items()):
            del lines[path]
    return list(lines.values())


def written_path(tree: Node, location: Location) -> Location:
    """`location` of pydantic without the union tags that nobody wrote (``scheduler.asha.grace`` -> ``scheduler.grace``)."""
    path: list[str | int] = []
    node: Node | None = tree
    for index, part in enumerate(location):
        if node is not None and node.kind == "map" and part in node.entries:
            path.append(part)
            node = node.entries[str(part)][1]
        elif node is not None and node.kind == "list" and isinstance(part, int):
            path.append(part)
            node = node.items[part] if part < len(node.items) else None
        elif index == len(location) - 1 and node is not None and node.kind == "map":
            path.append(part)  # a missing key
    return tuple(path)


def _is_echo(detail: Mapping[str, Any]) -> bool:
    """pydantic calls a tuple too short when its items were refused; their own errors say it already."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]


def _explain(detail: dict[str, Any], path: Location, owner: type[BaseModel] | None, root: type[BaseModel], home: str) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_key(str(path[-1]), list(owner.model_fields) if owner else [], root, home)
    if kind == "missing":
        return "is missing" + _wanted(owner, str(path[-1]))
    if kind == "union_tag_not_found" or (kind == "model_attributes_type" and _tags(owner, path)):
        return _untagged(value, "kind" if "probes" in path else "method" if path[0] == "merge" else "type", owner, path)
    if kind == "union_tag_invalid":
        known = re.findall(r"'([^']*)'", context["expected_tags"])
        return f"{context['tag']!r} is not known; {suggestion(context['tag'], known)}"
    if kind == "value_error":
        return str(context["error"])
    if kind in _RANGE:
        return f"must be {_RANGE[kind]} {context[_BOUND[kind]]:g}, not {_shown(value)}"
    return _wrong_type(kind, value, context)


def _untagged(value: Any, key: str, owner: type[BaseModel] | None, path: Location) -> str:
    tags = _tags(owner, path)
    known = f"one of {', '.join(tags)}" if tags else "which one it is"
    if isinstance(value, Mapping):
        guess = next((tag for tag in tags if tag in value), None)
        example = f"; did you mean `{key}: {guess}`?" if guess else ""
        return f"has no `{key}`: {known} was meant{example}"
    return f"{_shown(value)} is {_name(value)}; a mapping with `{key}` ({known}) was meant"


def _wrong_type(kind: str, value: Any, context: Mapping[str, Any]) -> str:
    if kind == "literal_error":
        known = [word or number for word, number in re.findall(r"'([^']*)'|(\d+)", context["expected"])]
        return f"{_shown(value)} is not known; {suggestion(str(value), known)}"
    if kind == "string_pattern_mismatch":
        letters = "small letters" if "A-Z" not in context["pattern"] else "letters"
        return f"{_shown(value)} is no name: {letters}, digits, '.', '_' and '-', at most 64, first a letter or digit, no '/'"
    if kind in ("too_short", "string_too_short"):
        return f"is empty; at least {context['min_length']} was meant"
    if kind == "string_too_long":
        return f"is longer than {context['max_length']} characters"
    if kind == "finite_number":
        return f"{value} is not a finite number"
    wanted = {
        "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
        "bool_type": "true or false", "string_type": "text", "tuple_type": "a list", "dict_type": "a mapping",
        "model_type": "a mapping", "model_attributes_type": "a mapping",
    }.get(kind, "something else")  # fmt: skip
    return f"{_shown(value)} is {_name(value)}; {wanted} was meant{_advice(wanted, value)}"


def _advice(wanted: str, value: Any) -> str:
    if "number" in wanted and isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        bare = value.strip().replace("_", "").replace(",", "")
        return f": write {bare} without quotes, '_' or ','"
    if wanted == "a whole number" and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f": write {int(value)}"
    if wanted == "true or false" and str(value).lower() in ("yes", "on", "1", "true"):
        return ": write true"
    if wanted == "true or false" and str(value).lower() in ("no", "off", "0", "false"):
        return ": write false"
    if wanted == "text" and isinstance(value, (int, float)):
        return ": put it in quotes as it was written"
    if wanted == "a list" and not isinstance(value, Mapping):
        return f": write [{value if value is not None else ''}]"
    if wanted == "a list":
        return ": start each entry with '- '"
    return ""


def _name(value: Any) -> str:
    if value is None:
        return "empty"
    names: dict[type, str] = {bool: "true/false", str: "text", int: "a number", float: "a number", dict: "a mapping"}
    return names.get(type(value), "a list")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing"
    text = repr(value) if isinstance(value, (str, int, float)) else "this"
    return text if len(text) <= 60 else f"{text[:56]}...'"


# unknown keys -------------------------------------------------------------------------------------------------------


def unknown_key(key: str, known: Sequence[str], root: type[BaseModel], home: str) -> str:
    """What `key` probably meant: a typo, another trainer's name, or a key that stands in the wrong place."""
    close = nearest(key, known)
    if key in GLOBS and "glob" in known:
        return f"unknown key {key!r}; the name here is glob, one pattern such as '**/*.py'"
    if key in ABSENT:
        return f"unknown key {key!r}: {ABSENT[key]}"
    if key in SYNONYMS:
        where, path = SYNONYMS[key]
        if path.startswith("lora.") and path.rpartition(".")[2] in known and "type" in known:  # of an adapter of another kind
            path = f"adapter.{path.rpartition('.')[2]}"
        here = path if where == home or (where == EXPERIMENT and path.startswith("body.")) else f"{path} of the {where}"
        note = f" ({CONVERSIONS[key]})" if key in CONVERSIONS else ""
        return f"unknown key {key!r}; the name here is {here}{note}"
    if close and difflib.SequenceMatcher(None, close, key).ratio() > 0.75:
        return f"unknown key {key!r}; did you mean {close!r}? known: {', '.join(known)}"
    elsewhere = _paths_of(root).get(key)
    if elsewhere and home == EXPERIMENT and key in OTHER_FILE[home]:
        return (
            f"unknown key {key!r} here; it belongs to the {BLUEPRINT}, or to {' or '.join(elsewhere[:3])} where variants differ"
        )
    if elsewhere:
        return f"unknown key {key!r} here; it belongs to {' or '.join(elsewhere[:3])}"
    if key in OTHER_FILE[home]:
        return f"unknown key {key!r}; it belongs to the {BLUEPRINT if home == EXPERIMENT else EXPERIMENT}"
    return f"unknown key {key!r}; {suggestion(key, known)}"


OTHER_FILE: dict[str, tuple[str, ...]] = {
    EXPERIMENT: (
        "lora", "optimizer", "schedule", "lanes", "rank", "alpha", "targets", "learning_rate", "sequence_length",
        "rows_per_step", "rows_per_microstep", "use_rslora", "clip", "decay", "warmup_fraction", "weight_decay",
        "plus_ratio", "freeze_a", "dropout", "momentum", "final_fraction", "decay_fraction", "extends",
    ),
    BLUEPRINT: (
        "genome", "population", "evaluate", "merge", "tracking", "rng_seed", "variants", "sources", "search", "scheduler",
        "epigenomes", "reports", "tokens_per_variant", "blueprint",
    ),
}  # fmt: skip


def _paths_of(model: type[BaseModel], prefix: str = "", of: str = "") -> dict[str, list[str]]:
    """Every field name below `model`, and the dotted paths where it stands, with the word that tells one of several kinds."""
    found: dict[str, list[str]] = {}
    for name, info in model.model_fields.items():
        found.setdefault(name, []).append(f"{prefix}{name}{of}")
        models = _models_in(info.annotation)
        for inner in models:
            kind = f" ({_tag_of(inner)})" if len(models) > 1 and _tag_of(inner) else ""
            for key, paths in _paths_of(inner, f"{prefix}{name}.", kind).items():
                found.setdefault(key, []).extend(path for path in paths if path not in found.get(key, []))
    return found


# walking the models -------------------------------------------------------------------------------------------------


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models inside Annotated, Optional, unions, tuples and dicts."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Literal:
        return []
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _tag_of(model: type[BaseModel]) -> str | None:
    for key in ("type", "method", "kind"):
        if key in model.model_fields and get_origin(model.model_fields[key].annotation) is Literal:
            return str(get_args(model.model_fields[key].annotation)[0])
    return None


def _model_at(model: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """The model that owns the keys at `location` (pydantic's location, union tags included)."""
    choices, keyed = [model], False
    for part in location:
        if isinstance(part, int) or keyed:  # a place in a list, or the key of a mapping from names to models
            keyed = False
            continue
        tagged = [choice for choice in choices if len(choices) > 1 and _tag_of(choice) == part]
        if tagged:
            choices = tagged
            continue
        owner = choices[0] if len(choices) == 1 else None
        if owner is None or part not in owner.model_fields:
            return None
        choices = _models_in(owner.model_fields[part].annotation)
        keyed = "dict[" in str(owner.model_fields[part].annotation)
    return choices[0] if len(choices) == 1 else None


def _owner(model: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """The model whose field stands at `location`, list positions at its end left aside."""
    while location and isinstance(location[-1], int):
        location = location[:-1]
    return _model_at(model, location[:-1])


def _tags(owner: type[BaseModel] | None, path: Location) -> list[str]:
    key = next((part for part in reversed(path) if isinstance(part, str)), None)
    if owner is None or key not in owner.model_fields:
        return []
    return [tag for model in _models_in(owner.model_fields[key].annotation) if (tag := _tag_of(model))]


def _wanted(owner: type[BaseModel] | None, key: str) -> str:
    """What belongs under a missing key."""
    if owner is None or key not in owner.model_fields:
        return ""
    info = owner.model_fields[key]
    if info.description:
        return f": {info.description}"
    models = _models_in(info.annotation)
    tags = [tag for model in models if (tag := _tag_of(model))]
    if tags:
        return f": one of {', '.join(tags)}"
    if models:
        return f": a mapping of {', '.join(models[0].model_fields)}"
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    annotation = get_args(info.annotation)[0] if get_origin(info.annotation) in (Annotated, Union) else info.annotation
    return f": {plain[annotation]} was meant" if annotation in plain else ""
