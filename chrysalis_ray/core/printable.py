"""Names that others gave, as they may be shown: nothing hidden in them, nothing that a terminal or a page obeys.

A file may be called anything. Printed as it is, an ESC moves the cursor or renames the window, a line break forges a line of
ours, a right-to-left override turns ``cod.exe`` into ``exe.doc``. Joiners stay where the script asks for them (`joiners.py`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from chrysalis_ray.core.joiners import is_joiner_in_use

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # Unicode's categories of characters that show nothing by themselves
_PERHAPS = re.compile(r"[^\n -~]")


def printable(name: str) -> str:
    """`name` on one line, every character in it that shows nothing written out: ``\\x1b``, ``\\n``, ``\\u202e``. A byte of a
    file name that is no UTF-8, as `os.fsdecode` gives it, becomes ``\\xNN``."""
    return printable_lines(name).replace("\n", "\\n")


def printable_lines(text: str) -> str:
    """`printable` of every line of `text`."""
    return _PERHAPS.sub(lambda found: _written(found[0]) if _is_hidden(found) else found[0], text)


def markdown_line(text: str) -> str:
    """`text` as one cell or line of Markdown: no line break, no HTML, no code, nothing hidden."""
    plain = printable(re.sub(r"\s+", " ", text)).replace("|", "\\|")
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("`", "'")


def printable_json(value: Any, **how: Any) -> str:
    """JSON of `value` in which the same characters are written as JSON writes them: it means what it meant."""
    text = json.dumps(value, ensure_ascii=False, **how)
    return _PERHAPS.sub(lambda found: _in_json(found[0]) if _is_hidden(found) else found[0], text)


def _is_hidden(found: re.Match[str]) -> bool:
    return unicodedata.category(found[0]) in _HIDDEN and not is_joiner_in_use(found.string, found.start())


def _written(character: str) -> str:
    number = ord(character)
    if character == "\t":
        return "\\t"
    if 0xDC80 <= number <= 0xDCFF:
        return f"\\x{number - 0xDC00:02x}"
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _in_json(character: str) -> str:
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else json.dumps(character)[1:-1]
