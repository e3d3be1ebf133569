"""``--set a.b=c``: one value of a file replaced on the command line.

The value is YAML (``3``, ``1e-4``, ``[4, 8]``, ``{type: fifo}``). Lists are reached by number
(``genome.sources.0.path``). A value set this way is located at ``--set`` in messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from chrysalis_ray.config.yaml_tree import MAX_DEPTH, Node, YamlRefused, parse_tree

SET = "--set"


def apply_overrides(root: Node, overrides: Sequence[str]) -> tuple[Node, list[str]]:
    """A tree with every override applied in turn, and the problems of those that could not be."""
    problems: list[str] = []
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys) or len(keys) > MAX_DEPTH:
            problems.append(f"{SET}: {override}: not `dotted.path=value`; for example --set population.variants=4")
            continue
        try:
            tree = parse_tree(text, SET, by_line=False)
            problems += tree.problems
            root = _replaced(root, keys, tree.root, path.strip())
        except YamlRefused as refused:
            problems.append(f"{SET}: {path.strip()}: {refused.what}")
    return root, problems


def _replaced(node: Node, keys: Sequence[str], value: Node, path: str) -> Node:
    """A copy of `node` in which `keys` lead to `value`; what an alias shares elsewhere stays untouched. Raises YamlRefused."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if node.kind == "map":
        where, child = node.entries.get(key, (SET, Node("map", SET)))
        entries = {**node.entries, key: (where if rest else SET, _replaced(child, rest, value, path))}
        return replace(node, entries=entries)
    if node.kind == "list":
        if not key.isdecimal() or int(key) >= len(node.items):
            raise YamlRefused(SET, f"{key!r} is no position of a list of {len(node.items)}; they count from 0")
        items = list(node.items)
        items[int(key)] = _replaced(items[int(key)], rest, value, path)
        return replace(node, items=items)
    if node.value is None:
        return _replaced(Node("map", SET), keys, value, path)
    raise YamlRefused(SET, f"there is no {key!r} below {node.value!r}, which is a single value ({node.where})")
