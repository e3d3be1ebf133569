"""The story of a run as lines on the terminal: one per stage, one per report, one per ending."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from chrysalis_ray.core.records import Variant
from chrysalis_ray.core.redaction import redact_text

_NAME_WIDTH = 9


class LineStory:
    """Plain lines, for pipes, logs and CI. `stream` is stderr where stdout belongs to JSON."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self.stream = stream
        self.started = time.monotonic()
        self.steps: dict[str, int] = {}

    def __enter__(self) -> LineStory:
        return self

    def __exit__(self, *raised: object) -> None:
        self.stream.flush()

    def stage(self, name: str, sentence: str) -> None:
        self._say(name, sentence)

    def population(self, variants: Sequence[Variant]) -> None:
        self.steps = {variant.variant_id: variant.steps for variant in variants}
        self._say("train", f"{len(variants)} variants, up to {max(self.steps.values(), default=0)} steps each")

    def row(self, row: dict[str, Any]) -> None:
        variant_id = row["variant"]
        losses = ", ".join(
            f"{word} {row[key]:.4f}"
            for word, key in (("train", "train_loss"), ("select", "select_loss"))
            if isinstance(row.get(key), float)
        )
        speed = row.get("tokens_per_second")
        pace = f", {speed:,.0f} tokens/s" if isinstance(speed, float) else ""
        self._say("train", f"{variant_id}  step {row.get('step', '?')}/{self.steps.get(variant_id, '?')}  {losses}{pace}")

    def conclusion(self, variant_id: str, state: str, reason: str | None) -> None:
        self._say("train", f"{variant_id}  {state}{f': {reason}' if reason else ''}")

    def _say(self, name: str, sentence: str) -> None:
        seconds = time.monotonic() - self.started
        print(redact_text(f"{seconds:7.1f} s  {name:<{_NAME_WIDTH}}{sentence}"), file=self.stream, flush=True)
