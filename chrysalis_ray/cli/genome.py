"""`chrysalis genome`: build a sealed genome, look into it, compare two, and give it away."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chrysalis_ray.cli.arguments import Experiment, Json, RunDirectory, Set
from chrysalis_ray.cli.outcome import print_json, print_lines
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.printable import printable

if TYPE_CHECKING:
    from chrysalis_ray.genome.build import Genome


def _directory(name: str) -> Any:
    help_text = "A folder that `chrysalis genome build` or `chrysalis run` wrote."
    return typer.Argument(metavar=name, help=help_text, show_default=False, exists=True, file_okay=False)


Directory = Annotated[Path, _directory("DIRECTORY")]
Before = Annotated[Path, _directory("BEFORE")]
After = Annotated[Path, _directory("AFTER")]
Document = Annotated[str | None, typer.Argument(metavar="DOCUMENT", help="A document: its id, the start of it, or its path.")]


def build_genome(
    experiment: Experiment,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the genome is to lie.", show_default=False)],
    set: Set = None,
    json: Json = False,
) -> None:
    """Seal the sources of an experiment, without a run.

    The same command again reads only what changed; where nothing did, each file costs a look at its date.

    \b
    chrysalis genome build experiments/quickstart.yaml --out genomes/quickstart
    """
    from chrysalis_ray.config.loading import load_experiment
    from chrysalis_ray.core.lock import sole_owner
    from chrysalis_ray.genome.build import refresh_genome
    from chrysalis_ray.training.planning.choice import chooser

    loaded = load_experiment(experiment, set or [], chooser())
    folder = out.absolute()
    check_place(folder)
    with sole_owner(folder / ".lock"):
        genome = refresh_genome(loaded.experiment.genome, folder, loaded.folder)
    if json:
        print_json(summary(genome))
    else:
        print_lines(lines_of(genome))


def check_place(folder: Path) -> None:
    """Raises GenomeError where a genome must not be built: among other files, or under the variants of a run."""
    from chrysalis_ray.core.errors import GenomeError
    from chrysalis_ray.core.records import is_draft

    run = RunLayout(folder.parent)
    if run.genome == folder and run.run_manifest.exists():
        raise GenomeError(f"{folder} is the genome of a run, which its variants stand on", "give --out another folder")
    if folder.exists() and not folder.is_dir():
        raise GenomeError(f"{folder} is a file", "give --out a folder")
    known = {"manifest.json", "shards", "scan", "readings", "state.json", ".lock", "forgotten.jsonl"}
    there = [path for path in folder.iterdir() if not is_draft(path)] if folder.is_dir() else []
    strangers = sorted(path.name for path in there if path.name not in known)
    if strangers:
        raise GenomeError(f"{folder} exists and is no genome: it holds {strangers[0]}", "give --out a folder of its own")


def verify_genome(
    directory: Directory,
    level: Annotated[
        int | None, typer.Option(min=0, max=4, help="Stop at this level; 4 if not given.", show_default=False)
    ] = None,
    rebuild: Annotated[Path | None, typer.Option("--rebuild", metavar="EXPERIMENT", help="Read its sources again too.")] = None,
) -> None:
    """Hash a sealed genome again.

    Level by level: 0 the manifest, 1 every shard, 2 the Merkle root, 4 every document; exit 1 if one byte changed. With
    --rebuild it is also built again from the sources of EXPERIMENT, in a folder that is thrown away; exit 1 unless every object
    of its repositories (level 3) is what its id says and the same genome comes out (level 5).

    \b
    chrysalis genome verify runs/quickstart
    """
    from chrysalis_ray.config.loading import load_experiment
    from chrysalis_ray.genome import build
    from chrysalis_ray.genome.levels import DOCUMENTS, Checked, sources_checked
    from chrysalis_ray.genome.rebuilding import check_against_sources
    from chrysalis_ray.training.planning.choice import chooser

    if rebuild is not None and level is not None:
        raise typer.BadParameter("--rebuild is level 5, which rests on all others: leave --level out")
    loaded = None if rebuild is None else load_experiment(rebuild, [], chooser())
    told: list[Checked] = []
    genome = build.verify_genome(genome_folder(directory), DOCUMENTS if level is None else level, told.append)
    intact = "is intact" if level is None or level >= DOCUMENTS else f"holds as far as level {told[-1].level}"
    domains = f"{len(genome.domains)} domain{'s' if len(genome.domains) > 1 else ''}"
    print_lines(checked.line for checked in told)
    print_lines([f"genome {genome.genome_id} {intact}: {domains} ({', '.join(genome.domains)})"])
    if loaded is not None:
        sys.stdout.flush()  # it is so, whatever becomes of the sources
        begun = perf_counter()
        check_against_sources(genome, loaded.experiment.genome, loaded.folder)
        print_lines(checked.line for checked in sources_checked(genome.manifest["content"], perf_counter() - begun))
        print("it comes out of its sources again")


def show_genome(directory: Directory, document: Document = None, json: Json = False) -> None:
    """Show what is in a genome, or prove that a document is.

    Domains, splits, licences, marks, and what every source was pinned to. For a document: its line of the manifest, the record
    that it was told from, and an inclusion proof of RFC 6962 against the Merkle root.

    \b
    chrysalis genome show runs/quickstart
    """
    from chrysalis_ray.genome.build import open_genome
    from chrysalis_ray.genome.proofs import prove
    from chrysalis_ray.genome.swhid import sealed_document, swhid_of

    genome = open_genome(genome_folder(directory))
    if document is None:
        print_json(summary(genome)) if json else print_lines(lines_of(genome))
        return
    row = find_document(genome, document)
    proof = prove(genome.manifest["content"]["documents"], row["doc_id"])
    sealed = sealed_document(genome, row)
    row = {**row, "swhid": swhid_of(sealed.content)}
    if sealed.record:
        row["record"] = {**row["record"], "json": sealed.record}
    shown = {**row, "merkle_root": genome.manifest["content"]["merkle_root"], "proof": proof}
    if json:
        print_json(shown)
        return
    print_lines(f"{key:10} {value}" for key, value in row.items())
    place = f"leaf {proof['index']} of {proof['size']}"
    print(f"{'proof':10} {place}, {len(proof['audit_path'])} hashes to the root {shown['merkle_root']} (--json prints them)")


def diff_genomes(before: Before, after: After, json: Json = False) -> None:
    """Tell what one genome has that another has not.

    By domain: added, removed, forgotten and changed documents, those in another split, and those marked or licensed otherwise.

    \b
    chrysalis genome diff runs/monday runs/tuesday
    """
    from chrysalis_ray.genome.build import open_genome
    from chrysalis_ray.genome.differences import differences

    old, new = open_genome(genome_folder(before)), open_genome(genome_folder(after))
    found = differences(old.manifest["content"], new.manifest["content"])
    if json:
        print_json({"before": old.genome_id, "after": new.genome_id, "domains": found})
        return
    print(f"{old.genome_id[:16]} -> {new.genome_id[:16]}" + ("" if found else ": the same documents, splits and marks"))
    for domain, kinds in found.items():
        print(f"{domain}: " + ", ".join(f"{len(paths)} {kind}" for kind, paths in kinds.items()))
        for kind, paths in kinds.items():
            print_lines(f"  {kind:9} {path}" for path in paths)


def export_genome(
    directory: Directory,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The text to write.", show_default=False)],
) -> None:
    """Write a genome as one text, with its metadata beside it.

    FILE holds every document in frames that can be undone; FILE.croissant.json describes it and the shards (Croissant), FILE.md
    is its data card. Documents that `genome.exclude` keeps away are named there, not shown.

    \b
    chrysalis genome export runs/quickstart --out genome.txt
    """
    from chrysalis_ray.core.errors import GenomeError
    from chrysalis_ray.core.records import write_bytes, write_json
    from chrysalis_ray.genome.build import open_genome
    from chrysalis_ray.genome.croissant import croissant
    from chrysalis_ray.genome.data_card import data_card
    from chrysalis_ray.genome.framing import write_text

    file = out.absolute()
    metadata, card = file.with_name(f"{file.name}.croissant.json"), file.with_name(f"{file.name}.md")
    for path in (file, metadata, card):
        if path.exists():
            raise GenomeError(f"{path} exists and is not overwritten", "give --out another name, or remove it")
    if not file.parent.is_dir():
        raise GenomeError(f"there is no folder {file.parent}", "make it first, or give --out another place")
    genome = open_genome(genome_folder(directory))
    if file.parent.resolve().is_relative_to(genome.folder.resolve()):
        raise GenomeError(f"{file} would lie in the genome itself, in which nothing changes", "give --out another place")
    sha256 = write_text(genome, file)
    write_json(metadata, croissant(genome, file, file.parent))
    write_bytes(card, data_card(genome, sha256).encode())
    size = f"{file.stat().st_size / 1e6:.1f} MB, sha256 {sha256}"
    print(f"genome {genome.genome_id[:16]} -> {out} ({size}), {metadata.name}, {card.name}")


def tell_exposure(
    run_directory: RunDirectory,
    document: Annotated[
        str, typer.Argument(metavar="DOCUMENT", help="Its id, the start of it, or its path.", show_default=False)
    ],
    json: Json = False,
) -> None:
    """Tell which variants saw a document, when, and how often.

    Computed from each variant's mix and history alone; what a variant took over from another counts.

    \b
    chrysalis genome exposure runs/quickstart python/topics/assert#reference-0
    """
    from chrysalis_ray.genome.build import open_genome
    from chrysalis_ray.genome.tokens import open_tokens
    from chrysalis_ray.population.exposure import exposure

    layout = RunLayout(run_directory.absolute())
    genome = open_genome(layout.genome)
    row = find_document(genome, document)
    told = exposure(layout, genome, open_tokens(layout.tokens), row["doc_id"])
    if json:
        print_json({"genome_id": genome.genome_id, **row, "variants": told})
        return
    print_lines([f"{row['path']} ({row['doc_id'][:16]}), {row['bytes']} bytes, in {row['split']} of {row['domain']}"])
    for name, seen in told.items():
        steps = f"steps {seen['steps'][0]} to {seen['steps'][-1]}" if seen["steps"] else "never"
        through = [other for other in seen["trained_by"] if other != name]
        inherited = f", partly as {', '.join(through)}" if through else ""
        print(f"  {name:24} {len(seen['steps']):6} times, {seen['tokens']:8} tokens, {steps}{inherited}")


# what the verbs share -----------------------------------------------------------------------------------------------


def genome_folder(directory: Path) -> Path:
    """The genome that `directory` is, or the one of the run that it is."""
    folder = directory.absolute()
    run = RunLayout(folder)
    return run.genome if not (folder / "manifest.json").is_file() and run.genome.is_dir() else folder


def find_document(genome: Genome, wanted: str) -> dict[str, Any]:
    """The manifest's line of a document: by id, by the start of one, or by path, as it is or as it is shown. Raises GenomeError
    for none and for several."""
    from chrysalis_ray.core.errors import GenomeError

    rows = genome.manifest["content"]["documents"]
    found = [row for row in rows if wanted in (row["doc_id"], row["path"], printable(row["path"]))]
    if not found and len(wanted) >= 6:
        found = [row for row in rows if row["doc_id"].startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"{row['doc_id'][:16]} ({printable(row['path'])})" for row in found[:3])
        raise GenomeError(f"{len(found)} documents are {wanted!r}: {names}", "name one by its whole id")
    for stone in genome.manifest["content"].get("forgotten", []):
        if wanted in (stone["doc_id"], stone.get("path")) or (len(wanted) >= 6 and stone["doc_id"].startswith(wanted)):
            raise GenomeError(f"{wanted!r} was forgotten on {stone['date']}: {stone['reason']}")
    raise GenomeError(
        f"the genome has no document {wanted!r}; there is {', '.join(_near(wanted, [row['path'] for row in rows]))}",
        "name it by its sha256 (or at least 6 digits of it) or by its path",
    )


def _near(wanted: str, paths: Sequence[str]) -> list[str]:
    """Three paths that hold what is wanted, or else its file, or else the name of that; or any three."""
    file = wanted.partition("#")[0]
    for part in (wanted, file, Path(file).stem):
        if near := [printable(path) for path in paths if part and part in path][:3]:
            return near
    return [printable(path) for path in paths[:3]]


def summary(genome: Genome) -> dict[str, Any]:
    """What `show` tells, for programs: everything of the manifest but the documents' lines."""
    content = {key: value for key, value in genome.manifest["content"].items() if key != "documents"}
    return {"genome_id": genome.genome_id, "created": genome.manifest["created"], **content}


def lines_of(genome: Genome) -> list[str]:
    """What `show` tells, for people."""
    from chrysalis_ray.genome.documents import PARTS
    from chrysalis_ray.genome.origins import name_of_source, pins_of_source

    content = genome.manifest["content"]
    lines = [f"genome {genome.genome_id}", f"Merkle root {content['merkle_root']} over {len(content['documents'])} documents"]
    for domain in genome.domains:
        parts = content["totals"][domain]
        counts = ", ".join(f"{parts[name]['documents']} {name}" for name in PARTS if name in parts)
        size = sum(part["bytes"] for part in parts.values()) / 1e6
        lines.append(f"  {domain}: {size:.2f} MB, {counts}; {content['licences'][domain]}")
        if marks := content.get("marks", {}).get(domain):
            lines.append("    marked: " + ", ".join(f"{count} {mark}" for mark, count in marks.items()))
    for source in content.get("sources", []):
        pinned = pins_of_source(source)
        pinned += [f"{count} {reason}" for reason, count in source["skipped"].items()]
        lines.append(f"  from {name_of_source(source)}: " + ", ".join([f"{source['documents']} documents", *pinned]))
    for (day, reason), count in sorted(
        Counter((stone["date"], stone["reason"]) for stone in content.get("forgotten", [])).items()
    ):
        lines.append(f"  forgotten on {day}: {count} documents ({reason})")
    denied = any("use_denied" in marks for marks in content.get("marks", {}).values())
    if excluded := [*content["recipe"].get("exclude", []), *(["use_denied"] if denied else [])]:
        lines.append(f"  kept from training: {', '.join(dict.fromkeys(excluded))}")
    return lines
