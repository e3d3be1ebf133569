"""Secrets out of everything that is written down: journal, cards, logs, W&B.

Three nets, because each alone has holes: the *name* of a key, the *shape* of a well-known token, and the *value* of any
environment variable of this process whose name says that it is secret.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"

# `tokens` and `tokenizer` are everyday words here, so `token` must end the name.
_SECRET_NAME = re.compile(
    r"(?:^|[_.\-])(?:token|secret|password|passwd|passphrase|authorization|credentials?|(?:api|access|private|secret|auth)_?-?key"
    r"|secret_?-?access_?-?key)$",
    re.IGNORECASE,
)
_SECRET_SHAPES = (
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"),
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,}"),
    re.compile(r"\bgithub_pat_[A-Za-z0-9_]{20,}"),
    re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    re.compile(r"\bwandb_v\d+_[A-Za-z0-9_]{20,}"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"(?<=Bearer )[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
)
_SHORTEST_ENVIRONMENT_SECRET = 8


def is_secret_name(name: str) -> bool:
    """Whether a key or environment variable of that name holds a secret."""
    return bool(_SECRET_NAME.search(name))


def redact_text(text: str) -> str:
    """`text` with every secret in it replaced by ``[redacted]``."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_ENVIRONMENT_SECRET and is_secret_name(name):
            text = text.replace(value, REDACTED)
    for shape in _SECRET_SHAPES:
        text = shape.sub(REDACTED, text)
    return text


def redact(value: Any) -> Any:
    """A copy of a JSON-like `value` without secrets. Non-finite floats become the words ``nan``, ``inf``, ``-inf``, which
    JSON can carry; tuples become lists."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {
            str(key): REDACTED if isinstance(item, str) and is_secret_name(str(key)) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return value
