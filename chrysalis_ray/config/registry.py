"""`{type: registry, path: sources.yaml}` among the sources of a genome: all that a file of its own lists, which several
experiments may share.

    sources:
      - {type: git, url: "https://github.com/owner/project", commit: v1.2, domain: code}
      - {type: folder, path: notes, domain: notes}

YAML or JSON. What it names stands in the experiment from then on, source by source: the recipe of a genome is of what is read,
not of where that was written. Paths in it are seen from its own folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from chrysalis_ray.config.genome import is_remote
from chrysalis_ray.config.problems import problem_at, suggestion
from chrysalis_ray.config.yaml_tree import Node, YamlRefused, read_tree
from chrysalis_ray.core.written_paths import written_path

TYPE = "registry"
_KEYS = ("type", "path")
_AT = ("genome", "sources")
_PATHS = ("folder", "jsonl", "archive", "records")  # whose `path` is always one of this machine
_URLS = ("git", "history")


def with_registries(root: Node, path: Path, problems: list[str]) -> Node:
    """The tree of the experiment at `path` with the sources of every registry in its place. What is wrong with one is added to
    `problems`, with the line in its own file."""
    sources = _sources_of(root, *_AT)
    if sources is None or not any(_kind(item) == TYPE for item in sources.items):
        return root
    items: list[Node] = []
    for place, item in enumerate(sources.items):
        items += _listed(root, place, item, path, problems) if _kind(item) == TYPE else [item]
    if not items:  # then it has been said why: that there is no source is no problem of its own
        items = [Node("map", sources.where, entries={"type": (sources.where, Node("scalar", sources.where, "python"))})]
    where, genome = root.entries["genome"]
    spot, _ = genome.entries["sources"]
    genome = replace(genome, entries={**genome.entries, "sources": (spot, replace(sources, items=items))})
    return replace(root, entries={**root.entries, "genome": (where, genome)})


def with_registry_allowed(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an experiment in which a source may also be a registry."""
    sources = schema["$defs"]["GenomeSpec"]["properties"]["sources"]
    properties = {"type": {"const": TYPE}, "path": {"type": "string", "description": "a YAML or JSON file of sources"}}
    registry = {"type": "object", "properties": properties, "required": list(_KEYS), "additionalProperties": False}
    sources["items"] = {"anyOf": [sources["items"], registry]}
    return schema


def _listed(root: Node, place: int, item: Node, path: Path, problems: list[str]) -> Iterator[Node]:
    """The sources that a registry lists, as they are seen from the experiment's folder."""
    at = (*_AT, place)
    for key in item.entries:
        if key not in _KEYS:
            problems.append(problem_at(root, (*at, key), f"unknown key {key!r}; {suggestion(key, _KEYS)}"))
    written = item.entries["path"][1].value if "path" in item.entries else None
    if not isinstance(written, str) or not written:
        problems.append(problem_at(root, (*at, "path"), "is missing: a registry is a file; write its path"))
        return
    file = path.parent / written_path(written)
    try:
        _, tree = read_tree(file, str(file))
    except YamlRefused as refused:
        problems.append(problem_at(root, (*at, "path"), f"{refused.where}: {refused.what}"))
        return
    problems += tree.problems
    for key in tree.root.entries:
        if key != "sources":
            problems.append(problem_at(tree.root, (key,), f"unknown key {key!r}; a registry has `sources` and nothing else"))
    sources = _sources_of(tree.root, "sources")
    if sources is None or not sources.items:
        problems.append(problem_at(tree.root, ("sources",), "is no list of sources; start each entry with '- '"))
        return
    for number, source in enumerate(sources.items):
        if _kind(source) == TYPE:
            what = "is a registry itself; name its file in the experiment, beside this one"
            problems.append(problem_at(tree.root, ("sources", number), what))
        else:
            yield _seen_from(source, file.parent, path.parent)


def _seen_from(source: Node, written_in: Path, folder: Path) -> Node:
    """`source` with its relative path, as a file in `written_in` says it, seen from `folder`. Links to either folder are
    followed first: `..` leads out of where a folder is, not out of where it is linked from."""
    key = "url" if _kind(source) in _URLS else "path"
    written_in, folder = written_in.resolve(), folder.resolve()
    if key not in source.entries or written_in == folder:
        return source
    where, node = source.entries[key]
    if not isinstance(node.value, str) or not node.value or not _is_relative(node.value, _kind(source), written_in):
        return source
    moved = PurePath(os.path.relpath(written_in / node.value, folder)).as_posix()
    moved = moved if key == "path" or moved.startswith(".") else f"./{moved}"
    return replace(source, entries={**source.entries, key: (where, replace(node, value=moved))})


def _is_relative(written: str, kind: object, written_in: Path) -> bool:
    """Whether `written` is a path of this machine that starts at the file which says it."""
    if written.startswith(("/", "~")):
        return False
    if kind in _URLS:
        return not is_remote(written)
    return kind in _PATHS or written.startswith(".") or (kind == "dataset" and os.path.exists(written_in / written))


def _sources_of(node: Node, *path: str) -> Node | None:
    """The list at `path`, None where there is none."""
    for key in path:
        if node.kind != "map" or key not in node.entries:
            return None
        node = node.entries[key][1]
    return node if node.kind == "list" else None


def _kind(source: Node) -> object:
    return source.entries["type"][1].value if source.kind == "map" and "type" in source.entries else None
