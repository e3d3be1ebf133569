"""The story of a run on a terminal: a line per stage and, while the population trains, a live table of its variants."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from chrysalis_ray.core.printable import printable_lines
from chrysalis_ray.core.records import Variant
from chrysalis_ray.core.redaction import redact_text

if TYPE_CHECKING:
    from chrysalis_ray.report.live import LiveTable

_NAME_WIDTH = 9


class TerminalStory:
    """Listens to `lifecycle.grow`; a context manager. The table becomes plain lines where `stream` is no terminal.

    `stream` is stderr where stdout belongs to JSON.
    """

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self.stream = stream
        self.started = time.monotonic()
        self.table: LiveTable | None = None

    def __enter__(self) -> TerminalStory:
        return self

    def __exit__(self, *raised: object) -> None:
        self._end_table()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started

    def stage(self, name: str, sentence: str) -> None:
        """Print one line; the table, if there is one, stands still from here."""
        self._end_table()
        line = redact_text(f"{self.seconds:7.1f} s  {name:<{_NAME_WIDTH}}{sentence}")
        print(printable_lines(line), file=self.stream, flush=True)

    def population(self, variants: Sequence[Variant]) -> None:
        """Begin the table."""
        from rich.console import Console

        from chrysalis_ray.report.live import LiveTable

        self.stage("train", f"{len(variants)} variants" if variants else "variants as they are proposed")
        self.table = LiveTable(variants, console=Console(file=self.stream))
        self.table.__enter__()

    def row(self, row: dict[str, Any]) -> None:
        """Show what a variant reports."""
        if self.table is not None:
            self.table.update([row])

    def conclusion(self, variant_id: str, state: str, reason: str | None) -> None:
        """Show how a variant ended; the reason too where something went wrong."""
        if self.table is not None:
            self.table.update([{"variant": variant_id, "state": state}])
            if state in ("failed", "evicted") and reason:
                line = redact_text(f"{variant_id} {state}: {reason}")
                self.table.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _end_table(self) -> None:
        if self.table is not None:
            self.table.__exit__(None, None, None)
            self.table = None
