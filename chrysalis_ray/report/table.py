"""The comparison as a rich table, for ``chrysalis report`` in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from chrysalis_ray.report.comparison import Comparison, VariantRow, loss_text
from chrysalis_ray.report.probes import how, shares_of
from chrysalis_ray.report.tasks import how as how_asked
from chrysalis_ray.report.tasks import metrics_of, tasks_of

STATE_STYLES = {
    "finished": "green",
    "training": "cyan",
    "stopped": "yellow",
    "evicted": "red",
    "failed": "red",
    "waiting": "dim",
}
_SHOWN_DOMAINS = 1


def comparison_tables(comparison: Comparison) -> RenderableType:
    """Variants, merges and verdict, best first. All names are shown as plain text: markup in them means nothing."""
    parts: list[RenderableType] = [_variant_table(comparison)]
    if comparison.merges:
        parts.append(_merge_table(comparison))
    for name, probe in comparison.probes.items():
        parts += [Text(f"probe {name}: {how(probe)}", style="italic"), _probe_table(probe)]
    for task, found in tasks_of(comparison.lm_eval):
        parts += [Text(f"task {task}: {how_asked(comparison.lm_eval, found)}", style="italic"), _task_table(task, found)]
    parts += [Text(sentence, style="bold") for sentence in (comparison.verdict.sentences if comparison.verdict else ())]
    return Group(*parts)


def short_mix(shares: Mapping[str, float]) -> str:
    """The largest shares of a mix: ``code 44 %, +5``."""
    ranked = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{domain} {share:.0%}".replace("%", " %") for domain, share in ranked[:_SHOWN_DOMAINS]]
    rest = len(ranked) - _SHOWN_DOMAINS
    return ", ".join([*words, f"+{rest}"] if rest > 0 else words)


def state_text(state: str) -> Text:
    """The state in its colour; the word alone says it too."""
    return Text(state, style=STATE_STYLES.get(state, ""))


def _variant_table(comparison: Comparison) -> Table:
    title = Text(f"{comparison.name} ({comparison.run_id}): {comparison.stage}")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading, justify in (("variant", "left"), ("mix", "left"), ("lr", "right"), ("rank", "right"), ("state", "left"),
                             ("steps", "right"), ("train", "right"), ("select", "right")):  # fmt: skip
        width = 9 if heading == "mix" else None  # the one column that may be cut: the names of variants tell the mix as well
        table.add_column(heading, justify=justify, no_wrap=True, max_width=width)  # type: ignore[arg-type]
    for row in comparison.variants:
        table.add_row(*_variant_cells(row))
    if comparison.seed_loss is not None:
        table.add_section()
        table.add_row("seed", "", "", "", "", "", "", loss_text(comparison.seed_loss))
    return table


def _variant_cells(row: VariantRow) -> list[Text]:
    cells = [
        row.variant_id,
        short_mix(row.asked),
        f"{row.hyperparameters['learning_rate']:.1e}",
        str(row.hyperparameters["rank"]),
        f"{row.step}/{row.steps}",
        loss_text(row.train_loss),
        loss_text(row.select_loss),
    ]
    texts = [Text(cell) for cell in cells]
    return [*texts[:4], state_text(row.state), *texts[4:]]


def _probe_table(probe: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading, justify in (("candidate", "left"), ("right", "right"), ("interval", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for candidate, share, low, high in shares_of(probe):
        table.add_row(Text(candidate), f"{share:.1%}", f"{low:.1%} to {high:.1%}")
    return table


def _merge_table(comparison: Comparison) -> Table:
    table = Table(title="merges", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("merge", "method", "members", "rank", "residual", "energy kept", "select"):
        table.add_column(heading, justify="left" if heading in ("merge", "method") else "right")
    for row in comparison.merges:
        if row.failure:
            table.add_row(Text(row.name), Text(f"failed: {row.failure}", style="red"), "", "", "", "", "-")
            continue
        energy = "-" if row.captured_energy is None else f"{row.captured_energy:.1%}"
        members = str(sum(weight != 0 for weight in row.weights.values()))
        table.add_row(
            Text(row.name), Text(row.method), members, str(row.rank or "-"), loss_text(row.residual), energy,
            loss_text(row.select_loss),
        )  # fmt: skip
    return table


def _task_table(task: str, found: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("variant", "metric", "value", "interval"):
        table.add_column(heading, justify="left" if heading in ("variant", "metric") else "right")
    for row in metrics_of(task, found):
        table.add_row(Text(row.candidate), Text(row.metric), f"{row.value:.4f}", row.interval)
    return table
