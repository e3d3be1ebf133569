"""Print the documentation of built-in and compiled standard modules, one JSON line per object: [module, name, text].

Run as a script in a process of its own (``python -I live_docs.py``), because it imports every such module. Modules written in
Python are left out: their documentation is the `docstrings` domain already. Needs the standard library only.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from types import ModuleType

BOUND_ARGUMENT = re.compile(r"\(\$\w+(?:, /)?(?:, )?")  # of ``($self, /, key)`` only ``(key)`` is for the reader


def compiled_modules() -> list[str]:
    """Names of the built-in and extension modules of the standard library that carry documentation worth reading."""
    found = []
    for name in sorted(sys.stdlib_module_names):
        if name.startswith(("_test", "_xx", "xx", "__")):
            continue
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            continue
        origin = (spec.origin or "") if spec else ""
        if origin == "built-in" or origin.endswith(tuple(EXTENSION_SUFFIXES)):
            found.append(name)
    return found


def headed(name: str, thing: object) -> str | None:
    """``name(signature)`` over the documentation of `thing`, or None where it has none of its own."""
    text = getattr(thing, "__doc__", None)
    if not isinstance(text, str) or not text.strip():
        return None
    signature = getattr(thing, "__text_signature__", None) or ""
    shown = BOUND_ARGUMENT.sub("(", signature) if isinstance(signature, str) else ""
    return f"{name}{shown}\n\n{inspect.cleandoc(text)}\n"


def entries(module: ModuleType) -> list[tuple[str, str]]:
    """(name, text) of a module's own functions and types; a type's text goes on with its public members."""
    found = []
    for name in sorted(vars(module)):
        thing = vars(module)[name]
        if name.startswith("__") or not (inspect.isbuiltin(thing) or isinstance(thing, type)):
            continue
        parts = [headed(f"{module.__name__}.{name}", thing)]
        if isinstance(thing, type):
            members = sorted(member for member in vars(thing) if not member.startswith("_"))
            parts += [headed(f"{name}.{member}", vars(thing)[member]) for member in members]
        text = "\n".join(part for part in parts if part)
        if text:
            found.append((name, text))
    return found


def main() -> None:
    for name in compiled_modules():
        try:
            module = importlib.import_module(name)
        except ImportError:  # built, but a library it needs is absent on this machine
            continue
        for entry, text in entries(module):
            print(json.dumps([name, entry, text]))


if __name__ == "__main__":
    main()
