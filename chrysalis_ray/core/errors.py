"""The one error tree.

    ChrysalisError
    ├── ConfigError         a file a person wrote is wrong (exit 2)
    ├── RunError            the run directory and the experiment do not fit together
    ├── GenomeError         a source cannot be read, or a domain does not exist
    │   └── GenomeCorrupt   sealed bytes no longer match their hash
    ├── ModelError          the base model or its tokenizer cannot be used
    ├── StoreError          a blob or a cut cannot be written or read
    │   ├── StoreConflict   somebody else committed that number first
    │   └── StoreCorrupt    stored bytes no longer match their hash
    ├── BodyError           a worker group cannot be manifested or was lost for good
    ├── VariantLost         one variant failed; the others go on
    ├── MergeError          adapters that cannot be merged, or a merge that cannot be written
    └── EvaluationError     nothing to judge, or a judgement that cannot be made

Every error carries a *message* with the numbers in it and, where there is one, a *remedy*. All are picklable, so that they
cross process borders unchanged.
"""

from __future__ import annotations

import re


class ChrysalisError(Exception):
    """Base of every error this package raises on purpose."""

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}" if self.remedy else self.message


class ConfigError(ChrysalisError):
    """A YAML file is wrong. ``problems`` holds one line per mistake, each ``file:line: path: what is wrong``."""

    def __init__(self, message: str, remedy: str | None = None, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, remedy)
        self.args = (message, remedy, problems)
        self.problems = problems


class RunError(ChrysalisError):
    """The run directory belongs to another experiment, or a stage left something this version cannot read."""


class GenomeError(ChrysalisError):
    """A source of the genome is missing, unreadable or empty."""


class GenomeCorrupt(GenomeError):
    """Sealed genome bytes do not match the manifest."""


class ModelError(ChrysalisError):
    """The base model or tokenizer cannot be loaded, or does not suit the blueprint."""


class StoreError(ChrysalisError):
    """The store could not read or write."""


class StoreConflict(StoreError):
    """A cut of that number exists already with other content."""


class StoreCorrupt(StoreError):
    """A stored blob or record does not match its hash."""


class BodyError(ChrysalisError):
    """A worker group could not be manifested, or was lost and could not be revived."""


class VariantLost(ChrysalisError):
    """A variant failed for good; its reason rests in ``failed/``."""


class MergeError(ChrysalisError):
    """Adapters that do not belong together, or a result that cannot be written."""


class EvaluationError(ChrysalisError):
    """Nothing to judge, or a score that is not a number."""


def error_line(error: object) -> str:
    """The line of an error or a traceback that names the error: the last one that starts with a dotted name and a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Lost|Corrupt|Conflict)\b[\w.()]*:", line)]
    return (named or lines or [type(error).__name__])[-1]
