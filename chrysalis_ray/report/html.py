"""`report.html`: one page that tells a run, complete in itself. No network, no script or font from elsewhere; without
JavaScript everything but sorting and values under the pointer still works.

Whatever comes from a run is escaped where it enters markup (`escape`, or `charts`), and secrets are taken out twice: when
the files are read, and from the finished page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.printable import printable_lines
from chrysalis_ray.core.records import write_bytes
from chrysalis_ray.core.redaction import redact_text
from chrysalis_ray.report import judgement, sections
from chrysalis_ray.report.agreement import agreement_section
from chrysalis_ray.report.charts import short_count
from chrysalis_ray.report.comparison import Comparison, read_run
from chrysalis_ray.report.kinds import is_lora_alone, kind_name
from chrysalis_ray.report.lineage import mermaid
from chrysalis_ray.report.page import whole_page
from chrysalis_ray.report.probes import probe_section
from chrysalis_ray.report.reading import public_manifest
from chrysalis_ray.report.tasks import task_section

MOST_VARIANTS = 64  # shown in charts and tables, best first; `chrysalis report --json` has them all

_HEADLINES = {
    "yes": "Merging helped",
    "no": "Merging did not help",
    "unclear": "Whether merging helped is unclear",
}


def write_report(root: Path) -> Path:
    """Write `report.html` of a run, as far as the run came, and return its path. Raises RunError if `root` is no run."""
    layout = RunLayout(Path(root).absolute())
    record = public_manifest(layout.lineage)
    diagram = mermaid(record) if record else ""
    page = report_page(read_run(layout.root), _text(layout.experiment_yaml), diagram)
    write_bytes(layout.html, page.encode("utf-8", "replace"))
    return layout.html


def report_page(comparison: Comparison, experiment_yaml: str = "", diagram: str = "") -> str:
    """The HTML page of a comparison. `diagram` is its lineage in Mermaid's language."""
    shown = comparison.variants[:MOST_VARIANTS]
    builders: Sequence[Callable[[], str]] = (
        lambda: sections.report_split(comparison, MOST_VARIANTS),
        lambda: sections.loss_curves(comparison, shown),
        lambda: sections.mixes(comparison, shown),
        lambda: sections.variant_table(comparison, shown),
        lambda: sections.domain_matrix(comparison, shown),
        lambda: judgement.metric_tables(comparison, shown),
        lambda: agreement_section(comparison),
        lambda: judgement.audit_section(comparison, shown),
        lambda: probe_section(comparison.probes, comparison.verdict.chosen if comparison.verdict else ""),
        lambda: task_section(comparison.lm_eval, comparison.verdict.chosen if comparison.verdict else ""),
        lambda: sections.merge_table(comparison),
        lambda: sections.plan_against_run(comparison),
        lambda: sections.origins(comparison, shown, diagram),
        lambda: sections.loading(comparison),
        lambda: sections.experiment(experiment_yaml or json.dumps(comparison.experiment, indent=2, ensure_ascii=False)),
    )
    page = whole_page(
        title=f"{comparison.name} · {headline(comparison)}",
        header=_header(comparison),
        sections=[build() for build in builders],
        footer=_footer(comparison),
        extra_style=sections.toggle_style(shown),
    )
    return printable_lines(redact_text(page))  # a licence or a name in it may hold what turns the text around


def headline(comparison: Comparison) -> str:
    """The run in one plain sentence."""
    verdict = comparison.verdict
    if verdict is not None:
        told = _HEADLINES.get(verdict.merging_helped, _HEADLINES["unclear"])
        return f"{told}; the best variant is released" if verdict.kind == "winner" else told
    if not comparison.variants:
        return "No variants yet"
    words = {"trained": "trained, not judged yet", "merged": "trained and merged, not judged yet", "training": "in training"}
    return f"{len(comparison.variants)} variants, {words.get(comparison.stage, 'not trained yet')}"


def _header(comparison: Comparison) -> str:
    helped = comparison.verdict.merging_helped if comparison.verdict else "open"
    tone = helped if helped in ("yes", "no") else "open"
    sentences = comparison.verdict.sentences if comparison.verdict else ()
    lead = "".join(f"<p class='lead'>{escape(sentence)}</p>" for sentence in sentences)
    facts = "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(value)}<small>{escape(detail)}</small></dd></div>"
        for term, value, detail in _facts(comparison)
    )
    return (
        f"<p class='brand'>chrysalis · {escape(comparison.name)} · {escape(comparison.run_id)}</p>"
        f"<h1 class='{tone}'><span class='mark' aria-hidden='true'></span>{escape(headline(comparison))}</h1>"
        f"{lead}<dl class='facts'>{facts}</dl>"
    )


def _facts(comparison: Comparison) -> list[tuple[str, str, str]]:
    """(term, value, detail) of the numbers that matter most."""
    facts = []
    released, best = comparison.released, comparison.best_variant
    if comparison.verdict is not None and released is not None and released.select_loss is not None:
        facts.append(("released", f"{released.select_loss:.3f}", f"{comparison.verdict.chosen}, loss on select"))
    if best is not None and best.select_loss is not None:
        facts.append(("best variant", f"{best.select_loss:.3f}", best.variant_id))
    if comparison.seed_loss is not None:
        facts.append(("seed", f"{comparison.seed_loss:.3f}", "before any training"))
    if comparison.variants:
        states: dict[str, int] = {}
        for row in comparison.variants:
            states[row.state] = states.get(row.state, 0) + 1
        detail = ", ".join(f"{count} {state}" for state, count in sorted(states.items(), key=lambda item: -item[1]))
        kind = "" if is_lora_alone(comparison.experiment) else f"; {kind_name(comparison.experiment)}"
        facts.append(("variants", str(len(comparison.variants)), detail + kind))
        facts.append(("tokens trained", short_count(sum(row.tokens for row in comparison.variants)), "all variants together"))
    if comparison.wall_seconds is not None:
        facts.append(("training took", sections.duration(comparison.wall_seconds), f"{comparison.turns} turns"))
    return facts


def _footer(comparison: Comparison) -> str:
    made = f"Made {escape(comparison.created)} " if comparison.created else "Made "
    return (
        f"<p>{made}by chrysalis_ray {escape(comparison.version or '')}. Losses are nats per token, lower is better. "
        "What was chosen was chosen on <i>select</i>; <i>report</i> text chose nothing.</p>"
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
