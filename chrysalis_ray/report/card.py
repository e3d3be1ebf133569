"""The model card of an imago: what it is, what it scored, where it comes from, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.printable import markdown_line as _line
from chrysalis_ray.core.redaction import redact_text
from chrysalis_ray.report.comparison import Comparison, loss_text, read_run
from chrysalis_ray.report.kinds import adapter_of, kind_name
from chrysalis_ray.report.lineage import adapter_name
from chrysalis_ray.report.probes import probe_rows
from chrysalis_ray.report.scores import Interval
from chrysalis_ray.report.sections import loading_code
from chrysalis_ray.report.tasks import task_rows

# SPDX identifiers that the hub knows under its own names
_HUB_LICENCES = {"CC0-1.0": "cc0-1.0", "MIT": "mit", "Apache-2.0": "apache-2.0", "CC-BY-4.0": "cc-by-4.0",
                 "CC-BY-SA-4.0": "cc-by-sa-4.0", "BSD-3-Clause": "bsd-3-clause", "BSD-2-Clause": "bsd-2-clause"}  # fmt: skip
UNKNOWN_LICENCE = "NOASSERTION"


def imago_card(root: Path) -> str:
    """README.md of the imago of a judged run, for the Hugging Face hub. Raises RunError if there is no verdict yet."""
    layout = RunLayout(Path(root).absolute())
    comparison = read_run(layout.root)
    if comparison.verdict is None:
        raise RunError(f"{layout.root} was not judged yet: it holds no {layout.verdict.name}", "run the experiment to its end")
    yaml_text = layout.experiment_yaml.read_text(encoding="utf-8", errors="replace") if layout.experiment_yaml.is_file() else ""
    parts = [
        f"---\n{_yaml(front_matter(comparison))}---\n",
        _introduction(comparison),
        _use(comparison),
        _scores(comparison),
        _probes(comparison),
        _tasks(comparison),
        _parents(comparison, layout),
        _genome(comparison),
        _experiment(yaml_text),
        _use_policy(comparison),
        _limits(comparison),
    ]
    return redact_text("\n".join(part for part in parts if part))


def front_matter(comparison: Comparison) -> dict[str, Any]:
    """The YAML head of the card, as the hub reads it. An embedded base has no hub name, so that none is given."""
    base = comparison.base or {}
    head: dict[str, Any] = {}
    if base.get("type") == "pretrained" and not Path(str(base.get("name"))).is_absolute():
        head |= {"base_model": base["name"], "base_model_relation": "adapter"}
    licence = _licence(domain.licence for domain in (comparison.genome.domains.values() if comparison.genome else ()))
    head |= {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [
            str(adapter_of(comparison.experiment)["type"]),
            "chrysalis_ray",
            "merge" if comparison.verdict and comparison.verdict.kind == "merge" else "adapter",
        ],
        "license": licence,
    }
    if licence == "other":
        head["license_name"] = "see-data"
    measured = comparison.released.report_loss if comparison.released else None
    if measured is not None:
        metric = {"type": "loss", "name": "nats per token, mean over domains", "value": round(measured.mean, 6)}
        task = {"type": "text-generation", "name": "language modelling"}
        genome_id = comparison.genome.genome_id[:12] if comparison.genome else ""
        data = {"type": "genome", "name": f"held-out report split of genome {genome_id}"}
        head["model-index"] = [
            {"name": " ".join(comparison.name.split()), "results": [{"task": task, "dataset": data, "metrics": [metric]}]}
        ]
    return head


def _licence(licences: Iterable[str]) -> str:
    """One licence for all only where all agree and the hub knows it; else ``other``, and the table below says which."""
    found = set(licences)
    return _HUB_LICENCES.get(found.pop(), "other") if len(found) == 1 else "other"


def _introduction(comparison: Comparison) -> str:
    verdict = comparison.verdict
    assert verdict is not None
    base = (comparison.base or {}).get("name", "its base")
    worn = kind_name(comparison.experiment)
    kind = f"merge of {worn} adapters" if verdict.kind == "merge" else f"{worn} adapter, the best of its population"
    article = "An" if kind[0] in "IO" else "A"
    said = "\n".join(f"- {_line(sentence)}" for sentence in verdict.sentences)
    return (
        f"# {_line(comparison.name)}\n\n{article} {kind} for `{_code(str(base))}`, grown by chrysalis_ray from "
        f"{len(comparison.variants)} variants of one seed, each on its own data mix.\n\n{said}\n"
    )


def _use(comparison: Comparison) -> str:
    base = comparison.base or {}
    place = str(base.get("path") if base.get("type") == "embedded" else base.get("name"))
    note = (
        "The base was made on the training machine; its folder must be at hand (`base` below names it by sha256).\n\n"
        if base.get("type") == "embedded"
        else ""
    )
    code = loading_code("BASE_FOLDER" if base.get("type") == "embedded" else place, ".")
    return f"## Use\n\n{note}{_fence(code, 'python')}"


def _scores(comparison: Comparison) -> str:
    rows = [
        [f"**{_line(row.name)}**" if comparison.released is row else _line(row.name), "merge", loss_text(row.select_loss),
         _interval(row.report_loss)]
        for row in comparison.merges if not row.failure
    ]  # fmt: skip
    rows += [
        [f"**{_line(row.variant_id)}**" if comparison.released is row else _line(row.variant_id), row.state,
         loss_text(row.select_loss), _interval(row.report_loss)]
        for row in comparison.variants
    ]  # fmt: skip
    rows.append(["seed", "before training", loss_text(comparison.seed_loss), _interval(comparison.seed_report)])
    confidence = comparison.verdict.confidence if comparison.verdict else None
    told = f" with {confidence:.0%} bootstrap intervals over documents" if confidence else ""
    return (
        f"## Scores\n\nNats per token, every domain counted alike, lower is better. *select* chose; *report* chose nothing and "
        f"is told{told}.\n\n{_table(('candidate', 'kind', 'select', 'report'), rows)}"
    )


def _probes(comparison: Comparison) -> str:
    if not comparison.probes or comparison.verdict is None:
        return ""
    chosen = comparison.verdict.chosen
    rows = [[_line(cell) for cell in row] for row in probe_rows(comparison.probes, chosen)]
    return (
        "## Probes\n\nShare of right answers, with intervals; the items told here chose nothing.\n\n"
        f"{_table(('probe', 'how', _line(chosen), 'seed'), rows)}"
    )


def _tasks(comparison: Comparison) -> str:
    if not comparison.lm_eval or comparison.verdict is None:
        return ""
    chosen = comparison.verdict.chosen
    rows = [[_line(cell) for cell in row] for row in task_rows(comparison.lm_eval, chosen)]
    return (
        "## Tasks of lm-eval\n\nAsked after all was chosen; with intervals where they are known.\n\n"
        f"{_table(('task', 'metric', _line(chosen), 'seed'), rows)}"
    )


def _parents(comparison: Comparison, layout: RunLayout) -> str:
    verdict, released = comparison.verdict, comparison.released
    assert verdict is not None
    weights = getattr(released, "weights", None) or {verdict.chosen: 1.0}
    rows = [
        [_line(name), f"{weight:.4g}", f"`{adapter_name(layout.adapter(name)) or 'unknown'}`"]
        for name, weight in weights.items()
    ]
    origin = [
        ["experiment", f"`{comparison.experiment_sha256}`"],
        ["genome", f"`{comparison.genome.genome_id if comparison.genome else 'unknown'}`"],
        ["base", f"`{(comparison.base or {}).get('sha256', 'unknown')}`"],
        ["seed", f"`{adapter_name(layout.seed) or 'unknown'}`"],
    ]
    cut = getattr(released, "residual", None)
    residual = (
        f"\nThe cut to rank {getattr(released, 'rank', None)} lost {cut:.2%} of the merge (Frobenius norm).\n" if cut else ""
    )
    return (
        f"## Parents\n\n{_table(('variant', 'weight', 'sha256'), rows)}{residual}\n{_table(('from', 'sha256'), origin)}\n"
        "`lineage.json` beside this card carries them all.\n"
    )


def _genome(comparison: Comparison) -> str:
    if comparison.genome is None:
        return ""
    rows = [
        [_line(name), f"{domain.documents:,}", f"{domain.bytes:,}", _line(domain.licence)]
        for name, domain in comparison.genome.domains.items()
    ]
    sources = [[_line(source.name), _line(source.pinned), f"{source.documents:,}"] for source in comparison.genome.sources]
    origin = f"\nIt comes from:\n\n{_table(('source', 'pinned to', 'documents'), sources)}" if sources else ""
    return f"## Data\n\n{_table(('domain', 'documents', 'bytes', 'licence'), rows)}{origin}"


def _experiment(text: str) -> str:
    return f"## Experiment\n\nThis file grows it again.\n\n{_fence(text, 'yaml')}" if text.strip() else ""


def _use_policy(comparison: Comparison) -> str:
    told = str(comparison.experiment.get("use_policy") or "").strip()
    quoted = "".join(f"> {_line(line)}\n" for line in told.splitlines())
    return f"## Use policy\n\nWho grew it wrote:\n\n{quoted}" if told else ""


def _limits(comparison: Comparison) -> str:
    licences = [domain.licence for domain in comparison.genome.domains.values()] if comparison.genome else [UNKNOWN_LICENCE]
    unknown = UNKNOWN_LICENCE in licences
    lines = [
        "The scores are language-modelling losses on held-out text of the same domains. They say nothing of truthfulness, "
        "safety or ability on tasks.",
        "The adapter inherits the limits and the licence of its base.",
    ]
    if not str(comparison.experiment.get("use_policy") or "").strip():
        lines.append("Who grew it wrote no use policy (`use_policy` of the experiment).")
    if unknown:
        lines.append("Part of the data came without a stated licence: clear it before you publish this adapter.")
    return "## Limits\n\n" + "".join(f"- {line}\n" for line in lines)


# markdown -----------------------------------------------------------------------------------------------------------


def _yaml(value: Any, indent: str = "") -> str:
    """Nested mappings and lists as block YAML. Scalars are written as JSON, which YAML reads alike."""
    if isinstance(value, Mapping):
        items = [(f"{indent}{key}:", item) for key, item in value.items()]
    else:
        items = [(f"{indent}-", item) for item in value]
    lines = []
    for head, item in items:
        if isinstance(item, Mapping | list):
            lines.append(f"{head}\n{_yaml(item, indent + '  ')}")
        else:
            lines.append(f"{head} {json.dumps(item, ensure_ascii=False)}\n")
    return "".join(lines)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _interval(interval: Interval | None) -> str:
    return f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]" if interval else "-"


def _code(text: str) -> str:
    return re.sub(r"[`\s]+", " ", text)


def _fence(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks in `text`."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"
