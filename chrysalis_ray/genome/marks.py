"""Marks: what is noticed about a document. A mark never deletes and never quotes: a secret is named by its kind, not shown.

`genome.exclude` says which marks keep a document from training and judging; it stays in the genome all the same. Marks of one
document are a pure function of it. `near_duplicate` needs the others too and is set in `splits`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator

from pydantic_core import SchemaValidator, core_schema

from chrysalis_ray.genome.documents import Document

VERSION = 1  # of the rules below: a genome built by others has its documents marked again
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\n"
HEAD_CHARACTERS = 2000

# kind -> (what must be there first, pattern). All of the first are looked for at once (`_searcher`); few texts are left for the
# second. A pattern begins with a literal, which `re` finds ten times as
# fast as an assertion; what must not stand before it is asked after it. What the group captures is the random part: a
# placeholder such as AKIAXXXXXXXXXXXXXXXX has too few different characters to be one.
SECRETS: dict[str, tuple[str, re.Pattern[str]]] = {
    "private key": ("PRIVATE KEY", re.compile(
        r"-----BEGIN (?:[A-Z]{2,9} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
        r"\s{1,9}(?:[\w-]+: [^\n]*\n\s{0,9}){0,6}([A-Za-z0-9+/=]{40,})")),
    "AWS key": ("AKIA[A-Z2-7]{16}", re.compile(r"AKIA(?<![A-Za-z0-9]AKIA)([A-Z2-7]{16})(?![A-Za-z0-9])")),
    "GitHub token": ("gh[pousr]_[A-Za-z0-9]{20}", re.compile(
        r"gh(?<![A-Za-z0-9]gh)[pousr]_([A-Za-z0-9]{36,251})(?![A-Za-z0-9])")),
    "GitHub fine-grained token": ("github_pat_[A-Za-z0-9_]{20}", re.compile(r"github_pat_([A-Za-z0-9_]{60,})")),
    "GitLab token": ("glpat-[A-Za-z0-9_-]{20}", re.compile(r"glpat-([A-Za-z0-9_-]{20,})")),
    "Hugging Face token": ("hf_[A-Za-z0-9]{20}", re.compile(r"hf_(?<![A-Za-z0-9]hf_)([A-Za-z0-9]{34,})(?![A-Za-z0-9])")),
    "OpenAI key": ("sk-[A-Za-z0-9_-]{20}", re.compile(
        r"sk-(?<![A-Za-z0-9]sk-)(?:proj-|svcacct-)?(?=[\w-]{0,99}\d)(?=[\w-]{0,99}[A-Z])([A-Za-z0-9_-]{40,})")),
    "Anthropic key": ("sk-ant-", re.compile(r"sk-ant-[a-z0-9]+-([A-Za-z0-9_-]{40,})")),
    "Google key": ("AIza[A-Za-z0-9_-]{20}", re.compile(r"AIza(?<![A-Za-z0-9]AIza)([A-Za-z0-9_-]{35})(?![A-Za-z0-9_-])")),
    "Slack token": ("xox[abeoprs]-[A-Za-z0-9-]{20}", re.compile(r"xox(?<![A-Za-z0-9]xox)[abeoprs]-([A-Za-z0-9-]{20,})")),
    "Stripe key": ("k_live_[A-Za-z0-9]{20}", re.compile(
        r"k_live_(?<=[rs]k_live_)(?<![A-Za-z0-9].k_live_)([A-Za-z0-9]{20,})")),
    "PyPI token": ("pypi-AgE[A-Za-z0-9_-]{20}", re.compile(r"pypi-AgE([A-Za-z0-9_-]{50,})")),
    "npm token": ("npm_[A-Za-z0-9]{20}", re.compile(r"npm_(?<![A-Za-z0-9]npm_)([A-Za-z0-9]{36})(?![A-Za-z0-9])")),
    "SendGrid key": (r"SG\.[A-Za-z0-9_-]{20}", re.compile(r"SG\.(?<![A-Za-z0-9]SG\.)([A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43})")),
    "JSON web token": ("eyJ[A-Za-z0-9_-]{10}", re.compile(
        r"eyJ(?<![A-Za-z0-9]eyJ)[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.([A-Za-z0-9_-]{20,})")),
}  # fmt: skip
SUSPICIOUS = "|".join(first for first, _ in SECRETS.values())
BITS_PER_CHARACTER = 3.0
PLACEHOLDER = re.compile(r"example|placeholder|redacted|your|x{6}|0{6}|1234567", re.IGNORECASE)

LOCAL_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_%-]{0,63}$")
MAIL_DOMAIN = re.compile(r"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24})(?![A-Za-z0-9-])")
NOBODY = re.compile(
    r"(^|\.)(example\.(com|org|net|edu)|example|test|invalid|localhost|local)$|^users\.noreply\.", re.IGNORECASE
)

GENERATED = re.compile(
    r"@generated\b|(?:auto[- ]?generated|generated (?:by|from|with|code|file)|code generated)", re.IGNORECASE
)
HANDS_OFF = re.compile(r"do not (?:edit|modify|change)|don't edit|will be overwritten|@generated\b", re.IGNORECASE)
LOCK_FILES = frozenset(
    {"package-lock.json", "npm-shrinkwrap.json", "yarn.lock", "pnpm-lock.yaml", "poetry.lock", "Pipfile.lock", "uv.lock",
     "Cargo.lock", "go.sum", "composer.lock", "Gemfile.lock"}
)  # fmt: skip

MINIFIED_SUFFIXES = (".js", ".mjs", ".cjs", ".css", ".html", ".svg", ".json", ".xml", ".map")
MINIFIED_FROM = 2000
MINIFIED_LINE = 500


def _searcher(pattern: str) -> Callable[[str], bool]:
    """A test whether `pattern` may be anywhere in a text: no only where it is not. By pydantic's engine, Rust's `regex`: linear
    in time, without look-around, and quick where every match begins with one of some literals (four times as quick as RE2). It
    reads UTF-8, so that of what cannot be written in it (a lone surrogate) nothing is said."""
    find, readable = (
        SchemaValidator(core_schema.str_schema(pattern=wanted, regex_engine="rust-regex", strict=True)).isinstance_python
        for wanted in (pattern, "")
    )
    return lambda text: find(text) or not (text.isascii() or readable(text))


suspicious = _searcher("|".join(first for first, _ in SECRETS.values()))
addressed = _searcher("[A-Za-z0-9]@[A-Za-z0-9]")
announced = _searcher("(?i)generated")  # in all that `GENERATED` finds


def marks_of(document: Document) -> dict[str, str]:
    """mark -> a few words of evidence, for every mark but ``near_duplicate``."""
    text, name = document.text, document.path.rpartition("/")[2]
    found: dict[str, str] = {}
    if document.encoding == "latin-1":
        found["not_utf8"] = "kept byte for byte as latin-1"
    if text.startswith(LFS_POINTER) and len(text) < 1024:
        found["lfs_pointer"] = "stands for a file that is kept elsewhere"
    if suspicious(text) and (kinds := sorted(set(secrets_in(text)))):
        found["secret"] = ", ".join(kinds)
    if addressed(text) and (addresses := len(set(addresses_in(text)))):
        found["pii"] = f"{addresses} e-mail address{'es' if addresses > 1 else ''}"
    if name in LOCK_FILES or name.endswith(("_pb2.py", "_pb2_grpc.py", "_pb2.pyi")):
        found["generated"] = f"by its name, {name}"
    else:
        head = text[:HEAD_CHARACTERS]
        if announced(head) and (match := GENERATED.search(head)) and HANDS_OFF.search(head):
            found["generated"] = f"its head says {match[0].lower()!r}"
    if name.endswith(MINIFIED_SUFFIXES) and len(text) >= MINIFIED_FROM:
        lines = text.count("\n") + 1
        if len(text) / lines > MINIFIED_LINE:
            found["minified"] = f"{len(text) // lines} characters a line"
    return found


def secrets_in(text: str) -> Iterator[str]:
    """Kinds of the secrets in `text`."""
    for kind, (_, pattern) in SECRETS.items():
        if any(looks_random(match[1]) for match in pattern.finditer(text)):
            yield kind


def looks_random(word: str) -> bool:
    """Whether `word` has the entropy of something drawn, and is no placeholder."""
    counts = Counter(word)
    entropy = -sum(count / len(word) * math.log2(count / len(word)) for count in counts.values())
    return entropy >= BITS_PER_CHARACTER and not PLACEHOLDER.search(word)


def addresses_in(text: str) -> Iterator[str]:
    """E-mail addresses of people in `text`, lower case; not those that are documentation's own (``example.com``)."""
    at = text.find("@")
    while at >= 0:
        domain = MAIL_DOMAIN.match(text, at) if text[at - 1 : at].isalnum() else None
        local = LOCAL_PART.search(text[max(0, at - 64) : at]) if domain else None
        if domain and local and not NOBODY.search(domain[1]):
            yield f"{local[0]}@{domain[1]}".lower()
        at = text.find("@", at + 1)
