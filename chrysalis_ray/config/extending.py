"""`extends:` of a blueprint: it starts from another blueprint and says only what differs.

The other file is named as an experiment names a blueprint: the bare name of a shipped one, or a path, here relative to the
file that extends. Mappings are joined key by key, everything else is replaced. A file that another one extends may be a part
(`blueprints/shared/`): only what comes out must be whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from chrysalis_ray.config.problems import nearest, problem_at
from chrysalis_ray.config.yaml_tree import Node, YamlRefused, read_tree

KEY = "extends"
LONGEST_CHAIN = 16
_PATHS = (("base", "model"), ("base", "chat_template"))  # what a blueprint says relative to its own folder


def read_extending(path: Path, name: str, shipped: Mapping[str, Path], problems: list[str]) -> tuple[str, Node]:
    """The exact text of the blueprint at `path`, called `name` in messages, and its tree with all that it extends below it.

    What is wrong with the files it extends is added to `problems`. Raises YamlRefused if `path` itself holds no tree.
    """
    return _read(path, name, shipped, problems, ())


def _read(path: Path, name: str, shipped: Mapping[str, Path], problems: list[str], below: tuple[Path, ...]) -> tuple[str, Node]:
    text, tree = read_tree(path, name)
    problems += tree.problems
    root = tree.root
    if KEY not in root.entries:
        return text, root
    own = replace(root, entries={key: entry for key, entry in root.entries.items() if key != KEY})
    chain = (*below, path.resolve())
    parent = _parent(path, root, shipped, chain, problems)
    if parent is None:
        return text, own
    try:
        _, inherited = _read(parent, _beside(name, path, parent), shipped, problems, chain)
    except YamlRefused as refused:
        problems.append(problem_at(root, (KEY,), f"{refused.where}: {refused.what}"))
        return text, own
    return text, joined(_seen_from(inherited, parent.parent, path.parent), own)


def _parent(path: Path, root: Node, shipped: Mapping[str, Path], chain: tuple[Path, ...], problems: list[str]) -> Path | None:
    """The file that `root` extends; None, and a problem, where there is none or where it leads back."""
    written = root.entries[KEY][1].value
    if not isinstance(written, str) or not written:
        problems.append(problem_at(root, (KEY,), "is no name; a shipped blueprint or a path was meant"))
        return None
    parent = shipped.get(written, path.parent / written)
    try:
        found = parent.is_file()
    except (OSError, ValueError):
        found = False
    if not found:
        close = nearest(Path(written).stem, shipped)
        guess = f"; did you mean {close!r}?" if close else ""
        problems.append(problem_at(root, (KEY,), f"no blueprint {written!r}: not a shipped one, and no file {parent}{guess}"))
        return None
    if parent.resolve() in chain:
        way = " extends ".join(step.name for step in (*chain[chain.index(parent.resolve()) :], parent))
        problems.append(problem_at(root, (KEY,), f"leads back to itself ({way}); one of them must say all by itself"))
        return None
    if len(chain) >= LONGEST_CHAIN:
        problems.append(problem_at(root, (KEY,), f"is the {len(chain)}th in a row; at most {LONGEST_CHAIN - 1} were meant"))
        return None
    return parent


def joined(under: Node, over: Node) -> Node:
    """`over` on top of `under`: mappings key by key, where both are mappings of one `type`; else `over`."""
    if under.kind != "map" or over.kind != "map" or _type(over) not in (None, _type(under)):
        return over
    entries = dict(under.entries)
    for key, (where, child) in over.entries.items():
        entries[key] = (where, joined(entries[key][1], child) if key in entries else child)
    return replace(over, entries=entries)


def _type(node: Node) -> object:
    return node.entries["type"][1].value if "type" in node.entries else None


def _seen_from(root: Node, written_in: Path, folder: Path) -> Node:
    """`root` with the relative paths that a file in `written_in` says as they are seen from `folder`."""
    if written_in.resolve() == folder.resolve():
        return root
    for section, key in _PATHS:
        if section not in root.entries or key not in root.entries[section][1].entries:
            continue
        where, inner = root.entries[section]
        spot, node = inner.entries[key]
        if isinstance(node.value, str) and (
            key == "chat_template" or node.value.startswith("./") or node.value.startswith("..")
        ):
            moved = node.value if node.value.startswith(("/", "~")) else os.path.relpath(written_in / node.value, folder)
            moved = moved if moved.startswith((".", "/", "~")) else f"./{moved}"
            inner = replace(inner, entries={**inner.entries, key: (spot, replace(node, value=moved))})
            root = replace(root, entries={**root.entries, section: (where, inner)})
    return root


def _beside(name: str, path: Path, parent: Path) -> str:
    """What to call `parent` in messages, given what `path` is called: relative to the same folder, if it can be."""
    if Path(name) == path:
        return str(parent)
    return os.path.normpath(os.path.join(os.path.dirname(name), os.path.relpath(parent, path.parent)))
