"""The data card of a genome: what a person should know before using it, in Markdown, from its manifest alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chrysalis_ray.core.printable import markdown_line
from chrysalis_ray.genome.build import Genome
from chrysalis_ray.genome.documents import PARTS
from chrysalis_ray.genome.origins import name_of_source, pins_of_source

MEANINGS = {
    "train": "is learned from",
    "select": "chooses between variants and merges",
    "report": "tells how good the chosen one is, and chooses nothing",
    "excluded": "neither trains nor judges",
}


def data_card(genome: Genome, text_sha256: str) -> str:
    """Domains, splits, licences, marks, sources and what is not in it; and how to check all that."""
    content = genome.manifest["content"]
    parts = [
        f"# Genome {genome.genome_id[:12]}\n\nSealed {genome.manifest['created']}: {len(content['documents']):,} documents in "
        f"{len(genome.domains)} domains.\n",
        _domains(content, genome.domains),
        _sources(content.get("sources", [])),
        _notices(content, genome.domains),
        f"## Check it\n\nIts id is `{genome.genome_id}`, the sha256 of all that its manifest says; its Merkle root (RFC 6962) "
        f"`{content['merkle_root']}`; the exported text has the sha256 `{text_sha256}`. `chrysalis genome verify` hashes every "
        "document again.\n",
    ]
    return "\n".join(part for part in parts if part)


def _domains(content: Mapping[str, Any], domains: Sequence[str]) -> str:
    rows = []
    for domain in domains:
        parts = content["totals"][domain]
        counts = [f"{parts[name]['documents']:,}" if name in parts else "0" for name in PARTS]
        rows.append([domain, *counts, f"{sum(part['bytes'] for part in parts.values()):,}", content["licences"][domain]])
    meanings = "".join(f"- *{name}* {meaning}\n" for name, meaning in MEANINGS.items())
    return f"## Domains\n\n{_table(['domain', *PARTS, 'bytes', 'licence'], rows)}\n{meanings}"


def _sources(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [name_of_source(line), "; ".join(pins_of_source(line)) or "what lay there", f"{line['documents']:,}",
         ", ".join(f"{count} {reason}" for reason, count in line["skipped"].items()) or "nothing"]
        for line in lines
    ]  # fmt: skip
    return f"## Sources\n\n{_table(('source', 'pinned to', 'documents', 'left out'), rows)}" if rows else ""


def _notices(content: Mapping[str, Any], domains: Sequence[str]) -> str:
    marks = content.get("marks", {})
    lines = [
        f"{domain}: " + ", ".join(f"{count} {mark}" for mark, count in marks[domain].items())
        for domain in domains
        if marks.get(domain)
    ]
    excluded = content["recipe"].get("exclude", [])
    lines += [f"kept from training and judging: documents marked {', '.join(excluded)}"] if excluded else []
    lines += [f"{stone['date']}: forgotten {stone['doc_id'][:16]}: {stone['reason']}" for stone in content.get("forgotten", [])]
    if any("NOASSERTION" in licence for licence in content["licences"].values()):
        lines.append("part of it came without a stated licence: clear it before you publish")
    return "## Notices\n\n" + "".join(f"- {markdown_line(line)}\n" for line in lines) if lines else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(map(markdown_line, row))} |" for row in (heads, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(heads)}", *lines[1:]]) + "\n"
