"""The population on a terminal while it trains: one table that renews itself, plain lines where there is no terminal, or
nothing at all where the output belongs to a program."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from chrysalis_ray.core.records import Epigenome, Variant
from chrysalis_ray.core.redaction import redact_text
from chrysalis_ray.report.comparison import WAITING
from chrysalis_ray.report.mixes import shares_now
from chrysalis_ray.report.sections import duration
from chrysalis_ray.report.table import short_mix, state_text

MODES = ("auto", "table", "lines", "quiet")
_AT_WORK = ("training", WAITING)
_COLUMNS = ("variant", "mix", "lr", "rank", "state", "step", "tokens", "tokens/s", "train", "select")
_WIDE = 116  # characters that all columns need; a narrower terminal goes without these
_ONLY_WIDE = ("mix", "tokens", "lr")


class LiveTable:
    """Shows `variants` while they train; a context manager.

    `mode` is ``table`` (renews itself), ``lines`` (one line per report), ``quiet``, or ``auto``: a table on a terminal, else
    lines. `tokens` by domain are for mixes whose prior is ``size``.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        mode: str = "auto",
        console: Console | None = None,
        tokens: Mapping[str, float] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, not one of {', '.join(MODES)}")
        self.console = console or Console(file=sys.stderr if mode == "quiet" else sys.stdout)
        self.mode = mode if mode != "auto" else ("table" if self.console.is_terminal else "lines")
        self._tokens = dict(tokens or {})
        self._steps = {variant.variant_id: variant.steps for variant in variants}
        self._states = {variant.variant_id: _before_training(variant) for variant in variants}
        self._newest: tuple[float, float, int] | None = None  # seconds, steps and variants of the newest turn
        self._live: Live | None = None

    def __enter__(self) -> LiveTable:
        if self.mode == "table":
            # without redirection: what libraries print has a file of its own
            self._live = Live(
                self.render(), console=self.console, refresh_per_second=4, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self.render(), refresh=True)
            self._live.stop()
            self._live = None

    def update(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Take the newest report of any number of variants: lines of ``metrics.jsonl``, or ``{variant, state}`` at an end."""
        for state in states:
            before = self._states.setdefault(str(state["variant"]), {"variant": state["variant"], "state": WAITING})
            before.update({key: value for key, value in state.items() if value is not None})
            self._keep_pace(state)
            if self.mode == "lines":
                self.console.print(Text(redact_text(self.line(str(state["variant"])))), soft_wrap=True)
        if self._live is not None:
            self._live.update(self.render())

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until every variant still at work has its steps, at the pace of the newest turn; None before the first.

        A turn moves all variants of a pack by one share of their budgets in `seconds`; those that do not fit into one pack take
        turns. Variants that stopped no longer count: their lanes are free for the others.
        """
        left = [
            max(1.0 - int(row.get("step") or 0) / self._steps[name], 0.0)
            for name, row in self._states.items()
            if row["state"] in _AT_WORK and self._steps.get(name)
        ]
        if self._newest is None:
            return None
        seconds, share, pack = self._newest
        return max([*left, sum(left) / pack], default=0) * seconds / share

    def _keep_pace(self, row: Mapping[str, Any]) -> None:
        """Remember how long the newest turn took, for which share of the budgets of how many variants."""
        seconds, step, report = (row.get(key) for key in ("seconds", "step", "report"))
        steps = self._steps.get(str(row.get("variant")))
        if seconds and step and report and steps:
            self._newest = (float(seconds), step / report / steps, int(row.get("packed_with") or 0) + 1)

    def line(self, variant_id: str) -> str:
        """One report of one variant as a line of plain text."""
        row = self._states[variant_id]
        eta = self.eta_seconds
        parts = [
            f"{variant_id}: {row['state']}",
            f"step {int(row.get('step') or 0)}/{self._steps.get(variant_id, 0)}",
            f"{int(row.get('tokens') or 0):,} tokens",
            f"{_number(row.get('tokens_per_second'), ',.0f')} tokens/s",
            f"train {_number(row.get('train_loss'), '.4f')}",
            f"select {_number(row.get('select_loss'), '.4f')}",
        ]
        return ", ".join([*parts, f"all done in {duration(eta)}"] if eta else parts)

    def render(self) -> RenderableType:
        """The table as it stands, with a line for the whole below it."""
        table = Table(expand=False)
        shown = [heading for heading in _COLUMNS if self.console.width >= _WIDE or heading not in _ONLY_WIDE]
        for heading in shown:
            table.add_column(heading, justify="left" if heading in ("variant", "mix", "state") else "right", no_wrap=True)
        for name, row in self._states.items():
            cells = dict(zip(_COLUMNS, self._cells(name, row), strict=True))
            table.add_row(*(cells[heading] for heading in shown))
        return Group(table, Text(self._summary(), style="dim"))

    def _cells(self, name: str, row: Mapping[str, Any]) -> list[Text]:
        settings = row.get("hyperparameters") or {}
        epigenome = row.get("epigenome")
        trained = float(row.get("tokens") or 0)
        mix = short_mix(shares_now(Epigenome.from_json(epigenome), self._tokens, trained)) if epigenome else ""
        words = [name, mix, _number(settings.get("learning_rate"), ".2e"), str(settings.get("rank", "-"))]
        numbers = [
            f"{int(row.get('step') or 0)}/{self._steps.get(name, 0)}",
            f"{int(row.get('tokens') or 0):,}",
            _number(row.get("tokens_per_second"), ",.0f"),
            _number(row.get("train_loss"), ".4f"),
            _number(row.get("select_loss"), ".4f"),
        ]
        return [*(Text(word) for word in words), state_text(str(row["state"])), *(Text(number) for number in numbers)]

    def _summary(self) -> str:
        at_work = sum(row["state"] in _AT_WORK for row in self._states.values())
        tokens = sum(int(row.get("tokens") or 0) for row in self._states.values())
        eta = self.eta_seconds
        left = f", {duration(eta)} left" if eta else ""
        return f"{at_work} of {len(self._states)} variants at work, {tokens:,} tokens in all{left}"


def _before_training(variant: Variant) -> dict[str, Any]:
    return {
        "variant": variant.variant_id,
        "state": WAITING,
        "hyperparameters": variant.hyperparameters.to_json(),
        "epigenome": variant.epigenome.to_json(),
    }


def _number(value: Any, form: str) -> str:
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return format(value, form) if finite else "-"
