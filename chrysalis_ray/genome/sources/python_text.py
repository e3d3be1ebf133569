"""The text every Python carries, as eight domains: no download, known licence, real structure.

Documents made from one file of the standard library (its code, docstrings, comments, bytecode) share that file's `source_key`,
hence a split. Files are visited in hash order and long ones give a sample of their pieces, so that a cap holds many files.
Generated domains change with the Python version, which therefore belongs to the recipe (`python_identity`).
"""

from __future__ import annotations

import ast
import dis
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import CodeType

from chrysalis_ray.config.experiment import PythonSource
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome.documents import Document, capped, hash_order, make_document, pieces

LICENCE = "PSF-2.0"
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
)
SKIPPED_FILES = frozenset({"antigravity.py", "this.py"})
PIECE_CHARACTERS = 6000
SHORTEST_DOCSTRING = 80
LIVE_DOCS_SECONDS = 120
UNICODE_PAGE = 64
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# a string (kept apart, so that a # inside it is no comment) or a comment
STRING_OR_COMMENT = re.compile(
    r'"""(?:[^\\]|\\.)*?"""|\'\'\'(?:[^\\]|\\.)*?\'\'\'|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'|(#[^\n]*)', re.DOTALL
)

Reader = Callable[[int], Iterator[Document]]


def read_python(source: PythonSource, skipped: Counter[str]) -> Iterator[Document]:
    """Documents of the domains that `source` names, each domain at most `max_megabytes` (10^6 bytes).

    Raises GenomeError when this Python lacks what a domain is made of.
    """
    limit = int(source.max_megabytes * 1_000_000)
    for domain in source.domains:
        # more from each file when there is room for more, so that about a hundred files fill any cap that can be filled
        per_file = max(8_000, limit // 64)
        count = 0
        for document in capped(READERS[domain](per_file), limit, skipped):
            count += 1
            yield document
        if not count:
            raise GenomeError(
                f"this Python ({sys.version.split()[0]}) gives no text for the domain {domain!r} within {limit} bytes",
                "leave the domain out, raise `max_megabytes`, or use a Python that ships its library as source",
            )


def python_identity() -> dict[str, str]:
    """What the generated text depends on, for the recipe hash."""
    return {
        "implementation": platform.python_implementation(),
        "version": platform.python_version(),
        "unicode": unicodedata.unidata_version,
    }


# files of the standard library --------------------------------------------------------------------------------------


def library_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@lru_cache(maxsize=1)
def library_files() -> tuple[str, ...]:
    """Relative posix paths of the library's own Python files, without tests, in hash order."""
    root = library_root()
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith("config-")]
        relative = Path(folder).relative_to(root)
        found += [(relative / name).as_posix() for name in files if name.endswith(".py") and name not in SKIPPED_FILES]
    return tuple(sorted((name for name in found if not name.startswith("_sysconfigdata")), key=hash_order))


def _sources(inside_encodings: bool) -> Iterator[tuple[str, str]]:
    """(relative path, text) of every library file that is UTF-8; the `encodings` folder apart, as it is a domain of its own."""
    for name in library_files():
        if name.startswith("encodings/") == inside_encodings:
            try:
                text = (library_root() / name).read_bytes().decode("utf-8")
            except UnicodeDecodeError:  # a few files declare another coding; they are tests of coding
                continue
            if text.strip():
                yield name, text


def _documents(name: str, texts: list[str], domain: str, per_file: int) -> Iterator[Document]:
    """Documents of one file's `texts`, in hash order, until `per_file` bytes are taken; the first is always taken."""
    order = sorted(range(len(texts)), key=lambda index: hash_order(f"{name}#{index}"))
    taken = 0
    for index in order:
        text = texts[index]
        if not text.strip() or not _encodable(text):
            continue
        taken += len(text)
        if taken > per_file and taken > len(text):
            continue
        yield make_document(text, f"python/{name}#{domain}-{index}", f"python/{name}", domain, LICENCE)


def _encodable(text: str) -> bool:
    """Whether `text` has no lone surrogate (a docstring may hold one by escape)."""
    return text.isascii() or LONE_SURROGATE.search(text) is None


def read_code(per_file: int) -> Iterator[Document]:
    """Source text, in pieces that start at definitions."""
    for name, text in _sources(inside_encodings=False):
        yield from _documents(name, pieces(text, PIECE_CHARACTERS), "code", per_file)


def read_codecs(per_file: int) -> Iterator[Document]:
    """The `encodings` package: tables from bytes to characters."""
    for name, text in _sources(inside_encodings=True):
        yield from _documents(name, pieces(text, PIECE_CHARACTERS), "codecs", per_file)


def read_docstrings(per_file: int) -> Iterator[Document]:
    """Docstrings of modules, classes and functions of at least `SHORTEST_DOCSTRING` characters, one document each."""
    for name, text in _sources(inside_encodings=False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            try:
                tree = ast.parse(text)
            except SyntaxError:  # templates that are no Python
                continue
        found = [docstring + "\n" for docstring in _docstrings(tree) if len(docstring) >= SHORTEST_DOCSTRING]
        yield from _documents(name, found, "docstrings", per_file)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Cleaned docstrings in source order; only bodies of modules and classes are searched, which hold nearly all of them."""
    text = ast.get_docstring(node)
    if text:
        yield text
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def read_comments(per_file: int) -> Iterator[Document]:
    """The comments of a file, in order, runs of comment lines kept together."""
    for name, text in _sources(inside_encodings=False):
        found = comments_of(text)
        if found:
            yield from _documents(name, pieces(found, PIECE_CHARACTERS), "comments", per_file)


def comments_of(text: str) -> str:
    """Comment texts of a source file, one per line, a blank line where code stood between two of them."""
    lines: list[str] = []
    previous_end = 0
    for match in STRING_OR_COMMENT.finditer(text):
        comment = match.group(1)
        if comment is None:
            continue
        if lines and text[previous_end : match.start()].strip():
            lines.append("")
        lines.append(comment.lstrip("#").strip())
        previous_end = match.end()
    return "\n".join(lines).strip() + "\n" if any(lines) else ""


# generated text -----------------------------------------------------------------------------------------------------


def read_bytecode(per_file: int) -> Iterator[Document]:
    """Disassembly of each file's functions, without addresses, so that it is the same in every process."""
    for name, text in _sources(inside_encodings=False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                code = compile(text, name, "exec", dont_inherit=True)
            except (SyntaxError, ValueError):
                continue
        functions = list(_functions(code))
        order = sorted(range(len(functions)), key=lambda index: hash_order(f"{name}#{index}"))
        taken = 0
        for index in order:
            text = disassembly(functions[index])
            if len(text) <= PIECE_CHARACTERS and _encodable(text):
                yield make_document(text, f"python/{name}#bytecode-{index}", f"python/{name}", "bytecode", LICENCE)
                taken += len(text)
            if taken >= per_file:
                break


def _functions(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _functions(constant)


def disassembly(code: CodeType) -> str:
    """One line per instruction: offset, name, argument. Equal for equal code, whatever the hash seed or the address."""
    lines = [f"{code.co_qualname}({', '.join(code.co_varnames[: code.co_argcount])})"]
    for instruction in dis.get_instructions(code):
        argument = instruction.argrepr
        if instruction.opcode in dis.hasconst:
            argument = _constant(instruction.argval)
        mark = ">>" if instruction.is_jump_target else "  "
        lines.append(f"{mark} {instruction.offset:4} {instruction.opname:24} {argument}".rstrip())
    return "\n".join(lines) + "\n"


def _constant(value: object) -> str:
    """repr, but for what differs from process to process: addresses of code and the order of sets."""
    if isinstance(value, CodeType):
        return f"<code {value.co_name}>"
    if isinstance(value, frozenset):
        return "frozenset({" + ", ".join(sorted(_constant(item) for item in value)) + "})"
    if isinstance(value, tuple):
        return "(" + ", ".join(_constant(item) for item in value) + ("," if len(value) == 1 else "") + ")"
    return repr(value)


def read_reference(per_file: int) -> Iterator[Document]:
    """Chapters of the language reference that `help()` shows (`pydoc_data.topics`)."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise GenomeError(
            "this Python lacks `pydoc_data.topics`, the text of the domain 'reference'",
            "install Python's documentation topics or leave the domain out",
        ) from error
    for topic in sorted(topics, key=hash_order):
        yield from _documents(f"topics/{topic}", pieces(topics[topic], PIECE_CHARACTERS), "reference", 10**9)


def read_api_docs(per_file: int) -> Iterator[Document]:
    """Documentation of built-in and compiled modules, one document per function or type; read in a process of its own."""
    entries = {f"modules/{module}.{name}": text for module, name, text in _live_docs()}
    for entry in sorted(entries, key=hash_order):
        yield from _documents(entry, pieces(entries[entry], PIECE_CHARACTERS), "api_docs", 10**9)


def _live_docs() -> Iterator[tuple[str, str, str]]:
    script = Path(__file__).with_name("live_docs.py")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["PYTHONIOENCODING"] = "utf-8"
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = subprocess.run(
                [sys.executable, "-I", "-W", "ignore", str(script)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                cwd=folder,
                env=environment,
                timeout=LIVE_DOCS_SECONDS,
                check=True,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            tail = (error.stderr or b"").decode("utf-8", "replace")[-400:]
            raise GenomeError(
                f"the live documentation of this Python could not be read: {error}\n{tail}",
                "leave `api_docs` out of the genome's domains",
            ) from error
    for line in result.stdout.decode("ascii").splitlines():
        module, name, text = json.loads(line)
        yield module, name, text


def read_unicode(per_file: int) -> Iterator[Document]:
    """Pages of code points with category and name; CJK and Hangul are left out, as their names are numbers."""
    for page in sorted(range(0x110000 // UNICODE_PAGE), key=lambda page: hash_order(f"unicode/{page}")):
        lines = []
        for point in range(page * UNICODE_PAGE, (page + 1) * UNICODE_PAGE):
            name = unicodedata.name(chr(point), "")
            if name and not name.startswith(("CJK ", "HANGUL SYLLABLE")):
                lines.append(f"U+{point:04X} {unicodedata.category(chr(point))} {name.lower()}")
        if len(lines) > 1:
            path = f"python/unicode/U+{page * UNICODE_PAGE:04X}"
            yield make_document("\n".join(lines) + "\n", path, path, "unicode", LICENCE)


READERS: dict[str, Reader] = {
    "code": read_code,
    "docstrings": read_docstrings,
    "comments": read_comments,
    "reference": read_reference,
    "api_docs": read_api_docs,
    "unicode": read_unicode,
    "codecs": read_codecs,
    "bytecode": read_bytecode,
}
