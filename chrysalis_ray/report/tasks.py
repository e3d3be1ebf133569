"""Tasks of lm-eval on the page, in the card, in a terminal and in W&B: metrics with intervals, as the verdict tells them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, NamedTuple

from chrysalis_ray.report.reading import mapping, number
from chrysalis_ray.report.sections import section_of, table_of


class Told(NamedTuple):
    """A metric of one candidate on one task; bounds are None where no interval is known."""

    task: str
    metric: str
    candidate: str
    value: float
    low: float | None
    high: float | None

    @property
    def interval(self) -> str:
        return "" if self.low is None or self.high is None else f"{self.low:.4f} to {self.high:.4f}"


def tasks_of(told: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((str(task), mapping(found)) for task, found in mapping(told.get("tasks")).items())


def metrics_of(task: str, found: Mapping[str, Any]) -> Iterator[Told]:
    """Every number of a task, metric by metric."""
    rows = [
        Told(task, str(metric), str(name), value, number(mapping(own).get("low")), number(mapping(own).get("high")))
        for name, metrics in mapping(found.get("candidates")).items()
        for metric, own in mapping(metrics).items()
        if (value := number(mapping(own).get("value"))) is not None
    ]
    return iter(sorted(rows, key=lambda row: row.metric))


def how(told: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """``by lm-eval 0.4.13, 200 items``"""
    return f"by lm-eval {told.get('version', '')}, {found.get('items', 0)} items"


def task_section(told: Mapping[str, Any], chosen: str) -> str:
    """A table for every task; an empty text where there are none."""
    tables = []
    for task, found in tasks_of(told):
        rows = [_row(row, " class='chosen'" if row.candidate == chosen else "") for row in metrics_of(task, found)]
        against = "".join(f"<li>{escape(_difference(mapping(each)))}</li>" for each in found.get("differences", ()))
        tables.append(
            f"<h3>{escape(task)}</h3><p class='note'>{escape(how(told, found))}</p>"
            f"{table_of(f'Task {task}', ('variant', 'metric', 'value', 'from', 'to'), rows)}<ul class='findings'>{against}</ul>"
        )
    note = "Tasks of lm-eval, asked of the seed, the best variant and what is released, after all was chosen."
    return section_of("Tasks", note, "".join(tables)) if tables else ""


def _row(row: Told, style: str) -> str:
    cells = "".join(
        "<td>-</td>" if value is None else f"<td data-v='{value!r}'>{value:.4f}</td>"
        for value in (row.value, row.low, row.high)
    )
    return f"<tr{style}><th scope='row'>{escape(row.candidate)}</th><td>{escape(row.metric)}</td>{cells}</tr>"


def _difference(each: Mapping[str, Any]) -> str:
    mean, low, high = (number(each.get(key)) or 0.0 for key in ("mean", "low", "high"))
    who = f"{each.get('metric')} of {each.get('of')} against {each.get('against')}"
    return f"{who}: {mean:+.1%}, interval {low:+.1%} to {high:+.1%}"


def task_rows(told: Mapping[str, Any], candidate: str) -> list[list[str]]:
    """(task, metric, value with its interval) of one candidate and of the seed, for a table of a card."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for task, found in tasks_of(told):
        for row in metrics_of(task, found):
            interval = f" [{row.interval}]" if row.interval else ""
            rows.setdefault((task, row.metric), {})[row.candidate] = f"{row.value:.4f}{interval}"
    return [[task, metric, own.get(candidate, "-"), own.get("seed", "-")] for (task, metric), own in rows.items()]


def task_metrics(told: Mapping[str, Any], candidate: str) -> dict[str, float]:
    """``lm_eval/<task>/<metric>`` -> value of one candidate."""
    return {
        f"lm_eval/{task}/{row.metric}": row.value
        for task, found in tasks_of(told)
        for row in metrics_of(task, found)
        if row.candidate == candidate
    }
