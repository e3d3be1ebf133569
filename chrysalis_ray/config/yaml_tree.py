"""YAML text to a tree that remembers the line of every key.

Strict YAML 1.2 (core schema) instead of PyYAML's 1.1: ``1e-4`` is a number, ``no`` and ``on`` are words, ``010`` is ten.
Trees are built from PyYAML's *events* with a stack of our own, never by its recursive composer, so that no input can
exhaust the interpreter's stack; and an alias is one node that stands in two places, counted at its full size before
anything is expanded, so that no input can exhaust memory (a "YAML bomb" is refused when it is read).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

MAX_BYTES = 64 * 1024
MAX_NODES = 5_000  # with every alias counted as what it stands for
MAX_DEPTH = 32
MAX_DIGITS = 64

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE, _FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


class YamlRefused(Exception):
    """The text is no tree at all; `where` is ``file:line``. Caught by `loading`, which reports it as a ConfigError."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.where = where
        self.what = what


@dataclass
class Node:
    """A mapping, a list or a scalar, and where it was written (``file:line`` or ``--set``).

    `entries` holds (where the key stands, node) by key; `size` counts the nodes below with aliases expanded; `height` the
    levels below.
    """

    kind: Literal["map", "list", "scalar"]
    where: str
    value: Any = None
    entries: dict[str, tuple[str, Node]] = field(default_factory=dict)
    items: list[Node] = field(default_factory=list)
    size: int = 1
    height: int = 1
    closed: bool = True

    def children(self) -> list[Node]:
        return self.items if self.kind == "list" else [child for _, child in self.entries.values()]

    def data(self) -> Any:
        """Plain Python: dict, tuple (lists become tuples, which strict pydantic wants), str, int, float, bool, None."""
        if self.kind == "map":
            return {key: child.data() for key, (_, child) in self.entries.items()}
        if self.kind == "list":
            return tuple(child.data() for child in self.items)
        return self.value


@dataclass(frozen=True)
class Tree:
    """A root and the problems that did not hinder reading (twin keys, keys that are not text)."""

    root: Node
    problems: tuple[str, ...] = ()


def read_tree(path: Path, name: str) -> tuple[str, Tree]:
    """Text and tree of the YAML file at `path`, called `name` in messages. Raises YamlRefused."""
    try:
        if not path.exists():
            raise YamlRefused(name, "no such file")
        if not path.is_file():
            raise YamlRefused(name, "not a file; a YAML file was meant")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise YamlRefused(f"{name}:1", f"{size} bytes are too many for a file that a person writes (at most {MAX_BYTES})")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise YamlRefused(name, f"cannot be read ({error})") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise YamlRefused(
            f"{name}:{line}", f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error
    tree = parse_tree(text.removeprefix("\ufeff"), name)
    if tree.root.kind != "map":
        what = "empty" if tree.root.value is None and tree.root.kind == "scalar" else f"a {tree.root.kind}"
        raise YamlRefused(tree.root.where, f"the file is {what}; a mapping `key: value` was meant at the top")
    return text, tree


def parse_tree(text: str, name: str, by_line: bool = True) -> Tree:
    """Tree of `text`. Nodes are located at ``name:line``, or at plain `name` for text without lines (``--set``).

    Raises YamlRefused on syntax errors, tags, merge keys, several documents, cycles, and trees beyond the limits.
    """
    builder = _Builder(name, by_line)
    try:
        for event in _events(text):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        wordy = "could not find expected ':'" in (error.problem or "")  # the line itself, not the next one
        mark = error.context_mark if wordy else error.problem_mark or error.context_mark
        raise YamlRefused(builder.locate(mark), _syntax(error)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise YamlRefused(f"{name}:{line}" if by_line else name, f"character U+{code:04X} is not allowed in YAML") from error
    except (ValueError, OverflowError) as error:  # PyYAML's chr() of "\UFFFFFFFF", int() of an endless %YAML version
        raise YamlRefused(f"{name}:1" if by_line else name, f"an escape or a number is beyond all limits ({error})") from error
    root = builder.root or Node("scalar", f"{name}:1" if by_line else name)
    return Tree(root, tuple(builder.problems))


def _events(text: str) -> Iterator[yaml.Event]:
    loader = yaml.SafeLoader(text)
    try:
        while loader.check_event():
            yield loader.get_event()
    finally:
        loader.dispose()


def _syntax(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "not YAML"
    if "'\\t'" in problem:
        return "a tab; YAML indents with spaces"
    if "mapping values are not allowed here" in problem:
        return "a second ': ' in one line, or a line indented too far; quote the text or fix the indent"
    if "could not find expected ':'" in problem:
        return "a line without ': '; `key: value` was meant"
    context = f" ({error.context})" if error.context else ""
    return f"not YAML: {problem}{context}"


@dataclass
class _Open:
    """A collection under construction; `key` is the mapping key that waits for its value."""

    node: Node
    key: str | None = None
    key_where: str = ""
    expects_key: bool = True
    nameless: int = 0


class _Builder:
    def __init__(self, name: str, by_line: bool) -> None:
        self.name = name
        self.by_line = by_line
        self.root: Node | None = None
        self.stack: list[_Open] = []
        self.anchors: dict[str, Node] = {}
        self.problems: list[str] = []
        self.documents = 0
        self.nodes = 0

    def locate(self, mark: Any) -> str:
        if not self.by_line:
            return self.name
        return f"{self.name}:{mark.line + 1 if mark else 1}"

    def take(self, event: yaml.Event) -> None:
        where = self.locate(event.start_mark)
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise YamlRefused(where, "a second document after `---`; one file holds one document")
        elif isinstance(event, yaml.AliasEvent):
            self._place(self._aliased(event.anchor or "", where), where)
        elif isinstance(event, yaml.ScalarEvent):
            self._refuse_tag(event, where)
            node = Node("scalar", where, _scalar(event, where))
            self._remember(event, node, where)
            self._place(node, where)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            self._open(event, where)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            self._close()

    def _open(self, event: yaml.NodeEvent, where: str) -> None:
        self._refuse_tag(event, where)
        if len(self.stack) >= MAX_DEPTH:
            raise YamlRefused(where, f"nested deeper than {MAX_DEPTH} levels")
        if self.stack and self.stack[-1].node.kind == "map" and self.stack[-1].expects_key:
            raise YamlRefused(where, "a list or mapping as a key; a key is a word")
        node = Node("map" if isinstance(event, yaml.MappingStartEvent) else "list", where, closed=False)
        self._remember(event, node, where)
        self.stack.append(_Open(node))

    def _close(self) -> None:
        node = self.stack.pop().node
        children = node.children()
        node.size = 1 + sum(child.size for child in children)
        node.height = 1 + max((child.height for child in children), default=0)
        node.closed = True
        self._within_limits(node)
        self._place(node, node.where)

    def _within_limits(self, node: Node) -> None:
        if node.size > MAX_NODES:
            raise YamlRefused(node.where, f"expands to {node.size} nodes (at most {MAX_NODES}); write less, or without aliases")
        if node.height > MAX_DEPTH:
            raise YamlRefused(node.where, f"nested deeper than {MAX_DEPTH} levels once its aliases are expanded")

    def _remember(self, event: yaml.NodeEvent, node: Node, where: str) -> None:
        if event.anchor is not None:
            if event.anchor in self.anchors:
                raise YamlRefused(where, f"anchor '&{event.anchor}' is given twice")
            self.anchors[event.anchor] = node

    def _aliased(self, anchor: str, where: str) -> Node:
        node = self.anchors.get(anchor)
        if node is None:
            known = ", ".join(f"&{name}" for name in self.anchors) or "none"
            raise YamlRefused(where, f"alias '*{anchor}' has no anchor before it (anchors so far: {known})")
        if not node.closed:
            raise YamlRefused(where, f"alias '*{anchor}' stands inside its own anchor: the reference is a cycle")
        return node

    def _refuse_tag(self, event: Any, where: str) -> None:
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise YamlRefused(where, f"tag '{tag}' is not allowed; write plain text, numbers, lists and mappings")

    def _place(self, node: Node, where: str) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise YamlRefused(where, f"more than {MAX_NODES} nodes are too many for a file that a person writes")
        if not self.stack:
            self.root = node
            return
        top = self.stack[-1]
        if top.node.kind == "list":
            top.node.items.append(node)
        elif top.expects_key:
            self._take_key(top, node, where)
            top.expects_key = False
        else:
            if top.key is not None:
                top.node.entries[top.key] = (top.key_where, node)
            top.expects_key = True

    def _take_key(self, top: _Open, node: Node, where: str) -> None:
        top.key, top.key_where = None, where
        if node.kind != "scalar":
            raise YamlRefused(where, "a list or mapping as a key; a key is a word")
        if node.value == "<<":
            raise YamlRefused(where, "merge key '<<' is not part of YAML 1.2; write the keys out")
        if not isinstance(node.value, str):
            shown = "nothing" if node.value is None else repr(node.value)
            self.problems.append(f"{where}: {shown}: a key must be text; put it in quotes")
        elif node.value in top.node.entries:
            first = top.node.entries[node.value][0]
            self.problems.append(f"{where}: {node.value}: the key is given twice, first at {first}; keep one of them")
        else:
            top.key = node.value


def _scalar(event: yaml.ScalarEvent, where: str) -> Any:
    text: str = event.value
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise YamlRefused(where, "half of a surrogate pair is not a character; write the character itself")
    if not event.implicit[0]:  # quoted or a block: always text
        return text
    if _NULL.fullmatch(text):
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if text.lower() in _SPECIAL:
        return float(_SPECIAL[text.lower()])
    if not (_INT.fullmatch(text) or _FLOAT.fullmatch(text)):
        return text
    if len(text) > MAX_DIGITS:
        raise YamlRefused(where, f"a number of {len(text)} characters; if it is text, put it in quotes")
    if not _INT.fullmatch(text):
        return float(text)
    number = int(text, 10) if text.lstrip("+-").isdigit() else int(text, 0)
    if abs(number) >= 2**63:
        raise YamlRefused(where, f"{text} is beyond 64 bits; if it is text, put it in quotes")
    return number
