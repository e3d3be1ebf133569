"""Building a genome from a git repository, against the least that could be done: `git cat-file` and a sha256 of every file.

    python benchmarks/genome.py
    python benchmarks/genome.py --megabytes 200 --json

The repository is made here from the Python files of the standard library and of the installed packages, in hash order up to
`--megabytes`. The baseline reads every blob of the commit through one `git cat-file --batch` and hashes it: no check of git's
own ids, no licences, marks, sketches, splits, parquet. CPU seconds count all processes that were waited for, git's too.

Then each part that no build can do without is done alone: what they take together is the least that a build of these parts
could take. The objects lie as `git add` leaves them, a file each; last, they are packed, as a clone has them, and the first
steps are made again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import machine
import pyarrow as pa
from isal import isal_zlib

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.config.genome import GenomeBuild, GitSource
from chrysalis_ray.core.records import write_json
from chrysalis_ray.genome.build import Genome, build_genome, open_genome, refresh_genome, verify_genome
from chrysalis_ray.genome.documents import Document, decoded, hash_order
from chrysalis_ray.genome.framing import read_text, write_text
from chrysalis_ray.genome.marks import marks_of
from chrysalis_ray.genome.scanning import batches, scan
from chrysalis_ray.genome.shingles import kept_shingles
from chrysalis_ray.genome.similarity import sketches_of
from chrysalis_ray.genome.sources.git_source import read_git
from chrysalis_ray.genome.splits import kinship

RESULTS = Path(__file__).resolve().parent / "results"
WHO = {"GIT_AUTHOR_NAME": "b", "GIT_AUTHOR_EMAIL": "b@b", "GIT_COMMITTER_NAME": "b", "GIT_COMMITTER_EMAIL": "b@b"}


def make_repository(folder: Path, megabytes: float) -> tuple[str, int, int]:
    """A repository of this machine's Python text; returns (commit, files, bytes)."""
    taken, size = 0, 0
    for name, path in python_files(megabytes):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        taken, size = taken + 1, size + path.stat().st_size
    for command in (["init", "--quiet"], ["add", "--all", "--force"], ["-c", "gc.auto=0", "commit", "--quiet", "-m", "text"]):
        subprocess.run(["git", *command], cwd=folder, env={**os.environ, **WHO}, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    return commit, taken, size


def python_files(megabytes: float) -> Iterator[tuple[str, Path]]:
    """Python files of the standard library and of installed packages, in hash order, as many as fit."""
    files = {f"{root.name}/{path.relative_to(root)}": path for root in _roots(sysconfig.get_paths()) for path in _found(root)}
    size = 0
    for name in sorted(files, key=hash_order):
        length = files[name].stat().st_size
        if size + length <= megabytes * 1e6:
            size += length
            yield name, files[name]


def python_texts(megabytes: float) -> Iterator[str]:
    """What is UTF-8 of them."""
    for _, path in python_files(megabytes):
        found = decoded(path.read_bytes())
        if found is not None and found[1] == "utf-8":
            yield found[0]


def _roots(paths: dict[str, str]) -> list[Path]:
    return sorted({Path(paths["stdlib"]), Path(paths["purelib"])})


def _found(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "__pycache__", ".git")]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def least(
    repository: Path, commit: str, work: Callable[[bytes], Any] = lambda content: hashlib.sha256(content).digest()
) -> int:
    """The baseline: sha256 of every blob of the commit. Returns the bytes hashed."""
    listed = subprocess.run(["git", "ls-tree", "-r", commit], cwd=repository, capture_output=True, check=True).stdout
    names = [line.split()[2] for line in listed.splitlines()]
    with subprocess.Popen(
        ["git", "cat-file", "--batch"], cwd=repository, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        size = 0
        for start in range(0, len(names), 256):
            part = names[start : start + 256]
            process.stdin.write(b"\n".join(part) + b"\n")
            process.stdin.flush()
            for _ in part:
                length = int(process.stdout.readline().split()[2])
                work(process.stdout.read(length))
                process.stdout.read(1)
                size += length
        process.stdin.close()
    return size


def bytes_alone(objects: Path) -> None:
    """What must be done with every byte whatever else a build does: unpacked, hashed by SHA-1 (git's id) and SHA-256 (ours),
    packed as in the shards. From the files of loose objects, in one process."""
    codec = pa.Codec("zstd", compression_level=1)
    page: list[bytes] = []
    for number, path in enumerate(objects.glob("??/*")):
        page.append(isal_zlib.decompress(path.read_bytes()))
        hashlib.sha1(page[-1], usedforsecurity=False).hexdigest()
        hashlib.sha256(page[-1]).hexdigest()
        if number % 64 == 63:  # about a megabyte
            codec.compress(b"".join(page))
            page = []
    codec.compress(b"".join(page))


def parts_alone(objects: Path, documents: Sequence[Document]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, work) of what is done with every byte, each apart from all else, in the order of a build. `objects` are loose;
    what comes before a part is not in it."""
    packed = [path.read_bytes() for path in objects.glob("??/*")]
    yield "alone: inflate (zlib)", lambda: [zlib.decompress(content) and None for content in packed]
    yield "alone: inflate (ISA-L)", lambda: [isal_zlib.decompress(content) and None for content in packed]
    contents = [document.content for document in documents]
    yield "alone: SHA-1", lambda: [hashlib.sha1(content, usedforsecurity=False).digest() for content in contents]
    yield "alone: SHA-256", lambda: [hashlib.sha256(content).digest() for content in contents]
    yield "alone: decode", lambda: [decoded(content) and None for content in contents]
    yield "alone: marks", lambda: [marks_of(document) for document in documents]
    parts = [[document.text for document in part] for part in batches(documents)]
    yield "alone: shingles", lambda: [kept_shingles(part) and None for part in parts]
    _, sketches = scan(documents, GenomeBuild(processes=1))
    yield "alone: signatures", lambda: sketches_of(sketches.hashes, sketches.sizes)
    yield "alone: kinship", lambda: kinship(documents, sketches)
    codec = pa.Codec("zstd", compression_level=1)
    pages = [b"".join(contents[begin : begin + 64]) for begin in range(0, len(contents), 64)]  # about a megabyte each
    yield "alone: zstd", lambda: [codec.compress(page) and None for page in pages]


def through_git(repository: Path, commit: str) -> int:
    """Every blob of the commit through one `git cat-file --batch`, and nothing done with it. Returns the bytes."""
    return least(repository, commit, lambda content: None)


def measured(work: Callable[[], Any], megabytes: float) -> tuple[Any, dict[str, float]]:
    """What `work` returned, and its wall and CPU seconds with those of its children."""
    before, began = os.times(), time.perf_counter()
    result = work()
    wall, after = time.perf_counter() - began, os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    return result, {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "mb_per_cpu_s": round(megabytes / max(cpu, 1e-9), 1)}


def compare(folder: Path, megabytes: float, processes: int) -> dict[str, Any]:
    repository = folder / "text"
    commit, files, size = make_repository(repository, megabytes)
    mb = size / 1e6
    source = {"type": "git", "url": str(repository), "commit": commit, "domain": "code"}
    spec = GenomeSpec.model_validate({"sources": [source]})
    steps: dict[str, dict[str, float]] = {}
    least(repository, commit)  # warm the file cache for everybody
    hashed, steps["baseline: cat-file and sha256"] = measured(lambda: least(repository, commit), mb)
    assert hashed == size
    _, steps["unpack, two hashes, zstd"] = measured(lambda: bytes_alone(repository / ".git" / "objects"), mb)
    read = GitSource.model_validate(source)
    _, steps["fetch, check, read"] = measured(lambda: sum(1 for _ in read_git(read, folder, Counter(), {})), mb)
    genome: Genome
    genome, steps["build, one process"] = measured(lambda: build_genome(spec, folder / "one", folder, 1), mb)
    many, steps[f"build, {processes} processes"] = measured(lambda: build_genome(spec, folder / "many", folder, processes), mb)
    assert many.genome_id == genome.genome_id
    documents = [document for split in ("train", "select", "report") for document in genome.documents("code", split)]
    _, steps["of it: marks and sketches"] = measured(lambda: scan(documents, GenomeBuild(processes=1)), mb)
    _, steps["open (shard hashes)"] = measured(lambda: open_genome(folder / "one"), mb)
    _, steps["verify (every document)"] = measured(lambda: verify_genome(folder / "one"), mb)
    refresh_genome(spec, folder / "fresh", folder, processes)
    _, steps["rebuild, pinned commit"] = measured(lambda: refresh_genome(spec, folder / "fresh", folder), mb)
    of_folder = GenomeSpec.model_validate({"sources": [{"type": "folder", "path": "text", "domain": "code"}]})
    refresh_genome(of_folder, folder / "folder", folder, processes)
    _, steps["rebuild, unchanged folder"] = measured(lambda: refresh_genome(of_folder, folder / "folder", folder), mb)
    _, steps["export"] = measured(lambda: write_text(genome, folder / "genome.txt"), mb)
    _, steps["read the export back"] = measured(lambda: sum(1 for _ in read_text(folder / "genome.txt")), mb)
    for name, work in parts_alone(repository / ".git" / "objects", documents):
        _, steps[name] = measured(work, mb)
    subprocess.run(["git", "repack", "-a", "-d", "-q"], cwd=repository, check=True)
    least(repository, commit)
    _, steps["packed: baseline"] = measured(lambda: least(repository, commit), mb)
    _, steps["packed: fetch, check, read"] = measured(lambda: sum(1 for _ in read_git(read, folder, Counter(), {})), mb)
    packed, steps["packed: build, one process"] = measured(lambda: build_genome(spec, folder / "packed", folder, 1), mb)
    assert packed.genome_id == genome.genome_id
    _, steps["packed: through git, nothing else"] = measured(lambda: through_git(repository, commit), mb)
    marks = genome.manifest["content"]["marks"]["code"]
    kept = sum(shard["bytes"] for shard in genome.manifest["shards"].values()) / 1e6
    return {"files": files, "megabytes": round(mb, 1), "shards_megabytes": round(kept, 1), "marks": marks, "steps": steps}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="keep the result in results/genome.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        found = compare(Path(scratch), options.megabytes, options.processes)
    print(f"{found['files']} files, {found['megabytes']} MB of Python; shards {found['shards_megabytes']} MB; {found['marks']}")
    steps = found["steps"]
    loose, packed = (steps[name]["mb_per_cpu_s"] for name in ("baseline: cat-file and sha256", "packed: baseline"))
    print(f"{'':32} {'wall s':>8} {'CPU s':>8} {'MB/CPU s':>9} {'of baseline':>12}")
    for name, step in steps.items():
        speed, base = step["mb_per_cpu_s"], packed if name.startswith("packed") else loose
        print(f"{name:32} {step['wall_s']:8.2f} {step['cpu_s']:8.2f} {speed:9.1f} {speed / base:11.0%}")
    if options.json:
        write_json(RESULTS / "genome.json", {"machine": machine.describe(), "load": machine.load_now(), **found})


if __name__ == "__main__":
    main()
