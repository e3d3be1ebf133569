"""How a verb ends: exit codes, error messages a person can act on, JSON for programs."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from chrysalis_ray.cli.termination import ended_by_sigterm
from chrysalis_ray.core.errors import ChrysalisError, ConfigError
from chrysalis_ray.core.printable import printable, printable_json, printable_lines
from chrysalis_ray.core.redaction import redact_text

FAILED = 1
INVALID = 2
DOES_NOT_FIT = 3
INTERRUPTED = 130
TERMINATED = 143

TRACEBACK_VARIABLE = "CHRYSALIS_TRACEBACK"


def verb(function: Callable[..., int | None]) -> Callable[..., None]:
    """`function` as a command: its return value is the exit code, a ChrysalisError its message on stderr."""

    @functools.wraps(function)
    def command(*args: Any, **options: Any) -> None:
        with ended_by_sigterm() as terminated:
            try:
                code = function(*args, **options) or 0
                sys.stdout.flush()
            except KeyboardInterrupt:
                code = ended("terminated", TERMINATED) if terminated() else ended("interrupted", INTERRUPTED)
            except ChrysalisError as error:  # what a SIGTERM to all processes of a run looks like, if others heard it first
                code = ended("terminated", TERMINATED) if terminated() else tell(error)
            except BrokenPipeError:  # `chrysalis report RUN | head`: whoever reads has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                code = FAILED
            except OSError as error:
                code = tell(of_the_system(error))
        sys.exit(code)

    return command


def ended(how: str, code: int) -> int:
    """Say on stderr that somebody ended this process; returns `code`."""
    print(f"\n{how}: run the same command again to go on", file=sys.stderr)
    return code


def of_the_system(error: OSError) -> ChrysalisError:
    """What the operating system refused, with the path and what helps."""
    remedies = {
        errno.ENOSPC: "free some disk space and run the same command again: it goes on where it stopped",
        errno.EDQUOT: "your disk quota is used up; free some and run the same command again: it goes on where it stopped",
        errno.EACCES: "give yourself the right to read and write there, or use another folder",
        errno.EPERM: "give yourself the right to read and write there, or use another folder",
        errno.EROFS: "that volume is read-only; use another folder (--runs)",
    }
    told = ChrysalisError(
        f"{error} ({type(error).__name__})",
        remedies.get(error.errno or 0, f"{TRACEBACK_VARIABLE}=1 shows where it happened; the same command again goes on"),
    )
    told.__cause__ = error
    return told


def tell(error: ChrysalisError) -> int:
    """Write `error` to stderr and return the exit code that belongs to it. No traceback unless asked for."""
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        traceback.print_exception(error)
    print(printable_lines(redact_text(f"error: {error.message}")), file=sys.stderr)
    if isinstance(error, ConfigError):
        for problem in error.problems:
            if problem not in error.message:
                print(printable_lines(redact_text(f"  {problem}")), file=sys.stderr)
    if error.remedy:
        print(printable_lines(redact_text(f"remedy: {error.remedy}")), file=sys.stderr)
    return INVALID if isinstance(error, ConfigError) else FAILED


def print_json(value: Any) -> None:
    """`value` on stdout, indented, keys sorted."""
    print(printable_json(value, sort_keys=True, indent=2, default=str))


def print_lines(lines: Iterable[str]) -> None:
    """Each of `lines` on stdout as one line, whatever names are in it."""
    for line in lines:
        print(printable(line))
