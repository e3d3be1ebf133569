"""The sections of the HTML page, each from the comparison alone; an empty text where a run has nothing to show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from chrysalis_ray.core.records import MIXTURE
from chrysalis_ray.report.charts import COLOURS, Curve, Estimate, forest_plot, loss_chart, short_count, stacked_bar
from chrysalis_ray.report.comparison import SEED, Comparison, VariantRow
from chrysalis_ray.report.scores import Interval

_SETTINGS = (
    "learning_rate", "rank", "alpha", "weight_decay", "clip", "warmup_fraction", "decay", "optimizer", "plus_ratio", "freeze_a",
    "dropout", "final_fraction", "rows_per_step",
)  # fmt: skip


def duration(seconds: float) -> str:
    """131.5 -> ``2 min 12 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def section_of(title: str, note: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p class='note'>{note}</p>{body}</section>"


def table_of(caption: str, heads: Sequence[str], rows: Iterable[str], style: str = "sortable") -> str:
    head = "".join(f"<th scope='col'{_word(heading)}>{escape(heading)}</th>" for heading in heads)
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{escape(caption)}'>"
        f"<table class='{style}' aria-label='{escape(caption)}'>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _word(heading: str) -> str:
    return " class='word'" if heading in ("variant", "merge", "method", "state", "weights", "notes") else ""


def cell_of(value: float | None, form: str = ".4f") -> str:
    """A number that sorts by its full value; a dash that sorts last where there is none."""
    return "<td data-v=''>–</td>" if value is None else f"<td data-v='{value!r}'>{format(value, form)}</td>"


# held-out text, curves ----------------------------------------------------------------------------------------------


def report_split(comparison: Comparison, most: int) -> str:
    """Forest plot of the *report* losses."""
    verdict = comparison.verdict
    named: list[tuple[str, Interval | None]] = [(row.name, row.report_loss) for row in comparison.merges]
    named += [(row.variant_id, row.report_loss) for row in comparison.variants[:most]]
    named += [(SEED, comparison.seed_report), (MIXTURE, comparison.bound)]
    roles = {SEED: "seed", verdict.winner: "winner", verdict.chosen: "chosen"} if verdict else {}
    estimates = [Estimate(name, i.mean, i.low, i.high, roles.get(name, "")) for name, i in named if i is not None]
    if verdict is None or not estimates:
        return ""
    estimates.sort(key=lambda estimate: (estimate.mean, estimate.label))
    confidence = f"{verdict.confidence:.0%} " if verdict.confidence is not None else ""
    note = (
        f"Mean loss on <i>report</i> text, which neither trained nor chose anything, with {confidence}bootstrap intervals over "
        f"documents. <b>{escape(verdict.chosen)}</b> is released"
        + (f"; <b>{escape(verdict.winner)}</b> is the best single variant." if verdict.winner != verdict.chosen else ".")
        + (
            f" <b>{MIXTURE}</b>: all asked together, the mean of what they say, which a merge may come near."
            if comparison.bound is not None
            else ""
        )
    )
    return section_of("On text that chose nothing", note, f"<figure>{forest_plot('Losses on report text', estimates)}</figure>")


def loss_curves(comparison: Comparison, shown: Sequence[VariantRow]) -> str:
    """Select and train loss by tokens, one line per variant, with a check box each."""
    drawn = [(k, row, [(float(p.tokens), p) for p in row.curve]) for k, row in enumerate(shown) if row.curve]
    figures = []
    for title, chart_id in (("select loss", "select"), ("train loss", "train")):
        curves = [
            Curve(row.variant_id, f"v{k}", k, [(x, y) for x, p in points if (y := getattr(p, f"{chart_id}_loss")) is not None])
            for k, row, points in drawn
        ]
        chart = loss_chart(f"{title} by tokens", curves, chart_id)
        figures.append(f"<figure><h3>{title}</h3>{chart}</figure>" if chart else "")
    if not any(figures):
        return ""
    boxes = "".join(
        f"<label class='s{k % COLOURS}'><input type='checkbox' id='t{k}' checked><span class='swatch'></span>"
        f"{escape(row.variant_id)}</label>"
        for k, row, _ in drawn
    )
    toggles = f"<fieldset class='toggles'><legend class='note'>Variants, best first</legend>{boxes}</fieldset>"
    note = (
        "By tokens seen, so that variants compare fairly. A line ends where its variant stopped. Reports read fewer rows of "
        "select than the judging below. "
    ) + _cut_note(comparison, shown)
    return section_of("Losses", note, f"{toggles}<div class='charts'>{''.join(figures)}</div>")


def toggle_style(shown: Sequence[VariantRow]) -> str:
    """CSS that hides a variant's lines when its box is cleared: no script needed."""
    return "".join(f"body:has(#t{k}:not(:checked)) .v{k}{{display:none}}" for k in range(len(shown)))


def _cut_note(comparison: Comparison, shown: Sequence[VariantRow]) -> str:
    left_out = len(comparison.variants) - len(shown)
    return f" The {left_out} variants with the highest loss are not shown." if left_out else ""


# mixes --------------------------------------------------------------------------------------------------------------


def mixes(comparison: Comparison, shown: Sequence[VariantRow]) -> str:
    """Asked and realised shares of each variant as stacked bars."""
    if not shown:
        return ""
    places = {domain: k for k, domain in enumerate(comparison.domains)}
    legend = "".join(
        f"<span><i class='b{k % COLOURS} h{k // COLOURS % 2}'></i>{escape(domain)}</span>" for domain, k in places.items()
    )
    rows = []
    for row in shown:
        rows.append(f"<div class='who'>{escape(row.variant_id)}</div><div class='kind'>asked</div>")
        rows.append(stacked_bar(row.asked, places, f"{row.variant_id} asked"))
        if row.realised:
            rows.append("<div class='who'></div><div class='kind'>seen</div>")
            rows.append(stacked_bar(row.realised, places, f"{row.variant_id} seen"))
        rows += _resolved(row, places)
        rows.append("<div class='gap'></div>")
    note = "The share of each domain that was asked for, and the share of tokens a variant really saw."
    if any(len(row.mix.parts) > 1 for row in shown):
        note += " Where shares changed, asked is their mean over what was trained, and every part of the schedule has a bar."
    return section_of("Data mixes", note, f"<div class='legend'>{legend}</div><div class='mixes'>{''.join(rows)}</div>")


def _resolved(row: VariantRow, places: Mapping[str, int]) -> list[str]:
    """The schedule of a mix as bars, and what was said of it beside levels; nothing of a mix of levels and ``uniform``."""
    found = []
    for part in row.mix.parts if len(row.mix.parts) > 1 else ():
        name = f"{part.why}, step {part.step}" if part.step else "start"
        found.append(f"<div class='who'></div><div class='kind'>{escape(name)}</div>")
        found.append(stacked_bar(part.shares, places, f"{row.variant_id} from step {part.step}"))
    if row.mix.words != ("prior uniform",) and row.mix.words:
        found.append("<div class='who'></div><div class='kind'>mix</div>")
        found.append(f"<div class='kind'>{escape('; '.join(row.mix.words))}</div>")
    return found


# tables -------------------------------------------------------------------------------------------------------------


def variant_table(comparison: Comparison, shown: Sequence[VariantRow]) -> str:
    """Every variant with the hyperparameters that differ, sortable; those that all share are told once."""
    if not shown:
        return ""
    values = {name: {str(row.hyperparameters.get(name)) for row in shown} for name in _SETTINGS}
    differing = [name for name in _SETTINGS if len(values[name]) > 1]
    shared = ", ".join(f"{name.replace('_', ' ')} {min(values[name])}" for name in _SETTINGS if name not in differing)
    heads = ("variant", "state", "steps", "tokens", "tokens/s", "train", "select", *(n.replace("_", " ") for n in differing))
    rows = [_variant_cells(row, differing, comparison) for row in shown]
    note = (
        "Best first by loss on <i>select</i>. Click a heading to sort by it."
        + (f" All share {escape(shared)}." if shared else "")
        + _cut_note(comparison, shown)
    )
    return section_of("Variants", note, table_of("Variants and their hyperparameters", heads, rows))


def _variant_cells(row: VariantRow, settings: Sequence[str], comparison: Comparison) -> str:
    chosen = " class='chosen'" if comparison.verdict and row.variant_id == comparison.verdict.winner else ""
    state = row.state if row.state.isalpha() else "waiting"
    reason = f"<small>{escape(row.reason)}</small>" if row.reason else ""
    return (
        f"<tr{chosen}><th scope='row'>{escape(row.variant_id)}</th>"
        f"<td class='word' data-v='{escape(row.state)}'><span class='state {state}'>{escape(row.state)}</span>{reason}</td>"
        f"<td data-v='{row.step}'>{row.step}/{row.steps}</td><td data-v='{row.tokens}'>{row.tokens:,}</td>"
        f"{cell_of(row.tokens_per_second, ',.0f')}{cell_of(row.train_loss)}{cell_of(row.select_loss)}"
        f"{''.join(_setting(row.hyperparameters.get(name)) for name in settings)}</tr>"
    )


def _setting(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return cell_of(value, ".3g")
    return f"<td>{escape(str(value if value is not None else ''))}</td>"


def domain_matrix(comparison: Comparison, shown: Sequence[VariantRow]) -> str:
    """Candidates x domains of select losses. Each column is shaded on its own, darker is better; a dot marks its best."""
    named: list[tuple[str, Mapping[str, float]]] = [(row.variant_id, row.domain_losses) for row in shown]
    merged = [(row.name, row.domain_losses) for row in comparison.merges if row.domain_losses]
    named = [*((name, losses) for name, losses in named if losses), *merged]
    if not named:
        return ""
    ranges = {}
    for domain in comparison.domains:
        column = [losses[domain] for _, losses in named if domain in losses]
        ranges[domain] = (min(column), max(column)) if column else (0.0, 0.0)
    rows = [_matrix_row(name, losses, ranges, k == len(named) - len(merged)) for k, (name, losses) in enumerate(named)]
    if comparison.seed_domain_losses:
        rows.append(_matrix_row(SEED, comparison.seed_domain_losses, ranges, True))
    note = "Loss on <i>select</i> by domain. Each column is shaded for itself, darker is lower; a dot marks the lowest."
    heads = ("variant", *comparison.domains, "mean")
    return section_of("Who learned what", note, table_of("Select loss by variant and domain", heads, rows, "heat"))


def _matrix_row(name: str, losses: Mapping[str, float], ranges: Mapping[str, tuple[float, float]], first: bool) -> str:
    cells = []
    for domain, (low, high) in ranges.items():
        if domain not in losses:
            cells.append("<td>–</td>")
            continue
        shade = 0.62 * min(max((high - losses[domain]) / (high - low), 0.0), 1.0) if high > low else 0.0
        best = " class='best'" if losses[domain] <= low else ""
        cells.append(f"<td{best} style='--h:{shade:.2f}'>{losses[domain]:.3f}</td>")
    mean = sum(losses.values()) / len(losses)
    group = " class='group'" if first else ""
    return f"<tr{group}><th scope='row'>{escape(name)}</th>{''.join(cells)}<td>{mean:.3f}</td></tr>"


def merge_table(comparison: Comparison) -> str:
    """Merge candidates with what the rank cut cost and who went in."""
    if not comparison.merges:
        return ""
    heads = ("merge", "method", "select", "report", "rank", "residual", "energy kept", "weights", "notes")
    rows = []
    for row in comparison.merges:
        chosen = " class='chosen'" if comparison.verdict and row.name == comparison.verdict.chosen else ""
        shown = {key: value for key, value in row.notes.items() if isinstance(value, int | float | str)}
        notes = row.failure or ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in shown.items())
        rows.append(
            f"<tr{chosen}><th scope='row'>{escape(row.name)}</th>"
            f"<td class='word'>{'failed' if row.failure else escape(row.method)}</td>{cell_of(row.select_loss)}"
            f"<td>{_told(row.report_loss)}</td>{cell_of(row.rank, 'd')}{cell_of(row.residual)}"
            f"{cell_of(row.captured_energy, '.1%')}"
            f"<td class='word'>{_weights(row.weights)}</td><td class='wrap'>{escape(notes)}</td></tr>"
        )
    note = "The residual is what the cut to one rank lost, relative to the exact merge (Frobenius norm of the deltas)."
    return section_of("Merges", note, table_of("Merge candidates", heads, rows))


def _told(loss: Interval | None) -> str:
    return "-" if loss is None else f"{loss.mean:.4f} ({loss.low:.4f} to {loss.high:.4f})"


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _weights(weights: Mapping[str, float]) -> str:
    ranked = sorted(weights.items(), key=lambda item: (-abs(item[1]), item[0]))
    largest = abs(ranked[0][1]) if ranked else 1.0
    lines = []
    for name, weight in ranked[:8]:
        width = max(60 * abs(weight) / (largest or 1.0), 1)
        lines.append(f"<span class='share' style='width:{width:.0f}px'></span>{escape(name)} {weight:.3g}")
    more = [f"and {len(ranked) - 8} more"] if len(ranked) > 8 else []
    return "<br>".join([*lines, *more])


def plan_against_run(comparison: Comparison) -> str:
    """What the plan said before, and what was measured."""
    names = [name for name in comparison.planned if name in comparison.measured]
    if not names:
        return ""
    rows = []
    for name in names:
        said, was = comparison.planned[name], comparison.measured[name]
        cells = f"{cell_of(said, '.4g')}{cell_of(was, '.4g')}{cell_of(was / said if said else None, '.2f')}"
        rows.append(f"<tr><th scope='row'>{escape(name.replace('_', ' '))}</th>{cells}</tr>")
    return section_of(
        "The plan and the run",
        "Said before the start, measured after.",
        table_of("Plan", ("quantity", "plan said", "was", "was / said"), rows),
    )


# where it comes from, how to use it ---------------------------------------------------------------------------------


def origins(comparison: Comparison, shown: Sequence[VariantRow], diagram: str) -> str:
    """Genome -> base -> seed -> variants -> merges -> imago, with the hash of each."""
    base = comparison.base or {}
    nodes = []
    if comparison.genome:
        domains = comparison.genome.domains
        size = short_count(sum(domain.bytes for domain in domains.values()))
        nodes.append(("genome", f"{len(domains)} domains, {size}B", comparison.genome.genome_id, ""))
    if base:
        parameters = base.get("parameters")
        detail = f"{short_count(float(parameters))} parameters" if isinstance(parameters, int | float) else ""
        nodes.append(("base", f"{base.get('name', '')} {detail}".strip(), str(base.get("sha256", "")), ""))
    if comparison.variants:
        nodes.append(("seed", "adapter zero", comparison.variants[0].parents[0] if comparison.variants[0].parents else "", ""))
        nodes.append(("variants", str(len(comparison.variants)), "", ""))
    made = [row for row in comparison.merges if not row.failure]
    if made:
        nodes.append(("merges", ", ".join(row.name for row in made), "", ""))
    if comparison.verdict is not None:
        sha256 = next((row.sha256 for row in made if row.name == comparison.verdict.chosen), None)
        nodes.append(("imago", comparison.verdict.chosen, sha256 or "", "final"))
    boxes = [
        f"<div class='node {style}'><b>{word}</b>{escape(detail)}"
        + (f"<br><code>{escape(sha[:12])}</code>" if sha else "")
        + "</div>"
        for word, detail, sha, style in nodes
    ]
    if not boxes:
        return ""
    flow = "<span class='arrow' aria-hidden='true'>→</span>".join(boxes)
    drawn = diagram if len(shown) == len(comparison.variants) else ""
    hashes = _hashes(comparison, shown) + _folded("Mermaid diagram", drawn)
    note = "Every step is named by the sha256 of its content; <code>chrysalis lineage --verify</code> computes them again."
    return section_of("Where it comes from", note, f"<div class='flow'>{flow}</div>{hashes}")


def _hashes(comparison: Comparison, shown: Sequence[VariantRow]) -> str:
    named = [("experiment", comparison.experiment_sha256)]
    if comparison.genome:
        named += [("genome", comparison.genome.genome_id), ("genome Merkle root", comparison.genome.merkle_root)]
    named.append(("base", str((comparison.base or {}).get("sha256", "")) or None))
    named += [(f"merge {row.name}", row.sha256) for row in comparison.merges]
    named += [(f"variant {row.variant_id}", row.sha256) for row in shown]
    rows = "".join(
        f"<tr><th scope='row'>{escape(n)}</th><td class='word'><code>{escape(sha)}</code></td></tr>" for n, sha in named if sha
    )
    return f"<details><summary>All hashes</summary><div class='scroll'><table><tbody>{rows}</tbody></table></div></details>"


def _folded(title: str, text: str) -> str:
    """A block of plain text under a line that opens it."""
    if not text.strip():
        return ""
    return f"<details><summary>{escape(title)}</summary><pre><code>{escape(text)}</code></pre></details>"


def loading(comparison: Comparison) -> str:
    """How to load the imago with plain transformers and peft."""
    if not comparison.verdict:
        return ""
    return section_of(
        "Load the imago",
        "A plain PEFT folder; this package is not needed.",
        f"<pre><code>{escape(loading_code(str((comparison.base or {}).get('path') or 'BASE')))}</code></pre>",
    )


def loading_code(base: str, imago: str = "imago") -> str:
    """Python that loads an imago beside its base."""
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({base!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({base!r})\n"
        f"model = PeftModel.from_pretrained(base, {imago!r})\n"
    )


def experiment(text: str) -> str:
    """The experiment as it was written, folded away."""
    return section_of("The experiment", "This file grows the run again.", _folded("Show", text)) if text.strip() else ""
