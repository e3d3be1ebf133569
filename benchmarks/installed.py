"""The Python standard library and every installed package as one genome: build, verify, rebuild, and ask who saw a document.

    python benchmarks/installed.py
    python benchmarks/installed.py --engine ray --json
    python benchmarks/installed.py --megabytes 20 --no-tokens

The sources are the library's files, its docstrings, comments and reference, every package's Python files (each checked against
the RECORD of its package), and a folder of notes, of which one is changed: what a rebuild costs then is what changed, and what
nobody can be spared, comparing all documents with it. Tokens are those of a small BPE trained here. The question is put to
eight variants that have each trained a million rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
from genome import measured

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.records import Epigenome, write_json
from chrysalis_ray.genome.build import Genome, open_genome, refresh_genome, verify_genome
from chrysalis_ray.genome.exposure import Stretch, ordinal_of, sightings, tokens_by_row
from chrysalis_ray.genome.tokens import tokenize_genome

RESULTS = Path(__file__).resolve().parent / "results"
VARIANTS, ROWS, ROWS_PER_STEP, SEQUENCE_LENGTH = 8, 1_000_000, 16, 1024
VOCABULARY, TRAINED_ON = 4096, 3_000_000  # entries, bytes


def spec_of(megabytes: float | None, build: dict[str, Any]) -> GenomeSpec:
    """All of it, or so much of each domain."""
    domains = ["code", "docstrings", "comments", "reference"]
    packages: dict[str, Any] = {"type": "packages", "names": "all", "domain": "packages"}
    python: dict[str, Any] = {"type": "python", "domains": domains, "max_megabytes": megabytes or 1000}
    if megabytes is not None:
        packages["max_megabytes"] = megabytes
    sources = [python, packages, {"type": "folder", "path": "notes", "domain": "notes"}]
    return GenomeSpec.model_validate({"sources": sources, "build": build})


def write_note(folder: Path, number: int, edition: int) -> None:
    words = [hashlib.sha256(f"{number} {edition} {index}".encode()).hexdigest()[:6] for index in range(400)]
    (folder / "notes").mkdir(exist_ok=True)
    (folder / "notes" / f"{number}.md").write_text(" ".join(words))


def train_tokenizer(genome: Genome, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts, size = [], 0
    for document in genome.documents("packages", "select"):
        texts.append(document.text)
        size += document.size
        if size > TRAINED_ON:
            break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))


def run(folder: Path, megabytes: float | None, build: dict[str, Any], with_tokens: bool) -> dict[str, Any]:
    for number in range(20):
        write_note(folder, number, 0)
    spec = spec_of(megabytes, build)
    place = folder / "genome"
    steps: dict[str, dict[str, float]] = {}
    genome: Genome
    genome, steps["build"] = measured(lambda: refresh_genome(spec, place, folder), 1.0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows = genome.manifest["content"]["documents"]
    mb = sum(row["bytes"] for row in rows) / 1e6
    _, steps["open (shard hashes)"] = measured(lambda: open_genome(place), mb)
    _, steps["verify (every document)"] = measured(lambda: verify_genome(place), mb)
    same, steps["rebuild, nothing changed"] = measured(lambda: refresh_genome(spec, place, folder), mb)
    assert same.genome_id == genome.genome_id
    before = {path: path.stat().st_mtime_ns for path in (place / "shards").iterdir()}
    write_note(folder, 3, 1)
    other, steps["rebuild, one note changed"] = measured(lambda: refresh_genome(spec, place, folder), mb)
    assert other.genome_id != genome.genome_id
    written = [path for path in (place / "shards").iterdir() if path.stat().st_mtime_ns != before.get(path)]
    if with_tokens:
        train_tokenizer(other, folder / "tokenizer")
        tokens, steps["tokenise"] = measured(
            lambda: tokenize_genome(other, folder / "tokenizer", folder / "tokens", SEQUENCE_LENGTH), mb
        )
        row = next(row for row in rows if row["domain"] == "packages" and row["split"] == "train" and row["bytes"] > 10_000)
        seen, steps["who saw a document, 8 variants"] = measured(lambda: asked(other, tokens, row["doc_id"]), mb)
        print(f"{row['path']}: " + ", ".join(f"{name} {count} times" for name, count in seen.items()))
    steps["build"]["mb_per_cpu_s"] = round(mb / max(steps["build"]["cpu_s"], 0.01), 1)
    caches = [path for kind in ("scan", "readings") for path in (place / kind).iterdir()]
    totals = {domain: sum(part["bytes"] for part in parts.values()) / 1e6 for domain, parts in genome.totals().items()}
    return {
        "documents": len(rows),
        "megabytes": round(mb, 1),
        "domains_mb": {domain: round(size, 1) for domain, size in totals.items()},
        "marks": genome.manifest["content"]["marks"],
        "shards": len(genome.manifest["shards"]),
        "shards_megabytes": round(sum(shard["bytes"] for shard in genome.manifest["shards"].values()) / 1e6, 1),
        "shards_rewritten": len(written),
        "caches_megabytes": round(sum(path.stat().st_size for path in caches) / 1e6, 1),
        "build": build,
        "build_peak_mib": round(peak),
        "genome_id": genome.genome_id,
        "steps": steps,
    }  # fmt: skip


def asked(genome: Genome, tokens: Any, doc_id: str) -> dict[str, int]:
    """How often each variant saw the document."""
    domain, _, ordinal = ordinal_of(genome.manifest["content"]["documents"], doc_id)
    by_row = tokens_by_row(tokens, domain, ordinal)
    found = {}
    for number in range(VARIANTS):
        mix = Epigenome({name: 1.0 + number * (name == "packages") for name in tokens.domains}, "size")
        stretch = Stretch(f"v{number}", number, mix, 0, ROWS // ROWS_PER_STEP, ROWS_PER_STEP)
        found[stretch.variant_id] = len(sightings([stretch], tokens, domain, by_row))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, help="of each domain at most; all of it if not given")
    parser.add_argument("--engine", choices=("processes", "ray"), default="processes")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--no-tokens", action="store_true", help="without tokens and the question who saw a document")
    parser.add_argument("--json", action="store_true", help="keep the result in results/installed.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        build = {"engine": options.engine, "processes": options.processes}
        found = run(Path(scratch), options.megabytes, build, not options.no_tokens)
    print(f"{found['documents']} documents, {found['megabytes']} MB: {found['domains_mb']}; {found['marks']}")
    print(f"{found['shards']} shards of {found['shards_megabytes']} MB, {found['shards_rewritten']} rewritten for one note")
    print(f"caches {found['caches_megabytes']} MB; {found['build_peak_mib']} MiB of memory to build; {found['genome_id']}")
    print(f"{'':32} {'wall s':>8} {'CPU s':>8} {'MB/CPU s':>9}")
    for name, step in found["steps"].items():
        print(f"{name:32} {step['wall_s']:8.2f} {step['cpu_s']:8.2f} {step['mb_per_cpu_s']:9.1f}")
    if options.json:
        write_json(RESULTS / "installed.json", {"machine": machine.describe(), "load": machine.load_now(), **found})


if __name__ == "__main__":
    main()
